"""GPUs, their memory and their driver, against what the tests launch on them."""

from collections.abc import Iterator, Sequence

from pdkit.core.gpus import Gpu
from pdkit.preflight.environment.machine import Machine
from pdkit.preflight.environment.needs import Needs, Process
from pdkit.preflight.finding import Finding, error, ok, warning
from pdkit.preflight.plan import span

ELSEWHERE = "run on such a machine, or without a GPU: pdkit run --on embedded"
NOT_OURS = "wait for them or ask their owner; nothing here ends them"


def check(needs: Needs, machine: Machine) -> Iterator[Finding]:
    """Findings on GPUs and driver."""
    on_gpus = [process for process in needs.processes if process.gpus]
    count = max((max(process.gpus) + 1 for process in on_gpus), default=needs.gpu_count)
    yield from _count(needs, on_gpus, count, machine)
    yield from _driver(machine)
    for index, gpu in enumerate(machine.gpus[:count]):
        if needs.capability not in (None, gpu.capability):
            found, wanted = (".".join(map(str, capability)) for capability in (gpu.capability, needs.capability))
            what = f"{gpu.name}, compute capability {found}"
            yield error(f"GPU {index}", what, f"the suite is for {wanted}: kernels and memory differ", ELSEWHERE)
            continue
        users = [process for process in on_gpus if index in process.gpus]
        for name in dict.fromkeys(process.test for process in users):
            yield from _memory(index, gpu, needs.gpu_memory_gb, [p for p in users if p.test == name])


def _count(needs: Needs, on_gpus: Sequence[Process], count: int, machine: Machine) -> Iterator[Finding]:
    wanted = f"{count} GPU{'s' * (count != 1)}" + (f" of {needs.gpu_memory_gb:g} GB" if needs.gpu_memory_gb else "")
    users = ", ".join(dict.fromkeys(f"{process.name} {span(process.gpus)}" for process in on_gpus))
    if len(machine.gpus) < count:
        found = f"{len(machine.gpus)} found" + (f", {machine.gpu_problem}" if machine.gpu_problem else "")
        why = f"the suite needs {wanted}" + (f" ({users})" if users else "")
        yield error("GPUs", found, why, ELSEWHERE)
    else:
        yield ok("GPUs", f"{len(machine.gpus)} found ({machine.gpus[0].name}), {wanted} needed")


def _driver(machine: Machine) -> Iterator[Finding]:
    if machine.driver_cuda is None or machine.torch_cuda is None:
        return
    runs, built = (".".join(map(str, version)) for version in (machine.driver_cuda, machine.torch_cuda))
    what = f"driver {machine.driver} runs CUDA {runs}, torch was built for {built}"
    if machine.driver_cuda[0] < machine.torch_cuda[0]:
        do = f"update the driver, or install a torch for CUDA {runs}"
        yield error("driver", what, "torch finds no GPU with a driver of an older major version", do)
    elif machine.driver_cuda < machine.torch_cuda:
        why = "kernels that are compiled at run time may not load"
        yield warning("driver", what, why, "update the driver if a kernel fails to load")
    else:
        yield ok("driver", what)


def _memory(index: int, gpu: Gpu, memory_gb: float, users: Sequence[Process]) -> Iterator[Finding]:
    subject = f"GPU {index}"
    names = " and ".join(process.name for process in users)
    if gpu.memory_mib < 1000 * memory_gb:
        what = f"{gpu.name} with {gpu.memory_mib} MiB"
        yield error(subject, what, f"{users[0].test} asks for {memory_gb:g} GB ({names})", ELSEWHERE)
        return
    wanted = round(sum(process.memory_fraction for process in users) * gpu.memory_mib)
    strangers = ", ".join(f"{p.name} (pid {p.pid}, {p.memory_mib} MiB)" for p in gpu.processes)
    if gpu.free_mib < wanted:
        what = f"{gpu.free_mib} of {gpu.memory_mib} MiB free" + (f", the rest with {strangers}" if strangers else "")
        yield error(subject, what, f"{names} take{'s' * (len(users) == 1)} {wanted} MiB", NOT_OURS)
    elif gpu.processes:
        yield warning(subject, f"in use by {strangers}", f"{names} would share it, and slow down", NOT_OURS)
    else:
        yield ok(subject, f"{gpu.free_mib} of {gpu.memory_mib} MiB free for {names}")
