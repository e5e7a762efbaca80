"""GPUs, driver and the processes on the GPUs, by NVML; none of them is touched."""

from collections.abc import Mapping

from pdkit.environment_check.machine import Gpu, GpuProcess
from pdkit.rung import visible_indices

MIB = 2**20


def observe(environ: Mapping[str, str]) -> dict:
    """Fields of Machine that NVML knows; `gpu_problem` says why there is no GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"gpu_problem": f"no NVIDIA driver ({error})"}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
        gpus = tuple(_gpu(pynvml, handles[i]) for i in visible_indices(len(handles), uuids, visible))
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        problem = None
        if not gpus:
            problem = f"CUDA_VISIBLE_DEVICES={visible} hides all {len(handles)}" if handles else "the driver finds none"
        return {
            "gpus": gpus,
            "gpu_problem": problem,
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "driver_cuda": (cuda // 1000, cuda % 1000 // 10),
        }
    finally:
        pynvml.nvmlShutdown()


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
