"""Whether the GPU memory of processes that were ended is free again, and who holds it if not.

What a living process holds is that process's affair, since ours have been ended by then: runs may share a GPU.
"""

import os
import time
from collections.abc import Callable, Sequence

import psutil

from pdkit import process_tree
from pdkit.environment_check import nvml
from pdkit.environment_check.machine import Gpu, GpuProcess

WAIT_S = 60.0
POLL_S = 1.0
SLACK_MIB = 512


def observe() -> tuple[Gpu, ...]:
    """All GPUs of the machine; none where there is no driver."""
    return nvml.observe({}).get("gpus", ())


def is_alive(process: GpuProcess) -> bool:
    """Whether `process` still runs, as far as this PID namespace tells."""
    try:
        return process_tree.is_alive(psutil.Process(process.pid))
    except psutil.NoSuchProcess:
        return False


def unaccounted(observe: Callable[[], Sequence[Gpu]] = observe) -> tuple[int, ...]:
    """MiB in use on each GPU that no living process holds: contexts, other containers, and what a run leaves."""
    return tuple(map(_unaccounted, observe()))


def _unaccounted(gpu: Gpu) -> int:
    return gpu.memory_mib - gpu.free_mib - sum(each.memory_mib for each in gpu.processes if is_alive(each))


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
    dead = (f"pid {p.pid} ({os.path.basename(p.name)}, {p.memory_mib} MiB)" for p in now.processes if not is_alive(p))
    who = ", ".join(dead) or "no process that the driver names"
    return f"GPU {number}: {more} MiB more in use than before, by {who}"
