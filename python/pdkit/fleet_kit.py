"""A mixin for tests that run more than one server of a kind, or several routers, and end some of them on purpose.

    class TestDisaggregationDSV4Recovery(RecoveryMixin, FleetMixin, TestDisaggregationDSV4Embedded): ...

It needs `launch_server`, `log_path` and `supervisor` of `TestDisaggregationDSV4`.
"""

import os
import signal
from collections import Counter

from pdkit.router_kit import kept_alive, metrics_at, router_command


class FleetMixin:
    """Prefill, decode and load balancer of the class that it stands before, and whatever else `fleet` names.

    The load balancer is SGLang's mini LB, as in the fixture. Beside it runs the router that users run in production,
    told not to retry (it would send a request up to five times more, each time waiting for the server that lives) and
    to look after its workers each second instead of each minute.

    Seconds, all of them:
    router_timeout     after which a router gives a request up, streams included
    bootstrap_timeout  after which prefill gives up a request that no decode server asked for
    waiting_timeout    after which decode gives up a hand-over that has not come
    slack              that a client waits longer than the router does
    settling           within which servers must have let go of everything, and routers know who lives
    returning          within which a restarted server must serve
    """

    fleet = None
    router_timeout = 15
    bootstrap_timeout = 6
    waiting_timeout = 10
    slack = 5
    settling = 30
    returning = 300
    router_port = router_metrics_port = None
    router_args = """
        --policy random --disable-retries
        --health-check-interval-secs 1 --health-check-timeout-secs 3
        --health-failure-threshold 2 --health-success-threshold 1 --cb-timeout-duration-secs 2
        --worker-startup-check-interval 1 --log-level warn
    """.split()

    _slots = {"prefill": "process_prefill", "decode": "process_decode", "load balancer": "process_lb"}

    @classmethod
    def prefills(cls):
        """(url, bootstrap port) of each prefill server that the routers know."""
        return [(cls.prefill_url, cls.bootstrap_port)]

    @classmethod
    def decodes(cls):
        """The url of each decode server that the routers know."""
        return [cls.decode_url]

    @classmethod
    def routers(cls):
        """url by name."""
        return {"mini LB": cls.lb_url, "Rust router": cls.router_url}

    @classmethod
    def configure(cls):
        super().configure()
        for name, offset in (("router_port", 700), ("router_metrics_port", 800)):
            if getattr(cls, name) is None:
                setattr(cls, name, str(int(cls.lb_port) + offset))
        cls.router_url = f"http://{cls.base_host}:{cls.router_port}"
        cls.server_env = {
            **cls.server_env,
            "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(cls.bootstrap_timeout),
            "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(cls.waiting_timeout),
            **kept_alive(),
        }

    @classmethod
    def start_prefill(cls):
        three, cls.fleet, cls._lives = cls.supervisor.processes, {}, Counter()
        cls.supervisor.processes = lambda: {**three(), **cls.fleet}
        super().start_prefill()

    @classmethod
    def start_decode(cls):
        super().start_decode()
        metrics = metrics_at(cls.base_host, cls.router_metrics_port)
        cls.process_lb = cls.start("load balancer", cls._router_command(cls.lb_port, "--mini-lb"))
        cls.fleet["router"] = cls.start("router", cls._router_command(cls.router_port, *metrics, *cls.router_args))

    @classmethod
    def launch_lb(cls):
        """Both routers were started with the servers; the Rust one listens before it has heard of a pair."""
        cls.wait_server_ready(f"{cls.lb_url}/health")
        cls.wait_server_ready(f"{cls.router_url}/readiness")

    @classmethod
    def _router_command(cls, port, *options):
        timeout = ["--request-timeout-secs", str(cls.router_timeout)]
        return router_command(cls.prefills(), cls.decodes(), cls.base_host, port, *timeout, *options)

    @classmethod
    def start(cls, name, command):
        return type(cls.process_prefill)(name, command, {**os.environ, **cls.server_env}, cls.log_path(name))

    @classmethod
    def process(cls, name):
        return getattr(cls, cls._slots[name]) if name in cls._slots else cls.fleet[name]

    @classmethod
    def end(cls, name):
        """SIGKILL for a whole server, whatever it consists of; nobody is to be alarmed."""
        process = cls.process(name)
        cls.supervisor.let_die(process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    @classmethod
    def freeze(cls, name):
        os.killpg(cls.process(name).pid, signal.SIGSTOP)

    @classmethod
    def thaw(cls, name):
        os.killpg(cls.process(name).pid, signal.SIGCONT)

    @classmethod
    def start_again(cls, name):
        """A server that ended, by the same command on the same port; its log is a new one."""
        cls._lives[name] += 1
        process = cls.start(f"{name} restart {cls._lives[name]}", cls.process(name).args)
        if name in cls._slots:
            setattr(cls, cls._slots[name], process)
        else:
            cls.fleet[name] = process

    @classmethod
    def tearDownClass(cls):
        try:
            super().tearDownClass()
        finally:
            from sglang.srt.utils import kill_process_tree

            fleet, cls.fleet = cls.fleet or {}, None
            for process in fleet.values():
                if process.poll() is None:
                    kill_process_tree(process.pid)
                    process.wait()
                process.kill_orphans()
