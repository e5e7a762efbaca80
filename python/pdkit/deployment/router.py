"""SGLang's routers over a prefill/decode pair: their command line, their readiness, and one beside the mini LB."""

import signal
from collections.abc import Iterable, Iterator, Sequence

import requests

from pdkit.core import ports
from pdkit.deployment.mixin import BeforePlannedServers
from pdkit.deployment.server import Server

KEEP_ALIVE_S = 120


def kept_alive(seconds: int = KEEP_ALIVE_S) -> dict[str, str]:
    """Environment of servers that close a connection which idles for so long; SGLang's default is 5 s.

    What the Rust router sends just when a server closes one is lost (docs/findings/router-loses-requests.md). So servers
    keep them longer than the router does, and than anything is frozen.
    """
    return {"SGLANG_TIMEOUT_KEEP_ALIVE": str(seconds)}


def router_command(
    prefill: Iterable[tuple[str, str]], decode: Iterable[str], host: str, port: int | str, *more: str
) -> list[str]:
    """Command line of a router in PD mode: the Rust one, or with "--mini-lb" the fixture's.

    prefill: (URL, bootstrap port) of each prefill server; decode: URL of each decode server; more: further flags.
    """
    command = ["python3", "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    for url, bootstrap_port in prefill:
        command += ["--prefill", url, str(bootstrap_port)]
    for url in decode:
        command += ["--decode", url]
    return [*command, "--host", host, "--port", str(port), *more]


def metrics_at(host: str, port: int | str) -> list[str]:
    """Flags without which the Rust router serves its metrics to the whole network, on one port for all of a machine."""
    return ["--prometheus-host", host, "--prometheus-port", str(port)]


class RustRouterBeside(BeforePlannedServers):
    """`router_url`: a Rust router over the prefill and decode server of the class; watched like the servers.

    Put it before a `PlannedServers`.
    """

    router_args: Sequence[str] = ("--policy", "round_robin")
    router_ready_seconds = 120
    router_url: str
    _free_ports: Iterator[int]

    @classmethod
    def configure(cls) -> None:
        super().configure()
        block = ports.claim()
        cls.addClassCleanup(block.release)
        cls._free_ports = iter(block.ports)
        cls.server_env = {**cls.server_env, **kept_alive()}
        cls.router_url = f"http://{cls.base_host}:{next(cls._free_ports)}"

    @classmethod
    def launch_router(cls, name: str, url: str, decode_url: str) -> Server:
        """Starts a router at `url` that knows our prefill server and `decode_url`; does not wait for it."""
        host, port = url.removeprefix("http://").split(":")
        prefill = [(cls.prefill_url, cls.bootstrap_port)]
        options = [*metrics_at(host, next(cls._free_ports)), "--log-level", "warn", *cls.router_args]
        command = router_command(prefill, [decode_url], host, port, *options)
        return cls.launch(name, command, cls.server_env, stop=signal.SIGKILL)

    @classmethod
    def launch_lb(cls) -> None:
        cls.launch_router("router", cls.router_url, cls.decode_url)
        super().launch_lb()
        cls.wait_server_ready(f"{cls.router_url}/readiness", cls.router_ready_seconds)


def healthy_workers(router_url: str) -> int:
    """How many servers a Rust router sends to; 0 while it has no pair."""
    try:
        return requests.get(f"{router_url}/readiness", timeout=10).json().get("healthy_workers", 0)
    except (requests.RequestException, ValueError):
        return 0


def is_ready(router_url: str) -> bool:
    """Whether a Rust router says that it has a prefill and a decode server. False also while it does not listen."""
    try:
        return requests.get(f"{router_url}/readiness", timeout=10).status_code == 200
    except requests.RequestException:
        return False
