"""Ports of a deployment: claimed for a class, locked against other runs, and free before anything starts."""

import socket
from typing import TYPE_CHECKING

from pdkit.core import ports
from pdkit.deployment.mixin import BeforePlannedServers

if TYPE_CHECKING:
    from pdkit.deployment.fixture import PDServers


def lock(test: "type[PDServers]") -> socket.socket:
    """A lock on the ports of a test class, derived ones included: a check alone lets two runs pass that start at once.

    An abstract Unix address (unix(7)) has the scope of the ports, and is free again when its holder dies.
    Raises AssertionError where another run holds it.
    """
    found = socket.socket(socket.AF_UNIX)
    try:
        found.bind(f"\0sglang-pd-ports-{test.lb_port}")
    except OSError:
        found.close()
        raise AssertionError(f"another run on this machine has the ports from {test.lb_port} on; wait for it") from None
    return found


def require_free(test: "type[PDServers]") -> None:
    """Another process that answers on one of our ports would be mistaken for our server. Raises AssertionError."""
    wanted = {name: int(port) for name in dir(test) if name.endswith("_port") and (port := getattr(test, name))}
    taken = [f"{port} ({name})" for name, port in wanted.items() if not ports.is_free(port)]
    assert not taken, f"in use: port {', '.join(taken)}; is another run on? `ss -ltnp` names it"


class ClaimedPorts(BeforePlannedServers):
    """Every attribute `*_port` of the class is a port that nobody else uses, so that several runs fit on one machine.

    The URLs follow. Put it before a `PlannedServers`.
    """

    prefill_nccl_port = decode_nccl_port = None  # fixtures before 0.5.18 have none, and leave NCCL's to chance

    @classmethod
    def configure(cls) -> None:
        super().configure()
        free: list[int] = []
        for name in [name for name in dir(cls) if name.endswith("_port")]:
            if not free:
                block = ports.claim()
                cls.addClassCleanup(block.release)
                free = list(block.ports)
            setattr(cls, name, str(free.pop(0)))
        cls.prefill_url = f"http://{cls.base_host}:{cls.prefill_port}"
        cls.decode_url = f"http://{cls.base_host}:{cls.decode_port}"
        cls.base_url = cls.lb_url = f"http://{cls.base_host}:{cls.lb_port}"


class ClaimedRendezvous(ClaimedPorts):
    """For DP attention: a server then listens on the ports that follow the one of --dist-init-addr, too.

    Unset, that is its own port + 233 (`ZMQ_TCP_PORT_DELTA`), where another run may have its servers.
    """

    @classmethod
    def rendezvous(cls) -> list[str]:
        block = ports.claim()
        cls.addClassCleanup(block.release)
        return ["--dist-init-addr", f"127.0.0.1:{block.ports[0]}"]
