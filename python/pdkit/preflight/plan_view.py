"""A GPU plan as text: one column per GPU, and below it why, which ports, which NICs and how much memory."""

import io
from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pdkit.preflight.memory_estimate import Model
from pdkit.preflight.plan import GpuPlan, Rank, Server

GIB = 2**30
MIB_PER_GB = 1000  # a "141 GB" GPU has at least 141000 MiB


def _label(rank: Rank, server: Server) -> str:
    parts = [f"dp{rank.replica}"] * (server.replicas > 1) + [f"pp{rank.pp}"] * (server.pp > 1) + [f"tp{rank.tp}"]
    return "\n".join(parts + [f"dp{rank.attention_dp}"] * (server.attention_dp > 1))


def _grid(plan: GpuPlan) -> Table:
    count = max([plan.runner.gpus if plan.runner else 0, *(gpu + 1 for gpu in plan.gpus)])
    title = plan.test + (f" on {plan.runner}" if plan.runner else "") + f": {len(plan.gpus)} GPUs used"
    grid = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    grid.add_column("GPU")
    for gpu in range(count):
        beyond = plan.runner and gpu >= plan.runner.gpus
        grid.add_column(f"[red]{gpu}?[/]" if beyond else str(gpu), justify="center")
    for server in plan.servers:
        labels: dict[int, str] = {}
        for rank in server.ranks:
            labels[rank.gpu] = "\n".join(filter(None, (labels.get(rank.gpu), _label(rank, server))))
        grid.add_row(server.name, *(labels.get(gpu, "·") for gpu in range(count)))
    return grid


def _ports(ports: Mapping[str, int]) -> str:
    return ", ".join(f"{port} {use}" for use, port in sorted(ports.items(), key=lambda item: item[1]))


def memory_lines(plan: GpuPlan, model: Model) -> Iterable[str]:
    """One line for each server: weights on a GPU, and what is left for KV, where the GPU's memory is known."""
    for server in plan.servers:
        widths = (server.tp, server.attention_dp, server.pp)
        weights = model.weight_bytes_per_gpu(*widths, server.speculative, server.fp4_experts)
        line = f"{server.name}: weights about {weights / GIB:.1f} GiB a GPU"
        if plan.runner and plan.runner.memory_gb and server.mem_fraction:
            memory = plan.runner.memory_gb * MIB_PER_GB * 2**20
            tokens = model.tokens(memory, server.mem_fraction, weights, server.speculative)
            left = (memory * server.mem_fraction - weights) / GIB
            line += f" of {memory / GIB:.1f} GiB, {server.mem_fraction:g} of which is reserved: "
            line += f"{left:.1f} GiB for KV, about {tokens / 1000:,.0f} thousand tokens" if left > 0 else "does not fit"
        yield line


def memory_problems(plan: GpuPlan, model: Model) -> list[str]:
    """One line for each server whose weights do not fit into what it reserves."""
    return [f"{plan.test}: {line}" for line in memory_lines(plan, model) if line.endswith("does not fit")]


def _nics(server: Server, sockets: Mapping[str, int]) -> str:
    names = [f"{nic} (socket {sockets[nic]})" if nic in sockets else nic for nic in server.nics]
    return ", ".join(names) or "left to the transfer backend"


def draw(plan: GpuPlan, model: Model | None = None, nic_sockets: Mapping[str, int] | None = None) -> Group:
    """Something that a rich console prints; `nic_sockets` are those of `pdkit.core.numa`."""
    lines = [f"{server.name}: {server.why}" for server in plan.servers]
    processes = {server.name: server.ports for server in plan.servers} | dict(plan.others)
    lines += [f"{name}: ports {_ports(ports)}" for name, ports in processes.items()]
    lines += [f"{server.name}: NICs {_nics(server, nic_sockets or {})}" for server in plan.servers]
    lines += memory_lines(plan, model) if model else ()
    return Group(*([_grid(plan)] if plan.servers else [Text(f"{plan.test} uses no GPU")]), Text("\n".join(lines)))


def as_text(
    plan: GpuPlan, model: Model | None = None, nic_sockets: Mapping[str, int] | None = None, width: int = 100
) -> str:
    """What `draw` gives, as plain text for a report; the grid is at most `width` columns wide."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, soft_wrap=True)
    console.print(draw(plan, model, nic_sockets))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")
