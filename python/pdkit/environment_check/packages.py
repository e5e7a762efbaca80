"""Packages that the flags of a server need, found without importing them."""

import re
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from pdkit.environment_check.finding import Finding, error, ok

BACKENDS = {
    "mooncake": ("mooncake.engine", "pip install mooncake-transfer-engine"),
    "mooncake_tcp": ("mooncake.engine", "pip install mooncake-transfer-engine"),
    "nixl": ("nixl._api", "pip install nixl"),
    "mori": ("mori.io", "install MORI from SGLang's ROCm image"),
    "ascend": ("memfabric_hybrid", "pip install memfabric-hybrid"),
}
ROUTER = ("sglang_router", "it is the load balancer", "pip install sglang-router")
FLASH_MLA_USERS = (
    Path("srt", "layers", "attention", "deepseek_v4_backend.py"),
    Path("kernels", "ops", "attention", "flash_mla_interface.py"),
)
_FLASH_MLA = re.compile(r"^\s*(?:from|import) (sgl_kernel\.flash_mla|flash_mla)\b", re.MULTILINE)


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
    return Path(spec.origin if spec.origin else next(iter(path)))


def flash_mla_modules(sglang: Path) -> tuple[str, ...]:
    """The FlashMLA modules that an installed SGLang imports for DeepSeek-V4; they changed over the releases."""
    sources = [(sglang / user).read_text() for user in FLASH_MLA_USERS if (sglang / user).is_file()]
    return tuple(dict.fromkeys(name for source in sources for name in _FLASH_MLA.findall(source)))


def check(a2a: str | None, backend: str | None, is_dsv4: bool, path: Sequence[str] | None = None) -> Iterator[Finding]:
    """One finding for each package that a server with this MoE all-to-all, transfer backend and model needs."""
    wanted = [("sgl_kernel", "every CUDA server of SGLang imports it", "pip install sglang-kernel")]
    if a2a == "deepep":
        why = "--moe-a2a-backend deepep dispatches to the experts with it"
        wanted.append(("deep_ep", why, "pip install sgl-deep-ep, or use SGLang's image"))
    if a2a == "deepep" or is_dsv4:
        why = "experts and indexer of the model run on it"
        wanted.append(("deep_gemm", why, "pip install sgl-deep-gemm"))
    sglang = locate("sglang", path)
    for module in flash_mla_modules(sglang.parent) if is_dsv4 and sglang else ():
        wanted.append((module, "DeepSeek-V4's attention is FlashMLA", "pip install sglang with its dependencies"))
    if backend in BACKENDS:
        module, install = BACKENDS[backend]
        wanted.append((module, f"--disaggregation-transfer-backend {backend} hands the state over with it", install))
    for row in [*wanted, ROUTER]:
        yield installed(*row, path=path)


def installed(module: str, why: str, install: str, path: Sequence[str] | None = None) -> Finding:
    """Whether one module can be imported."""
    found = locate(module, path)
    if found is None:
        return error("package", f"{module} is not installed", why, install)
    return ok("package", f"{module} at {found}")
