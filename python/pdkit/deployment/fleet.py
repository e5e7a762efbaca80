"""A deployment with several routers, or several servers of a kind, some of which a test ends on purpose."""

import os
import signal
from collections.abc import Callable

import psutil

from pdkit.core import events
from pdkit.core.processes import wait_until
from pdkit.deployment.mixin import BeforePlannedServers
from pdkit.deployment.router import kept_alive, metrics_at, router_command
from pdkit.deployment.server import Server

HARM_S = 20.0
ATTRIBUTES = {"prefill": "process_prefill", "decode": "process_decode", "load balancer": "process_lb"}  # SGLang's names


def processes_of(group: int) -> set[str]:
    """States, as psutil names them, of the processes of a group that have not ended."""
    states: set[str] = set()
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group:
                states.add(process.status())
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return states - {psutil.STATUS_ZOMBIE}


class Fleet(BeforePlannedServers):
    """Prefill, decode and load balancer of the `PlannedServers` that it stands before, and whatever else is launched.

    The load balancer is SGLang's mini LB, as in the fixture. Beside it runs the router that users run in production,
    told not to retry (it would send a request up to five times more, each time waiting for the server that lives) and
    to look after its workers each second instead of each minute.

    Seconds, all of them:
    router_timeout     after which a router gives a request up, streams included
    bootstrap_timeout  after which prefill gives up a request that no decode server asked for
    waiting_timeout    after which decode gives up a KV transfer that has not come
    slack              that a client waits longer than the router does
    settling           within which servers must have let go of everything, and routers know who lives
    returning          within which a restarted server must serve
    """

    router_timeout = 15
    bootstrap_timeout = 6
    waiting_timeout = 10
    slack = 5
    settling = 30
    returning = 300
    router_port: str = ""  # both are derived from the port of the load balancer, unless they are set
    router_metrics_port: str = ""
    router_url: str
    router_args = """
        --policy random --disable-retries
        --health-check-interval-secs 1 --health-check-timeout-secs 3
        --health-failure-threshold 2 --health-success-threshold 1 --cb-timeout-duration-secs 2
        --worker-startup-check-interval 1 --log-level warn
    """.split()

    @classmethod
    def prefills(cls) -> list[tuple[str, str]]:
        """(url, bootstrap port) of each prefill server that the routers know."""
        return [(cls.prefill_url, cls.bootstrap_port)]

    @classmethod
    def decodes(cls) -> list[str]:
        """The url of each decode server that the routers know."""
        return [cls.decode_url]

    @classmethod
    def routers(cls) -> dict[str, str]:
        """url by name."""
        return {"mini LB": cls.lb_url, "Rust router": cls.router_url}

    @classmethod
    def configure(cls) -> None:
        super().configure()
        for name, offset in (("router_port", 700), ("router_metrics_port", 800)):
            if not getattr(cls, name):
                setattr(cls, name, str(int(cls.lb_port) + offset))
        cls.router_url = f"http://{cls.base_host}:{cls.router_port}"
        cls.server_env = {
            **cls.server_env,
            "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(cls.bootstrap_timeout),
            "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(cls.waiting_timeout),
            **kept_alive(),
        }

    @classmethod
    def start_decode(cls) -> None:
        super().start_decode()
        metrics = metrics_at(cls.base_host, cls.router_metrics_port)
        cls.process_lb = cls._launch_router("load balancer", cls.lb_port, "--mini-lb")
        cls._launch_router("router", cls.router_port, *metrics, *cls.router_args)

    @classmethod
    def launch_lb(cls) -> None:
        """Both routers were started with the servers; the Rust one listens before it has heard of a pair."""
        cls.wait_server_ready(f"{cls.lb_url}/health")
        cls.wait_server_ready(f"{cls.router_url}/readiness")

    @classmethod
    def _launch_router(cls, name: str, port: str, *options: str) -> Server:
        timeout = ["--request-timeout-secs", str(cls.router_timeout)]
        command = router_command(cls.prefills(), cls.decodes(), cls.base_host, port, *timeout, *options)
        return cls.launch(name, command, cls.server_env, stop=signal.SIGKILL)

    @classmethod
    def names(cls) -> list[str]:
        """What was launched, in order: "prefill", "decode", "load balancer", "router", ..."""
        return cls.watching().names()

    @classmethod
    def process(cls, name: str) -> Server:
        """The process that has this name now: "prefill", "decode 2", "load balancer", "router"."""
        process = cls.watching().process(name)
        assert isinstance(process, Server), f"{cls.__name__} launched no {name}"
        return process

    @classmethod
    def end(cls, name: str) -> None:
        """SIGKILL for a whole server, whatever it consists of; that is not a death to report."""
        process = cls.process(name)
        pid = process.pid
        process.kill_all()
        process.wait()
        cls.require_harm(f"kill {name}", lambda: not processes_of(pid))

    @classmethod
    def freeze(cls, name: str) -> None:
        pid = cls.process(name).pid
        os.killpg(pid, signal.SIGSTOP)
        cls.require_harm(f"freeze {name}", lambda: processes_of(pid) <= {psutil.STATUS_STOPPED})

    @classmethod
    def thaw(cls, name: str) -> None:
        os.killpg(cls.process(name).pid, signal.SIGCONT)

    @classmethod
    def require_harm(cls, what: str, took_effect: Callable[[], bool]) -> None:
        """Raises AssertionError where harm that a test does took no effect: what follows would prove nothing."""
        done = wait_until(took_effect, HARM_S)
        events.harm(what, done, f"no effect within {HARM_S:g} s")
        assert done, f"{what}: no effect within {HARM_S:g} s, so nothing that follows is proved"

    @classmethod
    def start_again(cls, name: str) -> None:
        """A server that ended, by the same command on the same port; its log is a new one."""
        server = cls.launch(name, cls.process(name).command, cls.server_env)
        if name in ATTRIBUTES:
            setattr(cls, ATTRIBUTES[name], server)


class TwoPairs(Fleet):
    """Two prefill and two decode servers behind the same routers."""

    router_timeout = waiting_timeout = settling = 60
    bootstrap_timeout = 10

    prefill_2_port = decode_2_port = bootstrap_2_port = ""
    prefill_2_url: str
    decode_2_url: str

    @classmethod
    def configure(cls) -> None:
        super().configure()
        for name in ("prefill", "decode", "bootstrap"):
            if not getattr(cls, f"{name}_2_port"):
                setattr(cls, f"{name}_2_port", str(int(getattr(cls, f"{name}_port")) + 10))
        cls.prefill_2_url = f"http://{cls.base_host}:{cls.prefill_2_port}"
        cls.decode_2_url = f"http://{cls.base_host}:{cls.decode_2_port}"

    @classmethod
    def prefills(cls) -> list[tuple[str, str]]:
        return [*super().prefills(), (cls.prefill_2_url, cls.bootstrap_2_port)]

    @classmethod
    def decodes(cls) -> list[str]:
        return [*super().decodes(), cls.decode_2_url]

    @classmethod
    def prefill_2_args(cls) -> list[str]:
        return [cls.bootstrap_2_port if arg == cls.bootstrap_port else arg for arg in cls.prefill_args()]

    @classmethod
    def decode_2_args(cls) -> list[str]:
        return cls.decode_args()

    @classmethod
    def start_prefill(cls) -> None:
        super().start_prefill()
        cls.launch_server("prefill 2", cls.prefill_2_url, cls.prefill_2_args())

    @classmethod
    def start_decode(cls) -> None:
        super().start_decode()
        cls.launch_server("decode 2", cls.decode_2_url, cls.decode_2_args())

    @classmethod
    def launch_lb(cls) -> None:
        for url in (cls.prefill_2_url, cls.decode_2_url):
            cls.wait_server_ready(f"{url}/health")
        super().launch_lb()
