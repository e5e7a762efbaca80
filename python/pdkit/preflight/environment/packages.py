"""Packages that the flags of a server need: found without importing them, and imported each in a process of its own."""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from pdkit.preflight.finding import Finding, error, ok

PIP = f"{sys.executable} -m pip install"  # bare pip may be another Python's
MOONCAKE = ("mooncake.engine", f"{PIP} mooncake-transfer-engine-cuda13, for a torch of CUDA 12 without -cuda13")
BACKENDS = {
    "mooncake": MOONCAKE,
    "mooncake_tcp": MOONCAKE,
    "nixl": ("nixl._api", f"{PIP} nixl"),
    "mori": ("mori.io", "install MORI from SGLang's ROCm image"),
    "ascend": ("memfabric_hybrid", f"{PIP} memfabric-hybrid"),
}
FLASH_MLA_USERS = (
    Path("srt", "layers", "attention", "deepseek_v4_backend.py"),
    Path("kernels", "ops", "attention", "flash_mla_interface.py"),
)
_FLASH_MLA = re.compile(r"^\s*(?:from|import) (sgl_kernel\.flash_mla|flash_mla)\b", re.MULTILINE)

IMPORT_TIMEOUT_S = 60.0
# SGLang imports torch first too, and with it come the CUDA libraries that the others are linked with.
_IMPORT = """
import importlib, sys
try:
    import torch
    importlib.import_module(sys.argv[1])
except BaseException as error:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    sys.exit(f"{type(error).__name__}: {error}")
"""


@dataclass(frozen=True)
class Package:
    """A module that a server imports, what for, and how to install it."""

    module: str
    why: str
    install: str


ROUTER = Package("sglang_router", "it is the load balancer", f"{PIP} sglang-router")


def locate(module: str, path: Sequence[str] | None = None) -> Path | None:
    """File or directory of a module, nothing imported; None where it is not installed. `path` is a sys.path."""
    names = module.split(".")
    for depth in range(len(names)):
        name = ".".join(names[: depth + 1])
        spec = find_spec(name) if path is None else PathFinder.find_spec(name, path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
        if path is None and depth + 1 < len(names):
            return None
    return Path(spec.origin if spec and spec.origin else next(iter(path or ())))


def flash_mla_modules(sglang: Path) -> tuple[str, ...]:
    """The FlashMLA modules that an installed SGLang imports for DeepSeek-V4; they changed over the releases."""
    sources = [(sglang / user).read_text() for user in FLASH_MLA_USERS if (sglang / user).is_file()]
    return tuple(dict.fromkeys(name for source in sources for name in _FLASH_MLA.findall(source)))


def wanted(a2a: str | None, backend: str | None, is_dsv4: bool, path: Sequence[str] | None = None) -> Iterator[Package]:
    """What a server with this MoE all-to-all, transfer backend and model imports, and the load balancer."""
    yield Package("sgl_kernel", "every CUDA server of SGLang imports it", f"{PIP} sglang-kernel")
    if a2a == "deepep":
        why = "--moe-a2a-backend deepep dispatches to the experts with it"
        yield Package("deep_ep", why, f"{PIP} sgl-deep-ep, or use SGLang's image")
    if a2a == "deepep" or is_dsv4:
        yield Package("deep_gemm", "experts and indexer of the model run on it", f"{PIP} sgl-deep-gemm")
    sglang = locate("sglang", path)
    for module in flash_mla_modules(sglang.parent) if is_dsv4 and sglang else ():
        yield Package(module, "DeepSeek-V4's attention is FlashMLA", f"{PIP} sglang with its dependencies")
    if backend in BACKENDS:
        module, install = BACKENDS[backend]
        yield Package(module, f"--disaggregation-transfer-backend {backend} hands the state over with it", install)
    yield ROUTER


def installed(package: Package, path: Sequence[str] | None = None) -> Finding:
    """Whether a package is there."""
    found = locate(package.module, path)
    if found is None:
        return error("package", f"{package.module} is not installed", package.why, package.install)
    return ok("package", f"{package.module} at {found}")


def importable(packages: Iterable[Package]) -> list[Finding]:
    """An error for each package that is there and cannot be imported: a missing library, another CUDA or GPU."""
    there = [package for package in packages if locate(package.module)]
    with ThreadPoolExecutor() as pool:
        problems = pool.map(import_problem, [package.module for package in there])
    do = f"install the library that it names, or build for this torch and GPU; {sys.executable} -c 'import torch, "
    return [
        error("package", f"{package.module} cannot be imported: {problem}", package.why, f"{do}{package.module}'")
        for package, problem in zip(there, problems, strict=True)
        if problem
    ]


def import_problem(module: str) -> str | None:
    """The first reason why `import torch, module` fails, in one line; None where it does not."""
    command = [sys.executable, "-c", _IMPORT, module]
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {IMPORT_TIMEOUT_S:.0f} s"
    if not run.returncode:
        return None
    told = "" if run.returncode < 0 else " ".join(run.stderr.split())[-200:]
    return told or f"exit code {run.returncode}"
