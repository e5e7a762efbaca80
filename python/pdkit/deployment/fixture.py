"""SGLang's PD fixture, supervised: servers that log apart, phases, a death that fails the run at once, a clean end.

One implementation, two roads. `pdkit.deployment.attach` puts `PDServers` in the place of SGLang's
`PDDisaggregationServerBase` before a test file is run, so that any PD test of SGLang's own runs unedited under it. The
variants of this suite stand on `PlannedServers`, which knows what it launches.
"""

import atexit
import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock
from urllib.parse import urlparse

import requests
import sglang
from sglang.srt.server_args import ServerArgs
from sglang.test import test_utils
from sglang.test.server_fixtures import disaggregation_fixture
from sglang.test.server_fixtures.disaggregation_fixture import PDDisaggregationServerBase

from pdkit.core import events, forked
from pdkit.core.fork_server import python_program
from pdkit.core.gpus import found, visible_gpus
from pdkit.core.loopback import past_proxies
from pdkit.deployment import ports, quirks, warm_up
from pdkit.deployment.one_token import silent_half
from pdkit.deployment.server import Server
from pdkit.deployment.supervisor import ServerDied, Supervisor

LOG_DIR_VARIABLE = "SGLANG_PD_LOG_DIR"
SERVER_MODULE_VARIABLE = "PDKIT_SERVER_MODULE"
FIRST_PAUSE_S, ANSWER_S = 0.05, 5.0
SGLANG_SERVER = "sglang.launch_server"

deployments: list[type["PDServers"]] = []  # whose servers run or are being launched; the last is the current one
_preparing = threading.Lock()  # a test may launch its servers in threads


def current() -> type["PDServers"] | None:
    """The test class whose servers run or are being launched; None outside of one."""
    return deployments[-1] if deployments else None


def _supervised(set_up: Callable[[type], None]) -> Any:
    def setUpClass(cls: type["PDServers"]) -> None:
        cls.begin()
        with cls.failing_with_a_death():
            set_up(cls)

    return classmethod(setUpClass)


def _set_up_of(cls: Any) -> Any:
    """The function that is the class method `setUpClass` of a test class."""
    return cls.setUpClass.__func__


def ask_until_ready(url: str, seconds: float) -> float:
    """Asks often at first, where SGLang's own wait asks once a second.

    Returns the seconds that are left to that, 1 at least: it fails in its own words.
    """
    pause, deadline = FIRST_PAUSE_S, time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 1.0:
        with contextlib.suppress(requests.RequestException):
            if requests.get(url, timeout=ANSWER_S).status_code == 200:
                break
        time.sleep(pause)
        pause = min(1.0, 1.2 * pause)
    return max(1.0, left)


class PDServers(PDDisaggregationServerBase):
    """The fixture of the installed release. What a test launches is watched; where it launches is its own affair.

    server_module  what a server is run from: `python3 -m`
    server_env     what every server gets beyond our own environment
    log_dir        where logs and transcripts go: SGLANG_PD_LOG_DIR, or else a new temporary directory
    silence_s      seconds without an answer to an eval after which servers are asked whether they live
    answer_s       seconds that each of them then has
    compiles_kernels  whether the first requests of a size may wait for a compiler, where there are GPUs
    """

    server_module = os.environ.get(SERVER_MODULE_VARIABLE) or SGLANG_SERVER
    server_env: Mapping[str, str] = {}
    engine = f"sglang {sglang.__version__}" if server_module == SGLANG_SERVER else server_module
    base_host: str
    lb_port: str
    prefill_port: str
    decode_port: str
    lb_url: str
    prefill_url: str
    decode_url: str
    bootstrap_port: str
    model: str
    process_prefill: Server | None
    process_decode: Server | None
    process_lb: Server | None

    log_dir: str | None = None
    supervisor: Supervisor | None = None
    silence_s = 240.0
    answer_s = 60.0
    compiles_kernels = server_module == SGLANG_SERVER

    prefill_nccl_port = decode_nccl_port = None  # fixtures before 0.5.18 pin none
    answering: set[str] = set()  # URLs that have answered a first request
    _servers: list[Server] = []
    _port_lock: socket.socket | None = None
    _names: dict[str, str] = {}  # URL -> what listens there

    def __init_subclass__(cls, **kwargs: Any) -> None:
        set_up = _set_up_of(cls)
        if not getattr(set_up, "is_supervised", False):
            setattr(cls, "setUpClass", _supervised(set_up))  # noqa: B010  to mypy a method is no attribute
        super().__init_subclass__(**kwargs)  # wraps it once more, to tear down what a failed setUpClass left
        _set_up_of(cls).is_supervised = True

    @classmethod
    def begin(cls) -> None:
        """Starts to watch; from here on `stop_servers` has something to do, however the class and the process end."""
        if cls.supervisor is None:
            os.environ.update(past_proxies(os.environ))
            cls.supervisor, cls._servers, cls._names, cls.answering = Supervisor(), [], {}, set()
            deployments.append(cls)
            atexit.register(cls.stop_servers)
            cls.addClassCleanup(cls.stop_servers)  # a test's own tearDownClass may fail before it reaches ours

    @classmethod
    def watching(cls) -> Supervisor:
        """What watches the servers, from `begin` to `stop_servers`."""
        assert cls.supervisor is not None, f"{cls.__name__} launches nothing, or has stopped its servers"
        return cls.supervisor

    @classmethod
    def rdma_devices_for(cls, gpu_indices: Sequence[int]) -> list[str]:
        """NICs of a server on these GPUs; fixtures before 0.5.21 know one list for all."""
        known = hasattr(PDDisaggregationServerBase, "rdma_devices_for")
        return super().rdma_devices_for(gpu_indices) if known else cls.rdma_devices

    @classmethod
    def launch_all(cls) -> None:
        cls.start_prefill()
        cls.start_decode()  # both load at the same time; the phase of decode is how much longer it takes
        cls.wait_server_ready(f"{cls.prefill_url}/health")
        cls.wait_server_ready(f"{cls.decode_url}/health")
        cls.launch_lb()

    @classmethod
    def launch_server(
        cls,
        name: str,
        url: str,
        args: Sequence[str | None],
        env: Mapping[str, str] | None = None,
        model: str | None = None,
        copies: Sequence[IO[str]] = (),
    ) -> Server:
        """Launches an SGLang server at `url`; does not wait for it."""
        host, port = urlparse(url).netloc.split(":")
        command = ["python3", "-m", cls.server_module, "--model-path", model or cls.model]
        command += [*quirks.as_installed(args, ServerArgs), "--host", host, "--port", port]
        cls._names[url] = name
        return cls.launch(name, command, {**cls.server_env, **(env or {})}, copies=copies)

    @classmethod
    def launch(
        cls,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        stop: signal.Signals = signal.SIGTERM,
        copies: Sequence[IO[str]] = (),
    ) -> Server:
        """Starts any process of the deployment: it is watched from now on under its name, and stopped at the end."""
        cls.begin()
        cls._prepare()
        python3 = os.path.dirname(sys.executable)  # commands say `python3`: let it be this one
        environment = {**os.environ, **(env or {}), "PATH": f"{python3}{os.pathsep}{os.environ['PATH']}"}
        before = sum(server.name == name for server in cls._servers)
        log_path = cls.log_path(f"{name} restart {before}" if before else name)
        server_class = cls.server_class(name, environment) if python_program(command) else Server
        with cls.watching().launching():
            server = server_class(name, command, environment, log_path, stop, copies)
            cls._servers.append(server)
            cls.watching().watch(name, server)
        return server

    @classmethod
    def server_class(cls, name: str, environment: Mapping[str, str]) -> type[Server]:
        """Of the process `name`, which is about to be started with `environment`.

        Where our own process was forked from one that had imported what servers need, so are they.
        """
        fork_server = forked.here()
        return fork_server.based_on(Server) if fork_server else Server

    @classmethod
    def _prepare(cls) -> None:
        """Before the first server: the ports are ours until the servers are stopped, and nobody listens there."""
        with _preparing:
            if cls._port_lock is None:
                cls._port_lock = ports.lock(cls)
                ports.require_free(cls)

    @classmethod
    def log_directory(cls) -> str:
        """`log_dir`, which is made when it is first asked for."""
        if cls.log_dir is None:
            cls.log_dir = os.getenv(LOG_DIR_VARIABLE) or tempfile.mkdtemp(prefix="pd-servers-")
            os.makedirs(cls.log_dir, exist_ok=True)
        return cls.log_dir

    @classmethod
    def log_path(cls, name: str, kind: str = "log") -> str:
        return os.path.join(cls.log_directory(), f"{cls.__name__}.{name.replace(' ', '_')}.{kind}")

    @classmethod
    def launch_lb(cls) -> None:
        """Starts the load balancer that the fixture of the installed release composes."""
        cls._names[cls.lb_url] = "load balancer"
        with mock.patch.object(disaggregation_fixture, "popen_with_error_check", cls.start_lb):
            super().launch_lb()

    @classmethod
    def start_lb(cls, command: Sequence[str]) -> Server:
        return cls.launch("load balancer", command, stop=signal.SIGKILL)  # it holds no state

    @classmethod
    def wait_server_ready(
        cls, url: str, timeout: float = test_utils.DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH, process: Any = None
    ) -> None:
        # `process` is left to the supervisor, which watches all of them and names the one that dies.
        name = cls._names.get(url.removesuffix("/health"))
        launched = events.phase(f"{'start' if name == 'load balancer' else 'launch'} {name}")
        with launched if name else contextlib.nullcontext(), cls.failing_with_a_death():
            super().wait_server_ready(url, ask_until_ready(url, timeout))

    @classmethod
    def first_request(cls, base_url: str | None = None, model: str | None = None, threads: int = 32) -> None:
        """One completion through all three: who cannot answer at all fails by this, not by a low score.

        On GPUs `warm_up` with as many as `threads` requests follows.
        """
        base_url, model = base_url or cls.lb_url, model or getattr(cls, "model", "default")
        body = {"model": model, "prompt": "Question: What is 1 + 1?\nAnswer:", "max_tokens": 16, "temperature": 0}
        patience = test_utils.DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH
        with events.phase("first request"), cls.failing_with_a_death():
            answer = requests.post(
                f"{base_url}/v1/completions", json=body, headers=warm_up.key_header(), timeout=patience
            )
            status = answer.status_code
            assert status == 200, f"first request: {base_url} answered {status}: {answer.text[:1000]}"
        cls.answering.add(base_url)
        print(f"first answer: {answer.json()['choices'][0]['text']!r}", flush=True)
        if cls.compiles_kernels and visible_gpus():
            cls.warm_up(base_url, model, threads)

    @classmethod
    def warm_up(cls, base_url: str, model: str | None, threads: int) -> None:
        """Up to `threads` requests at once, until SGLang has compiled the kernels that they need; see `warm_up`."""
        prompts = warm_up.batches(threads)
        one_pass = partial(warm_up.send, base_url, model, prompts, test_utils.DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH)
        with events.phase("warm up"), cls.failing_with_a_death():
            seconds = warm_up.until_settled(one_pass)
        print(
            f"warm up, {sum(map(len, prompts))} requests a pass: {', '.join(f'{s:.1f}' for s in seconds)} s", flush=True
        )

    @classmethod
    @contextlib.contextmanager
    def failing_with_a_death(cls) -> Iterator[None]:
        """Within it a death raises AssertionError: unittest cleans up after an Exception only."""
        try:
            with cls.watching().interrupting():
                yield
        except ServerDied as death:
            raise AssertionError(str(death)) from None

    @classmethod
    def _failing_with_another_death(cls) -> contextlib.AbstractContextManager[None]:
        """The same after the test's own method, which has failed by a death already if there was one."""
        has_failed = cls.supervisor is None or cls.supervisor.has_reported
        return contextlib.nullcontext() if has_failed else cls.failing_with_a_death()

    @classmethod
    def heartbeat(cls) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Finds servers that hang while an eval waits; see `Supervisor.heartbeat`."""
        urls = {name: url for url, name in cls._names.items() if name != "load balancer"}
        pair = {name: urls[name] for name in ("prefill", "decode") if name in urls}
        port = getattr(cls, "bootstrap_port", None)
        asks_pair = (
            partial(silent_half, pair, cls.base_host, int(port), cls.answer_s) if len(pair) == 2 and port else None
        )
        return cls.watching().heartbeat(urls, cls.silence_s, cls.answer_s, asks_pair)

    def _callSetUp(self) -> None:
        with self.failing_with_a_death():
            super()._callSetUp()

    def _callTestMethod(self, method: Callable[[], None]) -> None:
        if getattr(self, "expect_server_exit", False):  # so SGLang's fault-injection tests declare it
            self.watching().expect_all_exits()
        with self.failing_with_a_death():
            super()._callTestMethod(method)

    def _callTearDown(self) -> None:
        with self._failing_with_another_death():
            super()._callTearDown()

    def _callCleanup(self, function: Callable[..., object], /, *args: Any, **kwargs: Any) -> None:
        with self._failing_with_another_death():
            super()._callCleanup(function, *args, **kwargs)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.stop_servers()

    @classmethod
    def stop_servers(cls) -> None:
        """Stops all that was launched. Raises AssertionError where something died that no test has reported."""
        if cls.supervisor is None:
            return
        supervisor, cls.supervisor = cls.supervisor, None
        atexit.unregister(cls.stop_servers)
        servers, cls._servers, cls._names = cls._servers, [], {}
        if servers:
            print(flush=True)  # ends unittest's line of dots
        with events.phase("teardown") if servers else contextlib.nullcontext():
            try:
                unreported_death = supervisor.stop()
                for server in reversed(servers):
                    server.ask_to_end()  # all at once: each may take seconds
                for server in reversed(servers):
                    server.stop()
                if hasattr(cls, "base_host"):  # the fixture's own setUpClass was reached
                    # Nothing is left for it to end or to wait for, and process ids may belong to others by now.
                    cls.process_lb = cls.process_decode = cls.process_prefill = None
                    with mock.patch.object(disaggregation_fixture, "time", SimpleNamespace(sleep=lambda _: None)):
                        super().tearDownClass()
            finally:
                for server in servers:
                    server.kill_all()
                supervisor.release_signals()
                if cls._port_lock:
                    cls._port_lock.close()
                    cls._port_lock = None
                deployments.remove(cls)
        assert not unreported_death, unreported_death


class PlannedServers(PDServers):
    """A prefill/decode pair that is launched as its attributes say.

    target          where it runs, see `pdkit.runner.targets`
    prefill_gpus, decode_gpus  indices of the GPUs that each server uses
    gpu_memory_gb   that each of them must have
    server_args     flags of both servers, in the words of the newest release
    backend         what carries the state over TCP; None: what the fixture chooses, with the NICs of this machine
    prompt_logprobs_are_fatal  set by `configure`: why logprobs of a prompt must not be asked for, or None
    """

    target = "8xH200"
    model_name: str
    gsm8k_data_path: str | None = None
    min_score = 0.95
    prefill_gpus: Sequence[int] = ()
    decode_gpus: Sequence[int] = ()
    gpu_memory_gb = 80
    server_args: Sequence[str] = ()
    backend: str | None = None
    monolithic_nccl_port: str | None = None
    prompt_logprobs_are_fatal: str | None

    @classmethod
    def setUpClass(cls) -> None:
        cls.configure()
        print(f"target={cls.target} engine={cls.engine} model={cls.model}", flush=True)
        cls.launch_all()
        cls.first_request()

    @classmethod
    def require_gpus(cls) -> None:
        """Raises SkipTest, in CI AssertionError, where the machine lacks the Hopper GPUs of the plan; prints why."""
        needed = len({*cls.prefill_gpus, *cls.decode_gpus})
        gpus = visible_gpus()
        suitable = [gpu for gpu in gpus if gpu.capability == (9, 0) and gpu.memory_mib >= 1000 * cls.gpu_memory_gb]
        if len(suitable) >= needed:
            return
        reason = (
            f"{cls.__name__} needs {needed} Hopper GPUs of {cls.gpu_memory_gb} GB ({cls.target}), found "
            f"{found(gpus)}; what this machine can run is `scripts/run.sh`"
        )
        if test_utils.is_in_ci():
            raise AssertionError(reason)
        print(reason, flush=True)
        raise unittest.SkipTest(reason)

    @classmethod
    def configure(cls) -> None:
        """Settles model, ports, transfer backend and NICs, so that `*_args()` can be read; starts nothing."""
        super().setUpClass()
        cls.model = test_utils.try_cached_model(cls.model_name)
        cls.prompt_logprobs_are_fatal = quirks.prompt_logprobs_are_fatal(cls.server_args)
        if cls.backend is not None:
            cls.transfer_backend, cls.rdma_devices = ["--disaggregation-transfer-backend", cls.backend], []

    @classmethod
    def prefill_args(cls) -> list[str]:
        own = cls.disaggregation_args("prefill", cls.prefill_gpus)
        return [*cls.server_args, *own, *cls.extra_prefill_args, *cls.rendezvous()]

    @classmethod
    def decode_args(cls) -> list[str]:
        first = ["--base-gpu-id", str(cls.decode_gpus[0])] if cls.decode_gpus else []
        own = cls.disaggregation_args("decode", cls.decode_gpus)
        return [*cls.server_args, *first, *own, *cls.extra_decode_args, *cls.rendezvous()]

    @classmethod
    def monolithic_args(cls) -> list[str]:
        """Of a server that the pair is compared with, see `pdkit.deployment.monolithic`."""
        assert cls.monolithic_nccl_port, f"{cls.__name__} has no monolithic server"
        return [*cls.server_args, "--nccl-port", cls.monolithic_nccl_port, *cls.rendezvous()]

    @classmethod
    def rendezvous(cls) -> list[str]:
        """Where the ranks of one more server meet, if that is to be said."""
        return []

    @classmethod
    def disaggregation_args(cls, side: str, gpus: Sequence[int]) -> list[str]:
        """What the fixture gives a `side` ("prefill" or "decode") that owns `gpus`."""
        nccl_port = getattr(cls, f"{side}_nccl_port")
        return [
            *("--disaggregation-mode", side, "--disaggregation-bootstrap-port", cls.bootstrap_port),
            *(("--nccl-port", nccl_port) if nccl_port else ()),
            *cls.transfer_backend,
            *cls.rdma_devices_for(gpus),
        ]

    @classmethod
    def take_references(cls) -> None:
        """What checks ask a monolithic server, where there is one; each overrides it."""

    @classmethod
    def start_prefill(cls) -> None:
        cls.process_prefill = cls.launch_server("prefill", cls.prefill_url, cls.prefill_args())

    @classmethod
    def start_decode(cls) -> None:
        cls.process_decode = cls.launch_server("decode", cls.decode_url, cls.decode_args())
