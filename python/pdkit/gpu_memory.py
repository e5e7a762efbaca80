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


def wait_for_release(
    before: Sequence[Gpu], seconds: float = WAIT_S, observe: Callable[[], Sequence[Gpu]] = observe
) -> list[str]:
    """Waits until no GPU has more memory in use, beyond that of living processes; then, one line for each that has.

    before  the GPUs while everything that they named had its own memory
    """
    deadline = time.monotonic() + seconds
    while before:
        lines = [line for number, pair in enumerate(zip(before, observe())) if (line := _still_held(number, *pair))]
        if not lines or time.monotonic() >= deadline:
            return lines
        time.sleep(POLL_S)
    return []


def _still_held(number: int, before: Gpu, now: Gpu) -> str | None:
    living = [process for process in now.processes if is_alive(process)]
    more = _beyond(now, living) - _beyond(before, before.processes)
    if more <= SLACK_MIB:
        return None
    dead = [p for p in now.processes if p not in living]
    who = ", ".join(f"pid {p.pid} ({os.path.basename(p.name)}, {p.memory_mib} MiB)" for p in dead)
    return f"GPU {number}: {more} MiB more in use than before, by {who or 'no process that the driver names'}"


def _beyond(gpu: Gpu, processes: Sequence[GpuProcess]) -> int:
    """MiB in use that `processes` do not hold."""
    return gpu.memory_mib - gpu.free_mib - sum(process.memory_mib for process in processes)
