"""Ports for servers that a test starts, so that several runs fit on one machine."""

import errno
import random
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from pdkit.core import processes

BLOCK_SIZE = 10
CONNECT_S = 30.0  # of a connection within this machine
# Below the ephemeral ports (32768), and clear of SGLang's fixtures, which use N000 to N599 (N by CUDA_VISIBLE_DEVICES).
BLOCKS = [base for base in range(22000, 32000, BLOCK_SIZE) if base % 1000 >= 600]


class AddressMissing(RuntimeError):
    """This machine does not have the address where servers are to listen, as without IPv4 on the loopback device."""

    remedy = "ip link set lo up; ip addr add 127.0.0.1/8 dev lo"


@dataclass(frozen=True)
class PortBlock:
    """Consecutive free TCP ports; no other run claims them while `guard`, which holds the first, is open."""

    guard: socket.socket
    ports: range

    def release(self) -> None:
        self.guard.close()


def claim(host: str = "127.0.0.1") -> PortBlock:
    """A block of BLOCK_SIZE - 1 ports that nobody listens on. Raises RuntimeError when there is none, AddressMissing."""
    for base in random.sample(BLOCKS, len(BLOCKS)):
        try:
            guard = socket.create_server((host, base))
        except OSError as error:
            _require_address(error, host)
            continue
        _require_connection(guard, host)
        ports = range(base + 1, base + BLOCK_SIZE)
        if all(is_free(port, host) for port in ports):
            return PortBlock(guard, ports)
        guard.close()
    raise RuntimeError(f"no {BLOCK_SIZE} free ports in a row on {host} from {BLOCKS[0]} to {BLOCKS[-1]}")


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether nobody listens on a TCP port. Raises AddressMissing."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        _require_address(error, host)
        return False
    return True


def _require_connection(guard: socket.socket, host: str) -> None:
    """Raises AddressMissing where nobody can connect to what listens: some systems let servers listen all the same."""
    try:
        socket.create_connection(guard.getsockname(), timeout=CONNECT_S).close()
    except OSError as error:
        guard.close()
        raise AddressMissing(f"{host} is missing, no server can listen there ({error.strerror or error})") from None


def _require_address(error: OSError, host: str) -> None:
    """Raises AddressMissing where it is that."""
    if error.errno == errno.EADDRNOTAVAIL:
        raise AddressMissing(f"{host} is missing, no server can listen there")


def wait_until_free(ports: Iterable[int], seconds: float) -> list[str]:
    """Waits until nobody listens on these TCP ports, on any address; then, one line for each that is still taken."""
    wanted = set(ports)
    taken: dict[int, int | None] = {}

    def are_free() -> bool:
        taken.clear()
        taken.update((port, pid) for port, pid in listeners() if port in wanted)
        return not taken

    if wanted:
        processes.wait_until(are_free, seconds)
    return [
        f"port {port} is still taken, by {processes.describe_pid(pid) if pid else 'a process we cannot see'}"
        for port, pid in sorted(taken.items())
    ]


def listeners() -> list[tuple[int, int | None]]:
    """TCP ports that are listened on, with the process id, where we may see it."""
    found = psutil.net_connections(kind="tcp")
    return [(each.laddr.port, each.pid) for each in found if each.laddr and each.status == psutil.CONN_LISTEN]
