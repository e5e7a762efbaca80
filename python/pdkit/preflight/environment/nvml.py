"""GPUs, driver and the processes on the GPUs, by NVML; none of them is touched."""

from collections.abc import Mapping

from pdkit.core.gpus import VISIBLE, NoDriver, visible_handles
from pdkit.preflight.environment.machine import Gpu, GpuProcess

MIB = 2**20


def observe(environ: Mapping[str, str]) -> dict:
    """Fields of Machine that NVML knows; `gpu_problem` says why there is no GPU."""
    import pynvml

    try:
        with visible_handles(environ) as handles:
            cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
            return {
                "gpus": tuple(_gpu(pynvml, handle) for handle in handles),
                "gpu_problem": None if handles else _none_visible(pynvml.nvmlDeviceGetCount(), environ),
                "driver": pynvml.nvmlSystemGetDriverVersion(),
                "driver_cuda": (cuda // 1000, cuda % 1000 // 10),
            }
    except NoDriver as problem:
        return {"gpu_problem": str(problem)}


def _none_visible(count: int, environ: Mapping[str, str]) -> str:
    return f"CUDA_VISIBLE_DEVICES={environ.get(VISIBLE)} hides all {count}" if count else "the driver finds none"


def _gpu(pynvml, handle) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    processes = (
        GpuProcess(process.pid, _name(pynvml, process.pid), (process.usedGpuMemory or 0) // MIB)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    )
    return Gpu(
        name=pynvml.nvmlDeviceGetName(handle),
        memory_mib=memory.total // MIB,
        free_mib=memory.free // MIB,
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        processes=tuple(processes),
    )


def _name(pynvml, pid: int) -> str:
    try:
        return pynvml.nvmlSystemGetProcessName(pid)
    except pynvml.NVMLError:  # a process of another container has no name here
        return "a process outside this container"
