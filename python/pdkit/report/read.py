"""Reading a report directory, also one of a run that was killed: what is missing or broken is a note, not an error."""

import json
import math
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pdkit.exit_codes import UsageError
from pdkit.main_job import Result, read_report
from pdkit.report import model
from pdkit.report.evidence import ENVIRONMENT_FILE, GPU_PLAN_FILE, directory_of
from pdkit.report.record import FILE as RECORDS_FILE

TAIL_LINES = 40
FAILURE_LINES = 80

_RULE = "=" * 70
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LAUNCH = re.compile(r"\[(?P<name>[a-z][\w -]*)\] (?P<command>.+)\n\[(?P=name)\] log: .+")
_DEATH = re.compile(r"\[supervisor\] (?P<death>.+ exited with code .+)")
_ACCEPTANCE = re.compile(r"\baccept len: (?P<length>[\d.]+)")
_DECODE_RATE = re.compile(r"\bgen throughput \(token/s\): (?P<rate>[\d.]+)")


class NoReport(UsageError):
    """There is no run to report on; the message is one line."""


@dataclass
class _Reader:
    """Reads files below `root`; remembers what could not be read."""

    root: Path
    notes: list[str] = field(default_factory=list)

    def json(self, name: str, default: Any) -> Any:
        path = self.root / name
        if not path.exists():
            return default
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            self.notes.append(f"{name} cannot be read: {error}")
            return default

    def json_lines(self, path: Path, make: Callable[[dict], Any]) -> list[Any]:
        found, broken = [], 0
        for line in self.lines(path):
            try:
                found.append(make(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError):
                broken += 1
        if broken:
            self.notes.append(f"{path.relative_to(self.root)}: {broken} lines cannot be read")
        return found

    def lines(self, path: Path) -> list[str]:
        """Without colours; none where there is no such file."""
        try:
            return _ANSI.sub("", path.read_text(errors="replace")).splitlines() if path.exists() else []
        except OSError as error:
            self.notes.append(f"{path.relative_to(self.root)} cannot be read: {error.strerror}")
            return []


def read_directory(root: Path) -> model.Report:
    """The run that left `root`. Raises NoReport where there is no results.json in it."""
    reader = _Reader(root)
    results = reader.json("results.json", None)
    entries = results.get("files", []) if isinstance(results, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise NoReport(f"{root}: no results.json of a run with --report-dir" + "".join(f"; {n}" for n in reader.notes))
    files = tuple(_file(reader, entry) for entry in entries)
    scored = [run.score for run in files if run.score]
    suite, hw = results.get("suite") or "?", results.get("hw") or "?"
    return model.Report(
        title=f"main job on rung {scored[0].rung}" if len(files) == 1 and scored else f"suite {suite}",
        result=results.get("result"),
        exit_code=results.get("exit_code"),
        seconds=results.get("seconds") or 0.0,
        suite=suite,
        hw=hw,
        files=files,
        surroundings=reader.json(ENVIRONMENT_FILE, {}),
        gpu_plans=tuple(reader.json(GPU_PLAN_FILE, ())),
        notes=tuple(reader.notes),
    )


def _file(reader: _Reader, entry: dict[str, Any]) -> model.FileRun:
    attempts = entry.get("attempts") or [{}]
    log_name = attempts[-1].get("log") or ""
    seconds = entry.get("seconds") or 0.0
    base = dict(
        file=entry.get("file", "?"),
        state=entry.get("state", "?"),
        reason=entry.get("reason") or "",
        seconds=seconds,
        attempts=len(entry.get("attempts") or ()),
        counts=entry.get("tests") or {},
        command=shlex.join(entry.get("command") or ()),
        log=log_name,
    )
    if not log_name:
        return model.FileRun(**base)
    log = reader.root / log_name
    directory, lines = directory_of(log), reader.lines(log)
    records = reader.json_lines(directory / RECORDS_FILE, _record)
    told = read_report(lines)
    death = next((match["death"] for line in lines if (match := _DEATH.search(line))), None)
    servers = {path: reader.lines(path) for path in sorted(directory.glob("*.log"))}
    everything = [line for content in servers.values() for line in content]
    examples = [e for path in sorted(directory.glob("*.jsonl")) for e in _examples(reader, path)]
    return model.FileRun(
        **base,
        launched=_launched(lines),
        phases=_phases(records, seconds),
        score=_score(told.result),
        throughput=told.throughput,
        acceptance_lengths=_floats(_ACCEPTANCE, everything) or tuple(filter(None, [told.acceptance_length])),
        decode_rates=_floats(_DECODE_RATE, everything),
        examples=tuple(sorted(examples, key=lambda example: example.number)),
        tables=tuple(_table(record) for record in records if record["kind"] == "table"),
        metrics=tuple(
            m for path in sorted(directory.glob("metrics.*.jsonl")) for m in reader.json_lines(path, _metric)
        ),
        logs=_logs(reader.root, servers, log, lines, death),
        failure=_failure(lines),
        death=death,
    )


def _launched(lines: list[str]) -> tuple[tuple[str, str], ...]:
    """Name and command of each process, told by a line in front of the one that says where its log is."""
    pairs = map("\n".join, pairwise(lines))
    found = [(match["name"], match["command"]) for pair in pairs if (match := _LAUNCH.fullmatch(pair))]
    return tuple(dict.fromkeys(found))


def _record(line: dict) -> dict:
    """What a test handed over. Raises ValueError, KeyError or TypeError where it is not what its kind has."""
    if line["kind"] == "phase":
        names = ("at",) if line["state"] == "begins" else ("at", "seconds")
        return line | {"name": str(line["name"])} | {name: _finite(line[name]) for name in names}
    if line["kind"] == "table":
        _table(line)
    return line


def _finite(number: Any) -> float:
    if not math.isfinite(number):
        raise ValueError(number)
    return number


def _phases(records: Iterable[dict], seconds: float) -> tuple[model.Phase, ...]:
    begun: dict[str, float] = {}
    phases = []
    for record in records:
        if record["kind"] != "phase":
            continue
        name, at = record["name"], record["at"]
        if record["state"] == "begins":
            begun[name] = at
        else:
            phases.append(
                model.Phase(name, record["state"], begun.pop(name, at - record["seconds"]), record["seconds"])
            )
    phases += [model.Phase(name, model.UNFINISHED, at, max(seconds - at, 0.0)) for name, at in begun.items()]
    return tuple(sorted(phases, key=lambda phase: phase.start))


def _examples(reader: _Reader, path: Path) -> list[model.Example]:
    if path.name == RECORDS_FILE or path.name.startswith("metrics."):
        return []
    return reader.json_lines(path, _example)


def _example(line: dict) -> model.Example:
    return model.Example(
        number=line["example"],
        score=line["score"],
        seconds=_finite(line["seconds"]),
        completion_tokens=line.get("completion_tokens"),
        prompt=line["prompt"],
        answer=line["answer"],
        correct_answer=line.get("correct_answer"),
        extracted_answer=line.get("extracted_answer"),
    )


def _score(result: Result | None) -> model.Score | None:
    if result is None or not result.examples:
        return None
    return model.Score(result.rung, result.engine, result.correct, result.examples, float(result.gate.lstrip(">= ")))


def _floats(pattern: re.Pattern, lines: Iterable[str]) -> tuple[float, ...]:
    return tuple(float(match[1]) for line in lines if (match := pattern.search(line)))


def _table(record: dict) -> model.Table:
    rows = tuple(tuple(str(cell) for cell in row) for row in record.get("rows", ()))
    return model.Table(
        record.get("title", "?"), tuple(map(str, record.get("columns", ()))), rows, record.get("note", "")
    )


def _metric(line: dict) -> tuple[str, str]:
    value = line["value"]
    return line["metric_name"], f"{value:.4g}" if isinstance(value, float) else str(value)


def _logs(root: Path, servers: dict[Path, list[str]], log: Path, lines: list[str], death: str | None) -> tuple:
    """Who died first comes first; where nobody did it was the test that failed."""
    victim = death.split(" exited ")[0] if death else None
    found = []
    for path in sorted(log.parent.glob(f"{log.stem}.hang.txt")):
        found.append(model.Log("where it hung", path.name, tuple(path.read_text(errors="replace").splitlines())))
    found.append(model.Log("test", log.name, tuple(lines[-TAIL_LINES:])))
    for path, content in servers.items():
        name = path.stem.rpartition(".")[2].replace("_", " ")
        found.append(model.Log(name, str(path.relative_to(root)), tuple(content[-TAIL_LINES:]), name == victim))
    return tuple(sorted(found, key=lambda each: not each.died))


def _failure(lines: list[str]) -> str:
    """The first failure as unittest prints it."""
    starts = [i for i, line in enumerate(lines) if line == _RULE and lines[i + 1 : i + 2]]
    start = next((i for i in starts if lines[i + 1].startswith(("FAIL:", "ERROR:"))), None)
    if start is None:
        return ""
    rest = lines[start + 1 :]
    end = next((i for i, line in enumerate(rest) if line == _RULE or re.match(r"Ran \d+ tests? in ", line)), len(rest))
    rest = [line for line in rest[:end] if line.strip("- ")]
    kept = rest if len(rest) <= FAILURE_LINES else [*rest[:20], "...", *rest[-(FAILURE_LINES - 21) :]]
    return "\n".join(kept)
