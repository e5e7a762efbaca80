"""The GPUs that CUDA would show, by NVML: no CUDA context is made, and nothing on them is touched."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

MIB = 2**20
VISIBLE = "CUDA_VISIBLE_DEVICES"


class NoDriver(Exception):
    """There is no NVIDIA driver; the message is one line."""


@contextmanager
def visible_handles(environ: Mapping[str, str]) -> Iterator[list[Any]]:
    """NVML handles of the GPUs that CUDA_VISIBLE_DEVICES leaves, in CUDA's order. Raises NoDriver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoDriver(f"no NVIDIA driver ({error})") from None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
        yield [handles[i] for i in visible_indices(len(handles), uuids, environ.get(VISIBLE))]
    finally:
        pynvml.nvmlShutdown()


def visible_indices(count: int, uuids: Sequence[str], cuda_visible_devices: str | None) -> list[int]:
    """Indices of the devices that CUDA would show, in its order; its list ends at the first entry that names none."""
    if cuda_visible_devices is None:
        return list(range(count))
    indices = []
    for entry in cuda_visible_devices.split(","):
        entry = entry.strip()
        by_uuid = [i for i, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        if entry.isdecimal() and int(entry) < count:
            indices.append(int(entry))
        elif len(by_uuid) == 1:
            indices.append(by_uuid[0])
        else:
            break
    return indices


@dataclass(frozen=True)
class GpuProcess:
    """A process that has memory on a GPU; `memory_mib` is 0 where the driver does not say."""

    pid: int
    name: str
    memory_mib: int


@dataclass(frozen=True)
class Gpu:
    """One GPU by NVML: memory in MiB, compute capability as (major, minor); `processes` only where it was asked for."""

    name: str
    memory_mib: int
    capability: tuple[int, int]
    free_mib: int = 0
    processes: tuple[GpuProcess, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}, {self.memory_mib / 1024:.0f} GiB"


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves of those that NVML finds, without their processes; none where there is
    no NVIDIA driver.
    """
    try:
        with visible_handles(environ) as handles:
            return tuple(map(_gpu, handles))
    except NoDriver:
        return ()


def found(gpus: Sequence[Gpu]) -> str:
    """What the machine has, in a few words: `no GPU`, `2 GPUs (NVIDIA H200, 140 GiB)`."""
    if not gpus:
        return "no GPU"
    kinds = sorted(set(map(str, gpus)))
    return f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''} ({'; '.join(kinds)})"


def observe(environ: Mapping[str, str]) -> dict[str, Any]:
    """What NVML knows: `gpus` with their processes, `gpu_problem` where there is none, `driver` and `driver_cuda`."""
    import pynvml

    try:
        with visible_handles(environ) as handles:
            cuda, count = pynvml.nvmlSystemGetCudaDriverVersion_v2(), pynvml.nvmlDeviceGetCount()
            why = f"CUDA_VISIBLE_DEVICES={environ.get(VISIBLE)} hides all {count}" if count else "the driver finds none"
            return {
                "gpus": tuple(replace(_gpu(handle), processes=_processes(handle)) for handle in handles),
                "gpu_problem": None if handles else why,
                "driver": pynvml.nvmlSystemGetDriverVersion(),
                "driver_cuda": (cuda // 1000, cuda % 1000 // 10),
            }
    except NoDriver as problem:
        return {"gpu_problem": str(problem)}


def _gpu(handle: Any) -> Gpu:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        name=pynvml.nvmlDeviceGetName(handle),
        memory_mib=memory.total // MIB,
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        free_mib=memory.free // MIB,
    )


def _processes(handle: Any) -> tuple[GpuProcess, ...]:
    import pynvml

    return tuple(
        GpuProcess(process.pid, _name(process.pid), (process.usedGpuMemory or 0) // MIB)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    )


def _name(pid: int) -> str:
    import pynvml

    try:
        return pynvml.nvmlSystemGetProcessName(pid)
    except pynvml.NVMLError:  # a process of another container has no name here
        return "a process outside this container"
