"""What a machine must have for the target `sglang-cpu`, asked before anything is started."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

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
    problems = [
        *missing_packages(),
        *missing_libraries(),
        *too_little_memory(psutil.virtual_memory().available / 2**30),
        *too_few_ports(),
    ]
    try:
        drift.require_fit()
    except NotReady as reason:
        problems.append(str(reason))
    if problems:
        raise NotReady("\n".join(problems))


def missing_packages() -> list[str]:
    """One line for each Python package that is not installed."""
    return [
        f"target sglang-cpu needs the package {package}: pip install -r requirements-cpu.lock"
        for module, package in PACKAGES.items()
        if importlib.util.find_spec(module) is None
    ]


def missing_libraries() -> list[str]:
    """One line that names the Debian packages which are missing, or none."""
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
    missing = [LIBRARIES[name] for name in looked.stdout.split()]
    if not missing:
        return []
    return [
        f"target sglang-cpu needs Debian's {', '.join(missing)} for the transfer backends: "
        f"apt-get install {' '.join(missing)}, or without root scripts/transfer_libraries.sh"
    ]


def too_little_memory(available_gib: float) -> list[str]:
    """One line if less than MEMORY_GIB is free."""
    if available_gib >= MEMORY_GIB:
        return []
    return [f"target sglang-cpu needs {MEMORY_GIB} GiB of memory, {available_gib:.1f} GiB are free: end other programs"]


def too_few_ports() -> list[str]:
    """One line if there is no block of free ports for servers and routers."""
    try:
        ports.claim().release()
    except RuntimeError as problem:
        remedy = getattr(problem, "remedy", "end what listens there")
        return [f"target sglang-cpu needs ports for its servers, and there are {problem}: {remedy}"]
    return []
