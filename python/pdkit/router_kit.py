"""A mixin that launches SGLang's Rust router beside the mini LB, in front of the same servers.

Put it before a subclass of `TestDisaggregationDSV4`, whose `launch` and `supervisor` it uses.
"""

import requests

from pdkit import ports

STOP_TIMEOUT = 60
KEEP_ALIVE_S = 120


def kept_alive(seconds=KEEP_ALIVE_S):
    """Environment of servers that close a connection which idles for so long; SGLang's default is 5 s.

    The Rust router sends on connections that idle, and closes them itself after 90 s. What it sends just when a server
    closes one, or to a server that is frozen meanwhile, is lost, and the other server of the pair waits for it. So
    servers keep them longer than the router, and than anything is frozen; `scripts/router_idle.py` shows the loss.
    """
    return {"SGLANG_TIMEOUT_KEEP_ALIVE": str(seconds)}


def router_command(prefill, decode, host, port, *more):
    """Command line of a router in PD mode: the Rust one, or with "--mini-lb" the fixture's.

    prefill: (URL, bootstrap port) of each prefill server; decode: URL of each decode server; more: further flags.
    """
    command = ["python3", "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    for url, bootstrap_port in prefill:
        command += ["--prefill", url, str(bootstrap_port)]
    for url in decode:
        command += ["--decode", url]
    return [*command, "--host", host, "--port", str(port), *more]


def metrics_at(host, port):
    """Flags without which the Rust router serves its metrics to the whole network, on one port for all of a machine."""
    return ["--prometheus-host", host, "--prometheus-port", str(port)]


class RustRouterBesideMixin:
    """`router_url`: a Rust router over the prefill and decode server of the class; watched like the servers."""

    router_args = ("--policy", "round_robin")
    router_ready_seconds = 120
    _routers = None

    @classmethod
    def configure(cls):
        super().configure()
        block = ports.claim()
        cls.addClassCleanup(block.release)
        cls._free_ports = iter(block.ports)
        cls._routers = {}
        cls.server_env = {**cls.server_env, **kept_alive()}
        cls.router_url = f"http://{cls.base_host}:{next(cls._free_ports)}"

    @classmethod
    def launch_router(cls, name, url, decode_url):
        """Starts a router at `url` that knows our prefill server and `decode_url`; does not wait for it."""
        host, port = url.removeprefix("http://").split(":")
        prefill = [(cls.prefill_url, cls.bootstrap_port)]
        options = [*metrics_at(host, next(cls._free_ports)), "--log-level", "warn", *cls.router_args]
        command = router_command(prefill, [decode_url], host, port, *options)
        watched = cls.supervisor.processes
        process = cls._routers[name] = cls.launch(name, command)
        cls.supervisor.processes = lambda: {**watched(), name: process}

    @classmethod
    def launch_lb(cls):
        cls.launch_router("router", cls.router_url, cls.decode_url)
        super().launch_lb()
        cls.wait_server_ready(f"{cls.router_url}/readiness", cls.router_ready_seconds)

    @classmethod
    def tearDownClass(cls):
        from sglang.srt.utils import kill_process_tree

        try:
            super().tearDownClass()
        finally:
            routers, cls._routers = cls._routers or {}, None
            for process in routers.values():
                if process.poll() is None:
                    kill_process_tree(process.pid)
                    process.wait(STOP_TIMEOUT)


def healthy_workers(router_url, timeout=10):
    """How many servers a Rust router sends to; 0 while it has no pair."""
    try:
        return requests.get(f"{router_url}/readiness", timeout=timeout).json().get("healthy_workers", 0)
    except (requests.RequestException, ValueError):
        return 0


def is_ready(router_url, timeout=10):
    """Whether a Rust router says that it has a prefill and a decode server. False also while it does not listen."""
    try:
        return requests.get(f"{router_url}/readiness", timeout=timeout).status_code == 200
    except requests.RequestException:
        return False
