"""The facts about a machine that the checks look at: read from one, or from a description that was recorded on one."""

import json
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pdkit.core.errors import UsageError
from pdkit.core.gpus import Gpu, GpuProcess
from pdkit.core.gpus import observe as observe_gpus
from pdkit.core.source import read
from pdkit.preflight.environment.packages import locate

INFINIBAND = Path("sys/class/infiniband")
RDMA_FILES = ("ports/*/state", "ports/*/rate", "ports/*/link_layer", "ports/*/gids/*", "ports/*/gid_attrs/types/*")
UNLIMITED = -1
CAP_IPC_LOCK = 14


class BadDescription(UsageError):
    """A recorded machine cannot be read; the message is one line."""


@dataclass(frozen=True)
class Machine:
    """What a machine has.

    gpus             those that CUDA_VISIBLE_DEVICES leaves, in CUDA's order; `gpu_problem` says why there are none
    driver           version of the NVIDIA driver; `driver_cuda` the newest CUDA that it runs, as (major, minor)
    torch_cuda       CUDA that the installed torch was built for
    rdma             text of files below sys/class/infiniband, by path; `rdma_openable`: /dev/infiniband has verbs
    memory_bytes     main memory that a process can still get, limits of the container included
    shm_bytes        free in /dev/shm
    tmp_bytes        free where temporary files go; `home_bytes` where compiled kernels are cached
    open_files       hard limit of RLIMIT_NOFILE; `locked_bytes` of RLIMIT_MEMLOCK (UNLIMITED = -1, so are its exempt)
    """

    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str | None = None
    driver: str | None = None
    driver_cuda: tuple[int, int] | None = None
    torch_cuda: tuple[int, int] | None = None
    rdma: Mapping[str, str] = field(default_factory=dict)
    rdma_openable: bool = False
    memory_bytes: int = 0
    shm_bytes: int = 0
    tmp_bytes: int = 0
    home_bytes: int = 0
    open_files: int = 0
    locked_bytes: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Machine":
        """The machine that `to_json` described. Raises BadDescription."""
        try:
            facts = json.loads(text)
            gpus = tuple(
                Gpu(
                    **gpu
                    | {
                        "capability": tuple(gpu["capability"]),
                        "processes": tuple(GpuProcess(**process) for process in gpu.get("processes", ())),
                    }
                )
                for gpu in facts.get("gpus", ())
            )
            versions = {name: tuple(facts[name]) for name in ("driver_cuda", "torch_cuda") if facts.get(name)}
            return cls(**facts | versions | {"gpus": gpus})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadDescription(f"not a recorded machine: {type(error).__name__}: {error}") from None

    @contextmanager
    def as_tree(self) -> Iterator[Path]:
        """A directory with the files of this machine, for rules that read files."""
        with tempfile.TemporaryDirectory(prefix="machine-") as directory:
            for name, text in self.rdma.items():
                path = Path(directory, INFINIBAND, name)
                assert Path(directory) in path.resolve().parents, name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            yield Path(directory)


def observe(root: Path = Path("/"), environ: Mapping[str, str] = os.environ, gpus: bool = True) -> Machine:
    """The facts about this machine, with sysfs, procfs and devices below `root`; without `gpus` NVML is left alone."""
    machine = Machine(
        torch_cuda=_torch_cuda() if gpus else None,
        rdma=_rdma(root) if gpus else {},
        rdma_openable=any((root / "dev" / "infiniband").glob("uverbs*")),
        memory_bytes=available_memory(root),
        shm_bytes=_free(root / "dev" / "shm"),
        tmp_bytes=_free(Path(tempfile.gettempdir())),
        home_bytes=_free(Path(environ.get("HOME", "/"))),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        locked_bytes=_locked(root),
    )
    if not gpus:
        return machine
    return replace(machine, **observe_gpus(environ))


def _free(path: Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def _rdma(root: Path) -> dict[str, str]:
    base = root / INFINIBAND
    found = {}
    for device in sorted(base.iterdir()) if base.is_dir() else ():
        for path in (path for pattern in RDMA_FILES for path in sorted(device.glob(pattern))):
            try:
                found[str(path.relative_to(base))] = path.read_text()
            except OSError:  # the kernel answers EINVAL for an unused entry of the GID table
                continue
    return found


def _locked(root: Path) -> int:
    try:
        status = (root / "proc" / "self" / "status").read_text()
        effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
        if int(effective, 16) >> CAP_IPC_LOCK & 1:
            return UNLIMITED
    except (OSError, StopIteration, ValueError):
        pass
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    return UNLIMITED if hard == resource.RLIM_INFINITY else hard


def available_memory(root: Path) -> int:
    """Bytes that a process can still get: MemAvailable, or what the memory limit of the cgroup leaves if less."""
    available = 0
    try:
        for line in (root / "proc" / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = 1024 * int(line.split()[1])
    except OSError:
        return 0
    group = root / "sys" / "fs" / "cgroup"
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, ValueError, StopIteration):  # no limit ("max"), or no cgroup of its own
        return available
    return max(0, min(available, limit - used + cached))


def _torch_cuda() -> tuple[int, int] | None:
    """CUDA version in the installed torch's `version.py`, which is read, not imported."""
    path = locate("torch.version")
    value = path and read(path)
    version = value and value.value(value.constants.get("cuda"))
    if not isinstance(version, str):
        return None
    major, minor = map(int, version.split(".")[:2])
    return major, minor
