"""A GPU plan as text: one column per GPU, and below it why, which ports and which NICs."""

from collections.abc import Mapping

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pdkit.preflight.plan import GpuPlan, Rank, Server


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


def _nics(server: Server, sockets: Mapping[str, int]) -> str:
    names = [f"{nic} (socket {sockets[nic]})" if nic in sockets else nic for nic in server.nics]
    return ", ".join(names) or "left to the transfer backend"


def draw(plan: GpuPlan, nic_sockets: Mapping[str, int] | None = None) -> Group:
    """Something that a rich console prints; `nic_sockets` are those of `pdkit.core.numa`."""
    lines = [f"{server.name}: {server.why}" for server in plan.servers]
    processes = {server.name: server.ports for server in plan.servers} | dict(plan.others)
    lines += [f"{name}: ports {_ports(ports)}" for name, ports in processes.items()]
    lines += [f"{server.name}: NICs {_nics(server, nic_sockets or {})}" for server in plan.servers]
    head = _grid(plan) if plan.servers else Text(f"{plan.test} uses no GPU")
    return Group(head, Text("\n".join(lines)))
