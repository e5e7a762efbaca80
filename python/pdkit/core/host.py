"""Where a run took place: command, machine, versions, environment."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdkit.core.gpus import visible_gpus
from pdkit.core.secrets import cleaned, redacted

PACKAGES = (
    "sglang",
    "sglang-router",
    "sgl-kernel",
    "torch",
    "transformers",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
    "nixl",
    "flashinfer-python",
    "deep-ep",
    "openai",
)


def describe(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Plain data; `environment` is without secrets, absent packages are left out."""
    return {
        "command": command_line(),
        "directory": os.getcwd(),
        "commit": commit(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [*map(str, visible_gpus(environ))],
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "environment": redacted(environ),
    }


def command_line() -> list[str]:
    return [sys.executable, *map(cleaned, sys.argv)]


def commit(directory: Path) -> str | None:
    """Of the checkout that a directory is in; `+` after it where tracked files were changed."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(directory), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return None


def installed(distribution: str) -> str | None:
    """The installed version of a distribution; None where there is none."""
    from importlib.metadata import PackageNotFoundError, version  # and with it email: only who asks pays for it

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
