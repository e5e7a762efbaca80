"""Are the questions there that a test asks?"""

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Thread
from urllib.parse import urlparse

from pdkit.core.gsm8k import SCORERS, DatasetError, read_lines
from pdkit.core.source import read
from pdkit.preflight.environment.packages import locate
from pdkit.preflight.finding import Finding, error, ok, warning

WHY = "the servers would load for minutes before the eval finds out"
DO = "set SGLANG_PD_GSM8K to a .jsonl file of GSM8K questions"
TIMEOUT_S = 2.0


def default_url() -> str | None:
    """Where the installed SGLang downloads GSM8K from, read from its source."""
    for name in SCORERS:
        path = locate(name)
        source = path and read(path)
        if source and isinstance(url := source.value(source.constants.get("GSM8K_URL")), str):
            return url
    return None


def check(path: str | None, tmp: Path = Path("/tmp"), environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Findings on the GSM8K questions at `path`, or on those that SGLang keeps in `tmp` or downloads."""
    if path is not None:
        yield _readable(Path(path), f"correct the path, or {DO}")
        return
    url = default_url()
    if url is None:
        yield error("data", "the installed SGLang names no GSM8K questions", WHY, DO)
        return
    cached = tmp / url.rpartition("/")[2]
    if cached.exists():
        yield _readable(cached, f"remove it, it is downloaded again, or {DO}")
    elif any(environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        yield warning("data", f"GSM8K is not at {cached}", "it will be downloaded through the proxy", DO)
    elif reachable(urlparse(url).hostname):
        yield ok("data", f"GSM8K will be downloaded from {url}")
    else:
        yield error("data", f"GSM8K is not at {cached}, and {urlparse(url).hostname} does not answer", WHY, DO)


def _readable(path: Path, do: str) -> Finding:
    try:
        rows = read_lines(path)
    except DatasetError as problem:
        return error("data", str(problem), WHY, do)
    return ok("data", f"{len(rows)} questions at {path}")


def reachable(host: str | None, port: int = 443, timeout: float = TIMEOUT_S) -> bool:
    """Whether a host answers within `timeout` seconds, the look-up of its name included."""
    answers: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout).close()
            answers.append(True)
        except OSError:
            pass

    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers)
