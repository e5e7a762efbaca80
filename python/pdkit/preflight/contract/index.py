"""Releases of SGLang on the package index, by pip."""

import re
import subprocess
import sys
from pathlib import Path

from pdkit.core.errors import NotReady

FIRST = (0, 5, 12)  # the first release that serves DeepSeek-V4


class IndexUnavailable(NotReady):
    """pip could not list or fetch releases; the message is one line."""


def sort_key(version: str) -> tuple[int, ...]:
    """Orders releases; those before the first that serves DeepSeek-V4 are less than FIRST."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        reason = next((line for line in run.stderr.splitlines() if "ERROR" in line), run.stderr.strip())
        raise IndexUnavailable(f"pip {arguments[0]}: {reason or 'failed'}")
    return run.stdout


def releases() -> list[str]:
    """Final releases from FIRST on, oldest first. Raises IndexUnavailable."""
    listed = re.search(r"Available versions: (.+)", _pip("index", "versions", "sglang"))
    versions = listed[1].split(", ") if listed else []
    return sorted((v for v in versions if re.fullmatch(r"[\d.]+", v) and sort_key(v) >= FIRST), key=sort_key)


def fetch(version: str, folder: Path) -> None:
    """Downloads the wheel of one release, without its dependencies, into `folder`. Raises IndexUnavailable."""
    wanted = ("--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(folder))
    _pip("download", *wanted, f"sglang=={version}")
