"""Ports for servers that a test starts, so that several runs fit on one machine."""

import random
import socket
from dataclasses import dataclass

BLOCK_SIZE = 10
BLOCKS = range(22000, 32000, BLOCK_SIZE)  # below the ephemeral ports (32768), clear of SGLang's fixtures (21000-21500)


@dataclass(frozen=True)
class PortBlock:
    """Consecutive free TCP ports; no other run claims them while `guard`, which holds the first, is open."""

    guard: socket.socket
    ports: range

    def release(self):
        self.guard.close()


def claim(host="127.0.0.1"):
    """A block of BLOCK_SIZE - 1 ports that nobody listens on. Raises RuntimeError when there is none."""
    for base in random.sample(BLOCKS, len(BLOCKS)):
        try:
            guard = socket.create_server((host, base))
        except OSError:
            continue
        ports = range(base + 1, base + BLOCK_SIZE)
        if all(is_free(port, host) for port in ports):
            return PortBlock(guard, ports)
        guard.close()
    raise RuntimeError(f"no {BLOCK_SIZE} free ports in a row on {host} between {BLOCKS.start} and {BLOCKS.stop}")


def is_free(port, host="127.0.0.1"):
    """Whether nobody listens on a TCP port."""
    try:
        socket.create_server((host, port)).close()
    except OSError:
        return False
    return True
