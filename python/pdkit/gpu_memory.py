"""Whether the GPU memory of processes that were ended is free again, and who holds it if not."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from pdkit.environment_check import nvml
from pdkit.environment_check.machine import Gpu

WAIT_S = 60.0
POLL_S = 1.0
SLACK_MIB = 512


def observe() -> tuple[Gpu, ...]:
    """All GPUs of the machine; none where there is no driver."""
    return nvml.observe({}).get("gpus", ())


def without(gpus: Sequence[Gpu], pids: set[int]) -> tuple[Gpu, ...]:
    """What `gpus` would look like had the processes `pids` no memory on them."""

    def less(gpu: Gpu) -> Gpu:
        freed = sum(process.memory_mib for process in gpu.processes if process.pid in pids)
        others = tuple(process for process in gpu.processes if process.pid not in pids)
        return replace(gpu, free_mib=gpu.free_mib + freed, processes=others)

    return tuple(map(less, gpus))


def wait_for_release(
    expected: Sequence[Gpu], seconds: float = WAIT_S, observe: Callable[[], Sequence[Gpu]] = observe
) -> list[str]:
    """Waits until each GPU has about as much free memory as `expected`; then, one line for each that has not."""
    deadline = time.monotonic() + seconds
    while expected:
        lines = [line for number, pair in enumerate(zip(expected, observe())) if (line := _still_held(number, *pair))]
        if not lines or time.monotonic() >= deadline:
            return lines
        time.sleep(POLL_S)
    return []


def _still_held(number: int, expected: Gpu, now: Gpu) -> str | None:
    more = expected.free_mib - now.free_mib
    if more <= SLACK_MIB:
        return None
    known = {process.pid for process in expected.processes}
    new = [f"pid {p.pid} ({os.path.basename(p.name)}, {p.memory_mib} MiB)" for p in now.processes if p.pid not in known]
    who = ", ".join(new) or "no process that the driver names"
    return f"GPU {number}: {more} MiB more in use than before, by {who}"
