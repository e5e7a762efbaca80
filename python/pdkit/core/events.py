"""The one channel from a run's processes to its readers: JSON lines, one event per line, in the run's directory.

    from pdkit.core import events

    with events.phase("load weights"):
        ...
    events.score("gsm8k", 0.985, 200, gate=0.95, engine="sglang 0.5.23")

Each event has a `kind` and `ts`, seconds since 1970. The functions below that print do so for people alone: whoever
wants to know what happened reads events. Without a directory (PDKIT_REPORT_DIR) nothing is written.

started   of the runner, first of all: an attempt at a test file begins
phase     name, state: begins, passed or failed; seconds, except where it begins
launch    name, command, log (path or None), pid
death     name, cause (one line), excerpt (text), log
progress  done, total, score (so far)
score     eval, score, examples, gate (the score must be greater), target, engine, throughput (output tokens/s),
          acceptance_length (tokens per verification step)
measurement  name, value: a figure that a test found beside its score, such as "acceptance length"
verdict   check, passed, message: what a check found that is not a test of its own
finding   passed, sentence: what the test that is running found, in plain words
compared  condition, boundaries, requests: see `pdkit.checks.hints.Evidence`; further: see `pdkit.checks.parity.verdict.Parity`
table     title, columns, rows, note
test      id, method (without a sub-test's parameters), state, seconds (None if it was never started), what (the first
          line of its docstring), message (first lines in plain words), details (traceback)
run       tests, successful: a unittest program has run all its tests; left: ids of those that it did not come to
"""

import contextlib
import errno
import hashlib
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "PDKIT_REPORT_DIR"
HARM = "harm: "
FULL = (errno.ENOSPC, errno.EDQUOT)
TARGET_VARIABLE = "PDKIT_TARGET"
FILE = "events.jsonl"

deaths: list[str] = []  # causes of those that this process reported

PASSED, FAILED, ERROR, SKIPPED = "passed", "failed", "error", "skipped"  # states of tests; the first two of phases
EXPECTED_FAILURE, UNEXPECTED_SUCCESS = "expected failure", "unexpected success"
BAD = (FAILED, ERROR, UNEXPECTED_SUCCESS)


class Events(list[dict[str, Any]]):
    """Events in the order in which they were written; `broken` counts lines that are not events."""

    def __init__(self, events: Sequence[dict[str, Any]] = (), broken: int = 0):
        super().__init__(events)
        self.broken = broken

    def of(self, *kinds: str) -> "Events":
        """Those of some kinds."""
        return Events([event for event in self if event["kind"] in kinds], self.broken)


def emit(kind: str, **fields: Any) -> None:
    """Appends {"kind": kind, "ts": seconds since 1970, **fields}; raises TypeError if a field is not JSON.

    A channel that cannot be written is reported on stderr, and the test goes on: what has no event has not happened.
    """
    emit_into(os.environ.get(VARIABLE), kind, **fields)


def emit_into(directory: str | None, kind: str, **fields: Any) -> None:
    """The same into a directory that need not be the environment's; nothing if there is none."""
    if not directory:
        return
    path, where = Path(directory), "lost"
    try:
        append(path, kind, **fields)
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            if error.errno in FULL:
                with contextlib.suppress(OSError):
                    spare_of(path).mkdir(mode=0o700, exist_ok=True)
                    append(spare_of(path), kind, **fields)
                    where = "kept elsewhere"
            print(f"[events] {kind} is {where}, {directory}: {error.strerror}", file=sys.stderr, flush=True)


def spare_of(directory: Path) -> Path:
    """Where events go that do not fit into a directory: verdicts stand although its disk is full."""
    name = hashlib.sha256(os.fsencode(directory.absolute())).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"pdkit-events-{os.getuid()}-{name}")


def append(directory: Path, kind: str, **fields: Any) -> None:
    """The same into a directory that is known; raises OSError. A line is written at once: processes may share the file.

    Where a process was killed amid its last line, the next line still begins on its own.
    """
    event = {"kind": kind, "ts": round(time.time(), 3), **fields}
    line = (json.dumps(event, ensure_ascii=False) + "\n").encode(errors="replace")  # of lone surrogates
    with open(directory / FILE, "a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        is_torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        data = b"\n" * is_torn + line
        while data:  # a disk that is full takes a part of it first, and raises then
            data = data[file.write(data) :]


def parse(data: bytes) -> Events:
    """The events of whole lines; a line that lacks what its kind has, or has NaN, is counted as broken."""
    found = Events()
    for line in filter(bytes.strip, data.split(b"\n")):
        try:
            event = json.loads(line, parse_constant=_refuse)
            _check(event)
            found.append(event)
        except (ValueError, KeyError, TypeError):
            found.broken += 1
    return found


def _check(event: dict[str, Any]) -> None:
    """Raises KeyError or TypeError. Kinds that are not known here are let through."""
    fields = _FIELDS["every"] | _FIELDS.get(event["kind"], {})
    if event["kind"] == "phase" and event["state"] != "begins":
        fields |= {"seconds": float}
    for name, kind in fields.items():
        value = event[name]
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{name} is {value!r}, expected {kind.__name__}")
    if not all(isinstance(row, list) for row in event.get("rows", ())):
        raise TypeError("rows are lists of cells")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_FIELDS: dict[str, dict[str, type]] = {
    "every": {"kind": str, "ts": float},
    "phase": {"name": str, "state": str},
    "launch": {"name": str, "command": str},
    "death": {"name": str, "cause": str, "excerpt": str},
    "progress": {"done": int, "total": int, "score": float},
    "score": {"eval": str, "score": float, "examples": int},
    "measurement": {"name": str, "value": float},
    "verdict": {"check": str, "passed": bool, "message": str},
    "finding": {"passed": bool, "sentence": str},
    "compared": {"condition": str, "boundaries": dict, "requests": list},
    "table": {"title": str, "columns": list, "rows": list},
    "test": {"id": str, "state": str, "message": str, "details": str},
    "run": {"tests": int, "successful": bool},
}


def read(path: Path | str) -> Events:
    """The events in a file, or in the FILE of a directory; none if there is no such file. Raises OSError otherwise."""
    path, data = Path(path), b""
    for each in (path / FILE, spare_of(path) / FILE) if path.is_dir() else (path,):
        with contextlib.suppress(FileNotFoundError):
            data += each.read_bytes() + b"\n"
    return parse(data)


class Tail:
    """Follows the events in the FILE of a directory, which need not be there yet."""

    def __init__(self, directory: Path):
        self._path = directory / FILE
        self._offset = 0

    def new(self) -> Events:
        """The events in lines that were ended since the last call. Raises OSError if the file cannot be read."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return Events()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return parse(whole)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase of the run: prints and emits that it begins, how many seconds it took, and whether it failed."""
    print(f"[phase] {name} begins", flush=True)
    emit("phase", name=name, state="begins")
    start, state = time.monotonic(), FAILED
    try:
        yield
        state = PASSED
    finally:
        seconds = time.monotonic() - start
        emit("phase", name=name, state=state, seconds=round(seconds, 3))
        print(f"[phase] {name}{' failed' * (state == FAILED)}: {seconds:.1f} s", flush=True)


def launch(name: str, command: Sequence[str] | str, log: Path | str | None, pid: int | None) -> None:
    """A process was started: `command` as a shell reads it or as words, `log` where its output goes."""
    command = command if isinstance(command, str) else shlex.join(command)
    print(f"[{name}] {command}" + (f"\n[{name}] log: {log}" if log else ""), flush=True)
    emit("launch", name=name, command=command, log=log and str(log), pid=pid)


def death(name: str, cause: str, excerpt: str = "", log: Path | str | None = None) -> None:
    """A process ended that should run: `cause` on one line, `excerpt` the lines of its log that show why."""
    deaths.append(cause)
    with contextlib.suppress(OSError, ValueError):  # a console that is gone must not lose a death
        print(f"[supervisor] {cause}", file=sys.stderr, flush=True)
    emit("death", name=name, cause=cause, excerpt=excerpt, log=log and str(log))


def score(
    eval_name: str,
    score: float,
    examples: int,
    gate: float | None = None,
    target: str | None = None,
    engine: str | None = None,
    throughput: float | None = None,
    acceptance_length: float | None = None,
) -> None:
    """An eval was scored: `score` is the share of right answers among `examples`, which must be greater than `gate`.

    target             what was tested; default: the environment's PDKIT_TARGET
    throughput         output tokens per second
    acceptance_length  tokens per verification step, if the engine speculates
    """
    target = target or os.environ.get(TARGET_VARIABLE) or None
    parts = [f"target={target}" if target else "", f"engine={engine}" if engine else ""]
    parts += [f"{eval_name}={score:.3f} examples={examples}", "" if gate is None else f"gate=>{gate:g}"]
    print(" ".join(filter(None, parts)), flush=True)
    emit(
        "score",
        eval=eval_name,
        score=float(score),
        examples=int(examples),
        gate=gate,
        target=target,
        engine=engine,
        throughput=throughput,
        acceptance_length=acceptance_length,
    )


def progress(done: int, total: int, score: float) -> None:
    """An eval has scored `done` of `total` examples, `score` so far."""
    print(f"\n[progress] {done}/{total}, score so far {score:.3f}", flush=True)
    emit("progress", done=done, total=total, score=score)


def harm(what: str, took_effect: bool, why_not: str = "") -> None:
    """Harm that a test did on purpose: a kill, a freeze, a fault. A file where some had no effect does not pass."""
    verdict(f"{HARM}{what}", took_effect, "" if took_effect else why_not or "it had no effect")


def unmet_harm(happened: Events) -> list[str]:
    """What was done on purpose and never took effect."""
    done = [event for event in happened.of("verdict") if event["check"].startswith(HARM)]
    took = {event["check"] for event in done if event["passed"]}
    return list(dict.fromkeys(each["check"].removeprefix(HARM) for each in done if each["check"] not in took))


def measurement(name: str, value: float) -> None:
    """A figure for the report and the history."""
    emit("measurement", name=name, value=value)


def verdict(check: str, passed: bool, message: str = "") -> None:
    """What a check found that is no test of its own."""
    emit("verdict", check=check, passed=bool(passed), message=message)


def finding(sentence: str, passed: bool = True) -> None:
    """What the test that is running found, in plain words: its row of the report says so."""
    emit("finding", passed=bool(passed), sentence=sentence)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
    """A table for the report: cells are texts and numbers, the first of a row is its heading."""
    for row in rows:
        assert len(row) == len(columns), f"table {title}: row {row} has {len(row)} cells, expected {len(columns)}"
    emit("table", title=title, columns=list(columns), rows=list(map(list, rows)), note=note)
