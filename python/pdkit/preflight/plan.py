"""Which process of a PD test uses which GPUs, ports and NICs, why, and what is wrong with that.

Placement is SGLang's own (`entrypoints/engine.py`, `managers/data_parallel_controller.py`, the same in 0.5.12 to
0.5.23): rank (replica r, stage p, tensor t) of a server runs on GPU

    base_gpu_id + r * tp * pp * gpu_id_step + p * tp + t * gpu_id_step

so that a server takes replicas * pp * tp GPUs. `--dp-size` counts replicas; under DP attention it counts the groups
that the tp ranks are split into, and takes no GPU of its own.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from pdkit.preflight.contract.launches import Contract, ProcessContract, TestContract

# Runners of SGLang's CI by the last word of their name, GB a GPU as its maker names it; `large` is an H100, `small` a
# GeForce RTX 5090.
MEMORY_GB = {"h20": 96, "h100": 80, "h200": 141, "b200": 180, "large": 80, "small": 32, "5090": 32}
_RUNNER = re.compile(r"\b(\d+)-gpu(?:-([a-z0-9]+))?\b")

SHARED_FRACTION = 0.9  # of a GPU that several servers may reserve together; the rest is for activations and graphs
EPHEMERAL = range(32768, 61000)  # ports that Linux gives to outgoing connections
MOONCAKE = range(12000, 17001)  # ports that Mooncake draws its own from
LOWER = f"choose one from {MOONCAKE.stop} to {EPHEMERAL.start - 1}"
WEIGHTLESS = {"dummy", "--load-format=dummy"}
OWN_NICS = "pass those of its own GPUs, cls.rdma_devices_for(GPUs)"


@dataclass(frozen=True)
class Runner:
    """What a suite runs on: `gpus` GPUs of `memory_gb` GB each, None where the kind is not known."""

    name: str
    gpus: int
    memory_gb: int | None

    @classmethod
    def of_suite(cls, suite: str) -> "Runner | None":
        """`stage-c-test-dsv4-8-gpu-h200` runs on `8-gpu-h200`; None where the name tells no GPUs."""
        match = _RUNNER.search(suite)
        return cls(match[0], int(match[1]), MEMORY_GB.get(match[2] or "")) if match else None

    def __str__(self) -> str:
        memory = f" of {self.memory_gb} GB" if self.memory_gb else ""
        return f"{self.name} ({self.gpus} GPU{'s' * (self.gpus != 1)}{memory})"


@dataclass(frozen=True)
class Rank:
    """One scheduler process: its GPU, and its place in the replicas, pipeline stages, tensor and attention groups."""

    gpu: int
    replica: int
    pp: int
    tp: int
    attention_dp: int


@dataclass(frozen=True, eq=False)
class Server:
    """What one `sglang.launch_server` takes.

    `nics` are RDMA devices, `mem_fraction` is a share of a GPU's memory, `pins_nccl` whether the NCCL port is its
    argument. `models` is what it loads, its draft model's directory or repository included, with dummy ones where not
    `weights`; `a2a` its MoE all-to-all backend, `env` what the test class `test` sets for it.
    """

    name: str
    tp: int = 1
    pp: int = 1
    replicas: int = 1
    attention_dp: int = 1
    base_gpu_id: int = 0
    gpu_id_step: int = 1
    nnodes: int = 1
    mem_fraction: float | None = None
    ports: Mapping[str, int] = field(default_factory=dict)
    pins_nccl: bool = False
    nics: tuple[str, ...] = ()
    transfer_backend: str | None = None
    models: tuple[str, ...] = ()
    weights: bool = True
    a2a: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    test: str = ""

    @property
    def ranks(self) -> list[Rank]:
        group = max(self.tp // self.attention_dp, 1)
        return [
            Rank(self._gpu(replica, pp, tp), replica, pp, tp, tp // group)
            for replica in range(self.replicas)
            for pp in range(self.pp)
            for tp in range(self.tp)
        ]

    def _gpu(self, replica: int, pp: int, tp: int) -> int:
        first = self.base_gpu_id + replica * self.tp * self.pp * self.gpu_id_step
        return first + pp * self.tp + tp * self.gpu_id_step

    @property
    def gpus(self) -> tuple[int, ...]:
        return tuple(sorted({rank.gpu for rank in self.ranks}))

    @property
    def why(self) -> str:
        """One line: how many GPUs, from which factors."""
        factors = [f"dp {self.replicas}"] * (self.replicas > 1) + [f"pp {self.pp}"] * (self.pp > 1) + [f"tp {self.tp}"]
        count = self.replicas * self.pp * self.tp
        line = f"{' x '.join(factors)} = {count} GPU{'s' * (count != 1)} from GPU {self.base_gpu_id}"
        line += f" in steps of {self.gpu_id_step}" * (self.gpu_id_step > 1) + f": {span(self.gpus)}"
        if self.attention_dp > 1:
            line += f"; dp {self.attention_dp} is carved out of tp {self.tp} by DP attention and takes none of its own"
        return line

    def problems(self) -> Iterable[str]:
        if self.nnodes != 1:
            yield f"{self.name} spans {self.nnodes} nodes; a suite has one"
        if self.tp % self.attention_dp:
            yield f"{self.name}: DP attention cannot split tp {self.tp} into dp {self.attention_dp} equal groups"
        users = Counter(rank.gpu for rank in self.ranks)
        for gpu in (gpu for gpu, count in users.items() if count > 1):
            yield f"{self.name} puts {users[gpu]} of its ranks on GPU {gpu}"
        if self.replicas > 1 and self.pins_nccl:
            yield (
                f"{self.name}: its {self.replicas} replicas would all bind NCCL port {self.ports['nccl']}; "
                "leave --nccl-port out, or use DP attention"
            )
        if self.mem_fraction is not None and not 0 < self.mem_fraction < 1:
            yield f"{self.name}: --mem-fraction-static {self.mem_fraction} is no share of a GPU (0 to 1)"


@dataclass(frozen=True)
class GpuPlan:
    """All that one test launches: its servers, and the ports of its other processes by their name."""

    test: str
    servers: tuple[Server, ...]
    others: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    runner: Runner | None = None

    @property
    def gpus(self) -> tuple[int, ...]:
        return tuple(sorted({gpu for server in self.servers for gpu in server.gpus}))

    @property
    def ports(self) -> list[tuple[str, str, int]]:
        """(process, what for, port), of all processes."""
        processes = {server.name: server.ports for server in self.servers} | dict(self.others)
        return [(name, use, port) for name, ports in processes.items() for use, port in ports.items()]

    def problems(self) -> list[str]:
        """One line for each reason why this cannot run."""
        lines = [line for server in self.servers for line in server.problems()]
        lines += [*self._too_many(), *self._overlaps(), *self._port_clashes()]
        return [f"{self.test}: {line}" for line in lines]

    def _too_many(self) -> Iterable[str]:
        beyond = [gpu for gpu in self.gpus if self.runner and gpu >= self.runner.gpus]
        if not beyond:
            return
        what = f"needs {len(self.gpus)} GPUs ({span(self.gpus)})"
        who = [f"{s.name} {span(s.gpus)}" for s in self.servers]
        yield f"{what}, the runner is {self.runner}, so there is no GPU {span(beyond)}: {', '.join(who)}"

    def _overlaps(self) -> Iterable[str]:
        shared: dict[tuple[Server, ...], list[int]] = {}
        for gpu in self.gpus:
            users = tuple(server for server in self.servers if gpu in server.gpus)
            shared.setdefault(users, []).append(gpu)
        for users, gpus in shared.items():
            fractions = [server.mem_fraction for server in users]
            stated = [fraction for fraction in fractions if fraction is not None]
            if len(users) == 1 or (stated == fractions and sum(stated) <= SHARED_FRACTION):
                continue
            asked = " + ".join("an unset share" if fraction is None else f"{fraction:g}" for fraction in fractions)
            names = " and ".join(server.name for server in users)
            yield (
                f"{names} use GPU {span(gpus)} together, {asked} of its memory; move one by --base-gpu-id, or set "
                f"--mem-fraction-static to shares that sum to {SHARED_FRACTION} at most"
            )

    def _port_clashes(self) -> Iterable[str]:
        users: dict[int, list[str]] = {}
        for process, use, port in self.ports:
            users.setdefault(port, []).append(f"{process} {use}")
            if not 0 < port < 65536:
                yield f"{process} {use}: there is no port {port}"
        for port, who in users.items():
            if len(who) > 1:
                yield f"port {port} is wanted by {' and '.join(who)}"

    def warnings(
        self, nic_sockets: Mapping[str, int] | None = None, gpu_sockets: Mapping[int, int] | None = None
    ) -> list[str]:
        """One line for each thing that may go wrong; NUMA nodes by NIC and by GPU are those of `pdkit.core.numa`."""
        lines = [*self._risky_ports(), *self._nics(nic_sockets or {}, gpu_sockets or {})]
        return [f"{self.test}: {line}" for line in lines]

    def _risky_ports(self) -> Iterable[str]:
        drawn = [server.name for server in self.servers if "nccl" not in server.ports]
        if len(drawn) > 1:
            yield f"{' and '.join(drawn)} draw their NCCL port when they start, and may draw the same; pin --nccl-port"
        mooncake = any((server.transfer_backend or "").startswith("mooncake") for server in self.servers)
        for process, use, port in self.ports:
            if port in EPHEMERAL:
                yield f"{process} {use}: port {port} may be taken by an outgoing connection; {LOWER}"
            if port in MOONCAKE and mooncake:
                yield f"{process} {use}: port {port} may be drawn by Mooncake; {LOWER}"

    def _nics(self, nic_sockets: Mapping[str, int], gpu_sockets: Mapping[int, int]) -> Iterable[str]:
        for one, two in combinations(self.servers, 2):
            common = [nic for nic in one.nics if nic in two.nics]
            if common and not {*one.gpus} & {*two.gpus}:
                yield f"{one.name} and {two.name} share NIC {', '.join(common)}; {OWN_NICS}"
        for server in self.servers:
            near = {gpu_sockets[gpu] for gpu in server.gpus if gpu in gpu_sockets}
            far = [nic for nic in server.nics if near and nic_sockets.get(nic, -1) not in near | {-1}]
            if far:
                gpus = f"GPUs {span(server.gpus)} (socket {span(sorted(near))})"
                yield f"{server.name}: NIC {', '.join(far)} sits on another socket than its {gpus}; {OWN_NICS}"


def span(numbers: Sequence[int]) -> str:
    """`0-3, 6` for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _nics_of(value: object) -> tuple[str, ...]:
    """Devices in `--disaggregation-ib-device`: `a,b`, or JSON that maps GPUs to such lists, or a file of that JSON."""
    text = str(value or "").strip()
    if text.endswith(".json") and Path(text).is_file():
        text = Path(text).read_text().strip()
    lists = json.loads(text).values() if text.startswith("{") else [text]
    return tuple(dict.fromkeys(nic.strip() for names in lists for nic in str(names).split(",") if nic.strip()))


def _server(test: str, name: str, process: ProcessContract) -> Server:
    settings, given = process.settings, dict(zip(process.argv, process.argv[1:]))
    assert settings, f"{name} is not a server"
    is_of_a_pair = settings["disaggregation_mode"] != "null"
    models = [given.get(flag) for flag in ("--model-path", "--speculative-draft-model-path")]
    return Server(
        name=name,
        tp=settings["tp_size"],
        pp=settings["pp_size"],
        replicas=settings["replicas"],
        attention_dp=settings["attention_dp"],
        base_gpu_id=settings["base_gpu_id"],
        gpu_id_step=settings["gpu_id_step"],
        nnodes=settings["nnodes"],
        mem_fraction=settings["mem_fraction_static"],
        ports=process.ports,
        pins_nccl=settings["nccl_port"] is not None,
        nics=_nics_of(settings["disaggregation_ib_device"]),
        transfer_backend=settings["disaggregation_transfer_backend"] if is_of_a_pair else None,
        models=tuple(dict.fromkeys(filter(None, models))),
        weights=not WEIGHTLESS & set(process.argv),
        a2a=settings["moe_a2a_backend"],
        env=process.env,
        test=test,
    )


def of_test(test: TestContract, runner: Runner | None) -> GpuPlan:
    """The plan of one test class from its launch contract; of several processes of a name the later are numbered."""
    names = _distinct(process.name for process in test.processes)
    pairs = list(zip(names, test.processes))
    servers = tuple(_server(test.test, name, process) for name, process in pairs if process.settings)
    others = {name: process.ports for name, process in pairs if not process.settings and process.ports}
    return GpuPlan(test.test, servers, others, runner)


def _distinct(names: Iterable[str]) -> Iterator[str]:
    """`a, a 2, b` for a, a, b."""
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} {seen[name]}"


def of_contract(contract: Contract, suite: str | None = None) -> list[GpuPlan]:
    """The plans of all tests of a file, on the runner of `suite` or else of the first suite that names GPUs."""
    runners = [Runner.of_suite(name) for name in ([suite] if suite else contract.suites)]
    runner = next(filter(None, runners), None)
    return [of_test(test, runner) for test in contract.tests]


def as_data(plan: GpuPlan) -> dict[str, Any]:
    """The plan as plain data for a report."""
    return {
        "test": plan.test,
        "runner": vars(plan.runner) if plan.runner else None,
        "gpus": list(plan.gpus),
        "servers": [
            {
                "name": server.name,
                "gpus": list(server.gpus),
                "why": server.why,
                "ranks": [vars(rank) for rank in server.ranks],
                "ports": dict(server.ports),
                "nics": list(server.nics),
                "mem_fraction_static": server.mem_fraction,
            }
            for server in plan.servers
        ],
        "others": {name: dict(ports) for name, ports in plan.others.items()},
        "problems": plan.problems(),
        "warnings": plan.warnings(),
    }
