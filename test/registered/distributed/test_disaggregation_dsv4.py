"""DeepSeek-V4-Flash with prefill and decode on separate GPUs must still solve GSM8K.

A wrong hand-over of state leaves the model fluent and only makes its answers worse, so answers are what is scored.

    SGLANG_PD_MODEL    repository or directory to serve instead of sgl-project/DeepSeek-V4-Flash-FP8
    SGLANG_PD_GSM8K    GSM8K questions as a .jsonl file (default: run_eval downloads them)
    SGLANG_PD_LOG_DIR  where the servers' logs and the eval's transcript go (default: a new temporary directory)
    SGLANG_PD_PROGRESS_S  seconds between two lines that say how far the eval is (default: 15)
"""

import atexit
import contextlib
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections import Counter, deque
from http.client import HTTPConnection
from types import SimpleNamespace
from unittest import mock
from urllib.parse import urlparse

import sglang
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import kill_process_tree
from sglang.srt.utils.network import is_port_available
from sglang.test import simple_eval_common
from sglang.test.ci.ci_register import register_cuda_ci
from sglang.test.run_eval import run_eval
from sglang.test.server_fixtures import disaggregation_fixture
from sglang.test.server_fixtures.disaggregation_fixture import PDDisaggregationServerBase
from sglang.test.test_utils import DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH, is_in_ci, try_cached_model

try:
    from pdkit.core.events import emit
except ModuleNotFoundError:  # only SGLang is installed: what is printed is all there is

    def emit(kind, **fields):
        pass


register_cuda_ci(est_time=250, suite="stage-c-test-dsv4-8-gpu-h200")

CUDA_GRAPH_MAX_BS = (
    "--cuda-graph-max-bs-decode" if hasattr(ServerArgs, "cuda_graph_max_bs_decode") else "--cuda-graph-max-bs"
)
ANSWERS = re.compile(r"<p>(Correct|Extracted) Answer: (.*?)</p>")


class TestDisaggregationDSV4(PDDisaggregationServerBase):
    rung = "8xH200"
    engine = f"sglang {sglang.__version__}"
    server_module = "sglang.launch_server"

    model_name = os.getenv("SGLANG_PD_MODEL") or "sgl-project/DeepSeek-V4-Flash-FP8"
    gsm8k_data_path = os.getenv("SGLANG_PD_GSM8K") or None
    min_score = 0.95

    # With DP attention the 4 data-parallel ranks are carved out of the 4 tensor-parallel ones: 4 GPUs a server.
    prefill_gpus = range(0, 4)
    decode_gpus = range(4, 8)
    gpu_memory_gb = 141

    server_args = (
        """
        --trust-remote-code
        --tp 4 --dp 4 --enable-dp-attention
        --moe-a2a-backend deepep
        --deepep-config {"normal_dispatch":{"num_sms":96},"normal_combine":{"num_sms":96}}
        --max-running-requests 256
        --mem-fraction-static 0.7
        --speculative-algorithm EAGLE
        --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2
    """.split()
        + [CUDA_GRAPH_MAX_BS, "128"]
    )

    server_env = {
        "SGLANG_DSV4_FP4_EXPERTS": "0",
        "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256",
    }

    @classmethod
    def prefill_args(cls):
        return cls.server_args + cls.disaggregation_args("prefill", cls.prefill_gpus) + list(cls.extra_prefill_args)

    @classmethod
    def decode_args(cls):
        return (
            cls.server_args
            + ["--base-gpu-id", str(cls.decode_gpus[0])]
            + cls.disaggregation_args("decode", cls.decode_gpus)
            + list(cls.extra_decode_args)
        )

    def test_gsm8k(self):
        with phase("gsm8k"), Transcript(self.log_path("gsm8k", "jsonl")).open():
            metrics = run_eval(
                SimpleNamespace(
                    base_url=self.lb_url,
                    model=self.model,
                    eval_name="gsm8k",
                    api="completion",
                    max_tokens=512,
                    num_examples=200,
                    num_threads=128,
                    gsm8k_data_path=self.gsm8k_data_path,
                )
            )
        score = f"gsm8k={metrics['score']:.3f} examples=200 gate=>{self.min_score}"
        print(f"target={self.rung} engine={self.engine} {score}", flush=True)
        emit(
            "score", eval="gsm8k", score=metrics["score"], examples=200, gate=self.min_score, target=self.rung,
            engine=self.engine, throughput=metrics.get("output_throughput"),
        )  # fmt: skip
        with phase("gate"):
            self.assertGreater(metrics["score"], self.min_score)

    # From here on: how the plan above is started, watched and stopped.

    supervisor = None

    @classmethod
    def setUpClass(cls):
        require_gpus(cls)
        require_inputs(cls)
        cls.configure()
        cls.addClassCleanup(lock_ports(cls).close)
        require_free_ports(cls)
        print(f"rung={cls.rung} engine={cls.engine} model={cls.model}", flush=True)
        cls.launch_all()
        with phase("first request"), cls.failing_with_a_death():
            cls.first_request()

    @classmethod
    def configure(cls):
        """Settles model, ports, transfer backend and NICs, so that `*_args()` can be read; starts nothing."""
        super().setUpClass()
        cls.model = try_cached_model(cls.model_name)

    @classmethod
    def disaggregation_args(cls, side, gpus):
        """What the fixture of the installed release gives a `side` ("prefill" or "decode") that owns `gpus`."""
        nccl_port = getattr(cls, f"{side}_nccl_port", None)  # pinned from 0.5.18 on
        nics = cls.rdma_devices_for(gpus) if hasattr(cls, "rdma_devices_for") else cls.rdma_devices  # from 0.5.21 on
        return [
            *("--disaggregation-mode", side, "--disaggregation-bootstrap-port", cls.bootstrap_port),
            *(("--nccl-port", nccl_port) if nccl_port else ()),
            *cls.transfer_backend,
            *nics,
        ]

    @classmethod
    def launch_all(cls):
        cls.log_dir = os.getenv("SGLANG_PD_LOG_DIR") or tempfile.mkdtemp(prefix=f"{cls.rung}-")
        os.makedirs(cls.log_dir, exist_ok=True)
        cls.supervisor = Supervisor(
            lambda: {"prefill": cls.process_prefill, "decode": cls.process_decode, "load balancer": cls.process_lb}
        )
        atexit.register(cls.tearDownClass)
        # The fixture starts `python3` from PATH: let it be this one.
        os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        with phase("launch prefill"):  # decode loads at the same time; its own phase is how much longer it takes
            cls.start_prefill()
            cls.start_decode()
            cls.wait_server_ready(f"{cls.prefill_url}/health")
        with phase("launch decode"):
            cls.wait_server_ready(f"{cls.decode_url}/health")
        with phase("start load balancer"):
            cls.launch_lb()

    @classmethod
    def start_prefill(cls):
        cls.process_prefill = cls.launch_server("prefill", cls.prefill_url, cls.prefill_args())

    @classmethod
    def start_decode(cls):
        cls.process_decode = cls.launch_server("decode", cls.decode_url, cls.decode_args())

    @classmethod
    def launch_server(cls, name, url, args):
        address = urlparse(url)
        command = ["python3", "-m", cls.server_module, "--model-path", cls.model, *args]
        command += ["--host", address.hostname, "--port", str(address.port)]
        return cls.launch(name, command)

    @classmethod
    def launch(cls, name, command):
        return Server(name, command, {**os.environ, **cls.server_env}, cls.log_path(name))

    @classmethod
    def log_path(cls, name, kind="log"):
        return os.path.join(cls.log_dir, f"{cls.__name__}.{name.replace(' ', '_')}.{kind}")

    @classmethod
    def launch_lb(cls):
        with mock.patch.object(disaggregation_fixture, "popen_with_error_check", cls.start_lb):
            super().launch_lb()

    @classmethod
    def start_lb(cls, command):
        """Starts the load balancer that the fixture of the installed release composed."""
        return Server("load balancer", command, None, cls.log_path("load balancer"))

    @classmethod
    def first_request(cls):
        """One completion through all three: who cannot answer at all fails by this, not by a low score."""
        body = {"model": cls.model, "prompt": "Question: What is 1 + 1?\nAnswer:", "max_tokens": 16, "temperature": 0}
        connection = HTTPConnection(urlparse(cls.lb_url).netloc, timeout=DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read().decode(errors="replace")
        assert response.status == 200, f"first request: {cls.lb_url} answered {response.status}: {answer[:1000]}"
        print(f"first answer: {json.loads(answer)['choices'][0]['text']!r}", flush=True)

    @classmethod
    def wait_server_ready(cls, url, timeout=DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH, process=None):
        # `process` is left to the supervisor, which watches all of them and names the one that dies.
        with cls.failing_with_a_death():
            super().wait_server_ready(url, timeout)

    @classmethod
    @contextlib.contextmanager
    def failing_with_a_death(cls):
        try:
            with cls.supervisor.interrupting():
                yield
        except ServerDied as death:
            raise AssertionError(str(death)) from None  # unittest cleans up after an Exception only

    def _callTestMethod(self, method):
        with self.supervisor.interrupting():
            super()._callTestMethod(method)

    @classmethod
    def tearDownClass(cls):
        if cls.supervisor is None:
            return
        supervisor, cls.supervisor = cls.supervisor, None
        atexit.unregister(cls.tearDownClass)
        print(flush=True)  # ends unittest's line of dots
        with phase("teardown"):
            try:
                unreported_death = supervisor.stop()
                super().tearDownClass()
            finally:
                for process in filter(None, (cls.process_lb, cls.process_decode, cls.process_prefill)):
                    if process.poll() is None:
                        kill_process_tree(process.pid)
                        process.wait()
                    if isinstance(process, Server):
                        process.kill_orphans()
        assert not unreported_death, unreported_death


class ServerDied(BaseException):
    """A watched process exited. No Exception, so that neither an eval client nor a retry can swallow it."""


class Server(subprocess.Popen):
    """A server in its own session; its output goes to a log file and, prefixed with its name, to the console."""

    def __init__(self, name, command, env, log_path):
        print(f"[{name}] {shlex.join(command)}\n[{name}] log: {log_path}", flush=True)
        self.log_path = log_path
        super().__init__(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        emit("launch", name=name, command=shlex.join(command), log=log_path, pid=self.pid)
        self.ended_at = math.inf
        self._copier = threading.Thread(target=self._copy_output, args=(name,), daemon=True)
        self._copier.start()
        threading.Thread(target=self._note_end, daemon=True).start()

    def _copy_output(self, name):
        with self.stdout, open(self.log_path, "w", encoding="utf-8") as log:
            for line in self.stdout:
                log.write(line)
                log.flush()
                with contextlib.suppress(OSError, ValueError):  # a console that is gone must not block the server
                    print(f"[{name}] {line}", end="", flush=True)

    def _note_end(self):
        self.wait()
        self.ended_at = time.monotonic()

    def kill_orphans(self):
        """Kills what a server that was waited for left running in its process group."""
        try:
            os.kill(self.pid, 0)  # a process id is not given away while a group of that id has members
        except ProcessLookupError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def obituary(self, lines=40):
        """The last `lines` lines of the log of a server that exited."""
        self.kill_orphans()
        self._copier.join(timeout=0.5)
        with open(self.log_path, encoding="utf-8") as log:
            return f"last lines of {self.log_path}:\n" + "".join(deque(log, maxlen=lines))


class Supervisor:
    """Watches processes until `stop()`; the first to exit raises ServerDied in the main thread, where that is allowed.

    `processes()` returns those to watch, name -> Popen or None. SIGUSR1 wakes the main thread, and SIGTERM acts
    like Ctrl-C, so that a run that is told to end takes its servers with it.
    """

    def __init__(self, processes):
        self.processes = processes
        self.death = None
        self._reported = False
        self._armed = False
        self._let_die = set()
        self._stopped = threading.Event()
        self._previous_handlers = {
            signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._interrupt),
            signal.SIGTERM: signal.signal(signal.SIGTERM, signal.default_int_handler),
        }
        self._thread = threading.Thread(target=self._watch, name="pd-supervisor", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def interrupting(self):
        """Within it a death raises ServerDied at once; an error that a death explains is replaced by it."""
        self._armed = True
        try:
            self._check()
            yield
        except Exception:
            self._check()
            raise
        finally:
            self._armed = False

    def let_die(self, process):
        """`process` is about to be ended on purpose: that is no death."""
        self._let_die.add(process)

    def stop(self):
        """Ends the watch; returns what nobody was told yet: a death since the last test, or None."""
        self._stopped.set()
        self._thread.join()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        return None if self._reported else self._find_death()

    def _watch(self):
        while not self._stopped.wait(timeout=0.25):
            if self._find_death():
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
                return

    def _find_death(self):
        watched = {name: process for name, process in self.processes().items() if process is not None}
        ended = [each for each in watched.items() if each[1].poll() is not None and each[1] not in self._let_die]
        if ended and not self.death:
            name, process = min(ended, key=lambda each: getattr(each[1], "ended_at", math.inf))
            code = process.returncode
            self.death = f"{name} exited with code {code}" + (f" ({signal.strsignal(-code)})" if code < 0 else "")
            print(f"[supervisor] {self.death}", file=sys.stderr, flush=True)
            cause, log = self.death, getattr(process, "log_path", None)
            excerpt = process.obituary() if isinstance(process, Server) else "its output is above"
            emit("death", name=name, cause=cause, excerpt=excerpt, log=log)
            self.death = f"{cause}; {excerpt}"
        return self.death

    def _check(self):
        if self._find_death():
            self._interrupt()

    def _interrupt(self, *_):
        if self._armed:
            self._reported = True
            raise ServerDied(self.death)


class Transcript:
    """While open, each example that `run_eval` scores becomes a line of JSON at `path`; prints how far it is.

    All releases hand their examples to `simple_eval_common.map_with_progress`, and their prompts to the OpenAI client.
    """

    def __init__(self, path):
        self.path = path
        self.scores = []
        self._seconds_between_lines = float(os.getenv("SGLANG_PD_PROGRESS_S") or 15)
        self._printed_at = time.monotonic()
        self._lock = threading.Lock()
        self._request = threading.local()

    @contextlib.contextmanager
    def open(self):
        completions = simple_eval_common.openai.resources.Completions
        create, map_with_progress = completions.create, simple_eval_common.map_with_progress

        def create_and_count(*args, **kwargs):
            completion = create(*args, **kwargs)
            self._request.tokens = completion.usage and completion.usage.completion_tokens
            return completion

        def map_and_keep(score, examples, num_threads):
            total = len(examples)
            return map_with_progress(lambda example: self._keep(example, score, total), examples, num_threads)

        with (
            open(self.path, "w", encoding="utf-8") as self._file,
            mock.patch.object(completions, "create", create_and_count),
            mock.patch.object(simple_eval_common, "map_with_progress", map_and_keep),
        ):
            yield self

    def _keep(self, example, score, total):
        self._request.tokens, start = None, time.monotonic()
        result = score(example)
        seconds = time.monotonic() - start
        *prompt, answer = (message["content"] for message in result.convo)
        line = {"example": example, "score": result.score, "seconds": round(seconds, 3)}
        line |= {"completion_tokens": self._request.tokens, "prompt": "\n".join(prompt), "answer": answer}
        line |= {f"{kind.lower()}_answer": value for kind, value in ANSWERS.findall(result.html or "")}
        with self._lock:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self.scores.append(result.score)
            if time.monotonic() - self._printed_at >= self._seconds_between_lines:
                self._printed_at, done = time.monotonic(), len(self.scores)
                print(f"\n[progress] {done}/{total}, score so far {sum(self.scores) / done:.3f}", flush=True)
                emit("progress", done=done, total=total, score=sum(self.scores) / done)
        return result


@contextlib.contextmanager
def phase(name):
    """Prints that a phase of the run begins, how long it took, and whether it failed."""
    print(f"[phase] {name} begins", flush=True)
    emit("phase", name=name, state="begins")
    start, state = time.monotonic(), "failed"
    try:
        yield
        state = "passed"
    finally:
        seconds = time.monotonic() - start
        emit("phase", name=name, state=state, seconds=round(seconds, 3))
        print(f"[phase] {name}{' failed' * (state == 'failed')}: {seconds:.1f} s", flush=True)


def require_gpus(plan):
    """Raises SkipTest, in CI AssertionError, where the machine lacks the Hopper GPUs of the plan; prints why."""
    needed = len({*plan.prefill_gpus, *plan.decode_gpus})
    gpus = visible_gpus()
    suitable = [gpu for gpu in gpus if gpu.compute_capability == "9.0" and gpu.memory_mib >= 1000 * plan.gpu_memory_gb]
    if len(suitable) >= needed:
        return
    found = ", ".join(f"{n} {name}" for name, n in Counter(gpu.name for gpu in gpus).items()) or "no NVIDIA GPU"
    reason = (
        f"{plan.__name__} needs {needed} Hopper GPUs of {plan.gpu_memory_gb} GB ({plan.rung}), found {found}; "
        "the same test runs here as `scripts/run.sh` or `python3 test/run_suite.py --hw cpu --suite stage-a-test-cpu`"
    )
    if is_in_ci():
        raise AssertionError(reason)
    print(reason, flush=True)
    raise unittest.SkipTest(reason)


def visible_gpus():
    """The GPUs that `CUDA_VISIBLE_DEVICES` leaves to this process, without a CUDA context on any of them."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    if visible := os.getenv("CUDA_VISIBLE_DEVICES"):
        command += ["--id", visible]
    try:
        table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    rows = [row.split(", ") for row in table.splitlines()]
    return [
        SimpleNamespace(name=row[0], memory_mib=int(row[1]), compute_capability=row[2])
        for row in rows
        if len(row) == 3 and row[1].isdecimal()
    ]


def require_inputs(plan):
    """Fails before anything is launched where a model directory or GSM8K file that was named cannot be used."""
    model, questions = plan.model_name, plan.gsm8k_data_path
    assert os.path.isdir(model) or not os.path.isabs(model), f"model {model}: no such directory (SGLANG_PD_MODEL?)"
    if questions is not None:
        assert os.path.isfile(questions), f"GSM8K questions {questions}: no such file (SGLANG_PD_GSM8K?)"
        with open(questions, encoding="utf-8") as lines:
            count = sum(1 for _ in lines)
        assert count >= 205, f"GSM8K questions {questions}: {count}, but 5 shots and 200 to score are needed"


def lock_ports(plan):
    """A lock on the plan's ports, derived ones included: a check alone lets two runs pass that start at once.

    An abstract Unix address (unix(7)) has the scope of the ports, and is free again when its holder dies.
    """
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0sglang-pd-ports-{plan.lb_port}")
    except OSError:
        lock.close()
        raise AssertionError(f"another run on this machine has the ports from {plan.lb_port} on; wait for it") from None
    return lock


def require_free_ports(plan):
    """A stranger that answers on one of our ports must not be taken for our server."""
    ports = {name: int(getattr(plan, name)) for name in dir(plan) if name.endswith("_port")}
    taken = [f"{port} ({name})" for name, port in ports.items() if not is_port_available(port)]
    assert not taken, f"in use: port {', '.join(taken)}; is another run on? `ss -ltnp` names it"


if __name__ == "__main__":
    unittest.main()
