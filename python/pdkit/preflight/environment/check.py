"""All checks of one suite on one machine."""

import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from pdkit.core import ports, processes
from pdkit.core.host import installed
from pdkit.core.paths import ASSETS
from pdkit.core.source import UNKNOWN
from pdkit.deployment import quirks
from pdkit.preflight import dsv4
from pdkit.preflight.environment import dataset, gpus, machine, model, packages, rdma
from pdkit.preflight.environment.machine import UNLIMITED, Machine
from pdkit.preflight.environment.needs import Needs
from pdkit.preflight.finding import Finding, error, ok, warning
from pdkit.preflight.plan import Server

GIB, MIB = 2**30, 2**20
RDMA_BACKENDS = ("mooncake", "mori")
SERVER_FILES = 65535  # what SGLang's servers raise their limit to
PAIR_FILES = 1024


def check(needs: Needs, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Everything that can be known of this machine before a suite with such needs is started."""
    facts = machine.observe(root, environ, gpus=needs.hw == "cuda")
    return [*of_machine(needs, facts, environ), *of_place(needs, environ, has_gpus=bool(facts.gpus))]


def of_machine(needs: Needs, facts: Machine, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """What a machine, present or recorded, says to the needs."""
    if needs.hw == "cuda":
        yield from gpus.check(needs, facts)
        yield from _rdma(needs, facts, environ)
    if needs.hw == "cuda" and needs.servers:
        yield from _room(facts, shm=8, tmp=2, memory=16, home=10)
        yield from _limits(needs, facts, SERVER_FILES)
    elif needs.embedded:
        yield from _room(facts, shm=1 / 64, tmp=1, memory=6)
        yield from _limits(needs, facts, PAIR_FILES)


def of_place(needs: Needs, environ: Mapping[str, str] = os.environ, has_gpus: bool = False) -> Iterator[Finding]:
    """What the software, the ports and the disks here say to the needs; packages for GPUs are imported only on some."""
    yield _python(environ)
    fails = "it would fail once it is launched", "correct the test"
    yield from (error("contract", line, *fails) for line in needs.errors)
    yield from (ok("contract", f"{line}; this release still takes it") for line in needs.deprecations)
    for line in needs.warnings:
        what, _, do = line.rpartition("; ")
        yield warning("plan", what, "servers may fail to start, or transfer slowly", do)
    if needs.embedded:
        yield from _embedded()
    if needs.hw != "cuda":
        return
    yield from _packages(needs, environ, has_gpus)
    yield from _ports(needs)
    for name, weights in dict.fromkeys((m, server.weights) for server in needs.servers for m in server.models):
        yield from model.check(name, environ, weights)
    for path in needs.data:
        if path is UNKNOWN:
            why = "whether it is there shows when the eval asks"
            yield warning("data", "gsm8k_data_path is computed", why, "see to it, or make it a literal or os.getenv()")
        else:
            yield from dataset.check(path if path is None else str(path), environ=environ)


def _python(environ: Mapping[str, str]) -> Finding:
    """The fixtures launch `python3`, whichever comes first on the PATH that the tests extend."""
    mine = os.path.dirname(sys.executable)
    found = shutil.which("python3", path=os.pathsep.join([mine, environ.get("PATH", "")]))
    if found and os.path.dirname(found) == mine and os.path.realpath(found) == os.path.realpath(sys.executable):
        return ok("python3", found)
    why = f"SGLang's fixtures launch the servers with python3, and these tests run under {sys.executable}"
    return error("python3", f"{found or 'not found'}", why, f"link it: ln -s {sys.executable} {mine}/python3")


def _embedded() -> Iterator[Finding]:
    yield from model.check(str(ASSETS / "nano-dsv4"))
    yield from dataset.check(str(ASSETS / "gsm8k_nano.jsonl"))
    yield packages.installed(packages.ROUTER)
    try:
        ports.claim().release()
        yield ok("ports", "a block of free ones for servers and load balancer")
    except RuntimeError as problem:
        remedy = getattr(problem, "remedy", "end what listens there")
        yield error("ports", str(problem), "prefill, decode and load balancer listen there", remedy)


def _room(facts: Machine, shm: float, tmp: float, memory: float, home: float = 0) -> Iterator[Finding]:
    rows = (
        ("memory", facts.memory_bytes, memory, "the processes would not fit", "end other work, or raise the limit"),
        ("/dev/shm", facts.shm_bytes, shm, "NCCL and the schedulers share memory there", "docker run --shm-size 32g"),
        ("temporary files", facts.tmp_bytes, tmp, "logs and sockets go there", "free space, or set TMPDIR"),
        ("home", facts.home_bytes, home, "compiled kernels are cached there", "free space, or set HOME"),
    )
    for subject, free, wanted, why, do in rows:
        if wanted and free < wanted * GIB:
            unit, size = ("GiB", GIB) if wanted >= 1 else ("MiB", MIB)
            found = math.floor(free / size * 100) / 100  # 15.999 of 16 must not read 16
            yield error(subject, f"needs {wanted * GIB / size:g} {unit} free, found {found:g}", why, do)
        elif wanted:
            yield ok(subject, f"{free / GIB:.1f} GiB free")


def _limits(needs: Needs, facts: Machine, files: int) -> Iterator[Finding]:
    if facts.open_files < PAIR_FILES:
        why = "128 client threads and three servers need more"
        yield error("open files", f"hard limit {facts.open_files}", why, f"ulimit -Hn {files}")
    elif facts.open_files < files:
        why = f"SGLang's servers ask for {files}, and run out under more load than this test's"
        yield warning("open files", f"hard limit {facts.open_files}", why, f"ulimit -Hn {files}")
    else:
        yield ok("open files", f"hard limit {facts.open_files}")
    if any(map(_uses_rdma, needs.servers)) and facts.rdma:
        if facts.locked_bytes == UNLIMITED:
            yield ok("locked memory", "unlimited")
        else:
            why = "RDMA registers the buffers that it transfers, and fails beyond it"
            what = f"limit {facts.locked_bytes / 2**20:.0f} MiB"
            yield warning("locked memory", what, why, "ulimit -l unlimited (docker run --ulimit memlock=-1)")


def _uses_rdma(server: Server) -> bool:
    return server.transfer_backend in RDMA_BACKENDS


def _rdma(needs: Needs, facts: Machine, environ: Mapping[str, str]) -> Iterator[Finding]:
    servers = list(filter(_uses_rdma, needs.servers))
    sglang = packages.locate("sglang")
    if not servers or sglang is None:
        return
    with facts.as_tree() as tree:
        try:
            rules = rdma.rules(sglang.parent / rdma.FIXTURE, tree)
        except (OSError, SyntaxError, KeyError) as problem:
            why = "which devices it would use is not known"
            yield warning("RDMA", f"SGLang's PD fixture cannot be read: {problem!r}", why, "see ibv_devinfo")
            return
        yield from _devices(rules, servers, facts.rdma_openable)
        if not environ.get("MC_GID_INDEX"):
            yield from _gids(rules, [nic for nic in _named(servers) or rules.usable() if nic in rules.usable()])


def _named(servers: list[Server]) -> list[str]:
    return list(dict.fromkeys(nic for server in servers for nic in server.nics))


def _devices(rules: rdma.Rules, servers: list[Server], openable: bool) -> Iterator[Finding]:
    usable, reasons = rules.usable(), rules.why_not()
    tcp = f"{servers[0].transfer_backend} then hands the state over by TCP, and transfers may fail under load"
    refused: dict[str, list[str]] = {}
    for nic in _named(servers):
        if nic not in usable:
            refused.setdefault(reasons.get(nic, "no such device"), []).append(nic)
    for why_not, nics in refused.items():
        users = " and ".join(dict.fromkeys(server.name for server in servers if {*nics} & {*server.nics}))
        do = "name others in SGLANG_CI_RDMA_ALL_DEVICES or SGLANG_TEST_PD_DISAGG_DEVICES"
        yield error("RDMA", f"{', '.join(nics)}: {why_not}", f"{users} would get it by --disaggregation-ib-device", do)
    if not usable and not refused:
        skipped = "".join(f", {name} skipped ({why})" for name, why in reasons.items())
        do = "make one active, or choose SGLANG_TEST_PD_DISAGG_BACKEND=nixl"
        yield warning("RDMA", f"no usable device{skipped}", tcp, do)
    if not usable:
        return
    if not openable:
        do = "pass it to the container: docker run --device /dev/infiniband"
        yield warning("RDMA", "no /dev/infiniband/uverbs*", tcp, do)
    yield ok("RDMA", f"usable: {', '.join(usable)}")


def _gids(rules: rdma.Rules, devices: list[str]) -> Iterator[Finding]:
    roce = [device for device in devices if rules.is_roce(device)]
    if not roce or not rules.knows_gids:
        return
    without = rules.without_gid(roce)
    if without:
        why = "Mooncake then has no address there, every transfer fails, and the score is 0"
        yield error("RDMA", f"no RoCE v2 GID on {', '.join(without)}", why, "give the interface an address")
    elif roce == devices and rules.gid_index(devices) is None:
        why = "SGLang sets one index for all or none, and leaves the choice to Mooncake"
        do = "set MC_GID_INDEX if transfers fail"
        yield warning("RDMA", f"RoCE v2 GIDs of {', '.join(roce)} have different indices", why, do)


def _packages(needs: Needs, environ: Mapping[str, str], has_gpus: bool) -> Iterator[Finding]:
    wanted: dict[packages.Package, None] = {}
    exposed = False
    for server in needs.servers:
        is_v4 = any(dsv4.is_dsv4(name, model.locate(name, environ)) for name in server.models)
        wanted |= dict.fromkeys(packages.wanted(server.a2a, server.transfer_backend, is_v4))
        exposed |= is_v4 and quirks.is_exposed_by_indexer({**environ, **server.env})
    if exposed:
        what = f"{installed('sglang')} lets the indexer's kernel read past what is mapped"
        why = "a batch of 128 tokens can end a server by an illegal memory access"
        yield warning("sglang", what, why, f"export {quirks.INDEXER_SWITCH}=0, or take 0.5.18 or newer")
    yield from map(packages.installed, wanted)
    if has_gpus:
        yield from packages.importable(wanted)


def _ports(needs: Needs) -> Iterator[Finding]:
    try:
        taken = {port: what for port, what in needs.ports.items() if not ports.is_free(port)}
    except ports.AddressMissing as problem:
        yield error("ports", str(problem), "servers and load balancer listen there", problem.remedy)
        return
    for port, what in sorted(taken.items()):
        holder = _listener(port)
        why = f"{what} listens there, and another process would be mistaken for it"
        yield error(
            "ports", f"{port} is in use by {holder}", why, "wait for the run that it belongs to, or end it yourself"
        )
    if needs.ports and not taken:
        yield ok("ports", f"{len(needs.ports)} free, {min(needs.ports)} to {max(needs.ports)}")


def _listener(port: int) -> str:
    pid = dict(ports.listeners()).get(port)
    return processes.describe_pid(pid) if pid else "a process that this user may not see"
