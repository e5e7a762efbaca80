"""Whether the GPU memory of processes that were ended is free again, and who holds it if not.

What a living process holds is that process's affair, since ours have been ended by then: runs may share a GPU.
"""

import os
import time
from collections.abc import Callable, Sequence

from pdkit.core import gpus, processes
from pdkit.core.gpus import Gpu

WAIT_S = 60.0
POLL_S = 1.0
SLACK_MIB = 512


def observe() -> tuple[Gpu, ...]:
    """All GPUs of the machine; none where there is no driver."""
    return gpus.observe({}).get("gpus", ())


def unaccounted(observe: Callable[[], Sequence[Gpu]] = observe) -> tuple[int, ...]:
    """MiB in use on each GPU that no living process holds: contexts, other containers, and what a run leaves."""
    return tuple(map(_unaccounted, observe()))


def _unaccounted(gpu: Gpu) -> int:
    held = sum(each.memory_mib for each in gpu.processes if processes.is_pid_alive(each.pid))
    return gpu.memory_mib - gpu.free_mib - held


def wait_for_release(
    before: Sequence[int], seconds: float = WAIT_S, observe: Callable[[], Sequence[Gpu]] = observe
) -> list[str]:
    """Waits until no GPU has more `unaccounted` memory than `before`; then, one line for each that has."""
    deadline = time.monotonic() + seconds
    while before:
        lines = [line for number, pair in enumerate(zip(before, observe())) if (line := _still_held(number, *pair))]
        if not lines or time.monotonic() >= deadline:
            return lines
        time.sleep(POLL_S)
    return []


def _still_held(number: int, before: int, now: Gpu) -> str | None:
    more = _unaccounted(now) - before
    if more <= SLACK_MIB:
        return None
    dead = [each for each in now.processes if not processes.is_pid_alive(each.pid)]
    named = (f"pid {each.pid} ({os.path.basename(each.name)}, {each.memory_mib} MiB)" for each in dead)
    who = ", ".join(named) or "no process that the driver names"
    return f"GPU {number}: {more} MiB more in use than before, by {who}"
