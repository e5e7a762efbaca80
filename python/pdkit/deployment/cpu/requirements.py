"""What a machine must have for the target `sglang-cpu`, asked before anything is started."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

import psutil

from pdkit.core import ports
from pdkit.core.errors import NotReady
from pdkit.deployment.cpu import drift, plan

MEMORY_GIB = 5  # three servers and a router that were forked, and the test process
LIBRARIES = {
    "libibverbs.so.1": "libibverbs1",
    "libnl-3.so.200": "libnl-3-200",
    "libnl-route-3.so.200": "libnl-route-3-200",
    "libnuma.so.1": "libnuma1",
}
"""What Mooncake and NIXL are linked against, and Debian's packages."""
PACKAGES = {"mooncake": "mooncake-transfer-engine-non-cuda", "nixl": "nixl", "sglang_router": "sglang-router"}


def require_machine() -> None:
    """Raises NotReady with one line for each thing that is missing."""
    if missing := list(_problems()):
        raise NotReady("\n".join(missing))


def _problems() -> Iterator[str]:
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            yield f"target sglang-cpu needs the package {package}: pip install -r requirements-cpu.lock"
    if packages := [LIBRARIES[name] for name in _missing_libraries()]:
        yield (
            f"target sglang-cpu needs Debian's {', '.join(packages)} for the transfer backends: "
            f"apt-get install {' '.join(packages)}, or without root scripts/transfer_libraries.sh"
        )
    free = psutil.virtual_memory().available / 2**30
    if free < MEMORY_GIB:
        yield f"target sglang-cpu needs {MEMORY_GIB} GiB of memory, {free:.1f} GiB are free: end other programs"
    try:
        ports.claim().release()
    except RuntimeError as problem:
        remedy = getattr(problem, "remedy", "end what listens there")
        yield f"target sglang-cpu needs ports for its servers, and there are {problem}: {remedy}"
    try:
        drift.require_fit()
    except NotReady as reason:
        yield str(reason)


def _missing_libraries() -> list[str]:
    code = (
        "import ctypes, sys\nfor name in sys.argv[1:]:\n    try: ctypes.CDLL(name)\n    except OSError: print(name)\n"
    )
    looked = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *LIBRARIES],
        env={**os.environ, "LD_LIBRARY_PATH": plan.library_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    return looked.stdout.split()
