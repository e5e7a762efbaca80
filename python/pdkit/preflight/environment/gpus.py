"""GPUs, their memory and their driver, against what the tests launch on them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pdkit.core.gpus import Gpu
from pdkit.preflight.environment.machine import Machine
from pdkit.preflight.environment.needs import Needs
from pdkit.preflight.finding import Finding, error, ok, warning
from pdkit.preflight.plan import Server, span

ELSEWHERE = "run on such a machine, or without a GPU: pdkit run --on embedded"
NOT_OURS = "wait for them or ask their owner; nothing here ends them"


def check(needs: Needs, machine: Machine) -> Iterator[Finding]:
    """Findings on GPUs and driver."""
    count = max((max(server.gpus) + 1 for server in needs.servers), default=needs.gpu_count)
    yield from _count(needs, count, machine)
    yield from _driver(machine)
    same: dict[Finding, list[int]] = {}
    for index, gpu in enumerate(machine.gpus[:count]):
        for finding in _gpu(needs, gpu, [server for server in needs.servers if index in server.gpus]):
            same.setdefault(finding, []).append(index)
    for finding, indices in same.items():
        yield replace(finding, subject=f"GPU{'s' * (len(indices) > 1)} {span(indices)}")


def _gpu(needs: Needs, gpu: Gpu, users: Sequence[Server]) -> list[Finding]:
    """What is wrong with a GPU for the processes of each test class, or one line that nothing is."""
    if needs.capability not in (None, gpu.capability):
        found, wanted = (".".join(map(str, version)) for version in (gpu.capability, needs.capability or ()))
        what = f"{gpu.name}, compute capability {found}"
        return [error("GPU", what, f"the suite is for {wanted}: kernels and memory differ", ELSEWHERE)]
    by_test: dict[str, list[Server]] = {}
    for server in users:
        by_test.setdefault(server.test, []).append(server)
    found_wrong = [problem for of_test in by_test.values() if (problem := _memory(gpu, needs.gpu_memory_gb, of_test))]
    if found_wrong or not users:
        return list(dict.fromkeys(found_wrong))
    return [ok("GPU", f"{gpu.free_mib} of {gpu.memory_mib} MiB free for {_names(users)}")]


def _names(users: Sequence[Server]) -> str:
    """`prefill, decode and server`, each name once."""
    *first, last = dict.fromkeys(server.name for server in users)
    return " and ".join(filter(None, (", ".join(first), last)))


def _count(needs: Needs, count: int, machine: Machine) -> Iterator[Finding]:
    wanted = f"{count} GPU{'s' * (count != 1)}" + (f" of {needs.gpu_memory_gb:g} GB" if needs.gpu_memory_gb else "")
    users = ", ".join(dict.fromkeys(f"{server.name} {span(server.gpus)}" for server in needs.servers))
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


def _memory(gpu: Gpu, memory_gb: float, users: Sequence[Server]) -> Finding | None:
    """What is wrong with the memory of a GPU for the processes of one test class."""
    names = _names(users)
    if gpu.memory_mib < 1000 * memory_gb:
        what = f"{gpu.name} with {gpu.memory_mib} MiB"
        return error("GPU", what, f"{users[0].test} asks for {memory_gb:g} GB ({names})", ELSEWHERE)
    wanted = round(sum(server.mem_fraction or 0 for server in users) * gpu.memory_mib)
    strangers = ", ".join(f"{p.name} (pid {p.pid}, {p.memory_mib} MiB)" for p in gpu.processes)
    if gpu.free_mib < wanted:
        what = f"{names} need{'s' * (len(users) == 1)} {wanted} MiB, found {gpu.free_mib} of {gpu.memory_mib} MiB free"
        return error("GPU", what, f"the rest is with {strangers or 'others'}", NOT_OURS)
    if gpu.processes:
        return warning("GPU", f"in use by {strangers}", f"{names} would share it, and slow down", NOT_OURS)
    return None
