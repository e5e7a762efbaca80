"""Reading a report directory, also one of a run that was killed: what is missing or broken is a note, not an error."""

import json
import math
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdkit.checks.hints import Evidence
from pdkit.core import events
from pdkit.core.errors import UsageError
from pdkit.core.events import BAD, Events
from pdkit.runner.report import facts, model
from pdkit.runner.report.evidence import ENVIRONMENT_FILE, GPU_PLAN_FILE, directory_of
from pdkit.runner.report.rows import hint_of, in_words, rows_of

TAIL_LINES = 40
FAILURE_LINES = 80

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ACCEPTANCE = re.compile(r"\baccept len: (?P<length>[\d.]+)")
_DECODE_RATE = re.compile(r"\bgen throughput \(token/s\): (?P<rate>[\d.]+)")


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

    def json_lines(self, path: Path, make: Callable[[dict[str, Any]], Any]) -> list[Any]:
        found, broken = [], 0
        for line in self.lines(path):
            try:
                found.append(make(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError):
                broken += 1
        self._note_broken(path, broken)
        return found

    def events(self, directory: Path) -> Events:
        path = directory / events.FILE
        try:
            found = events.read(path)
        except OSError as error:
            self.notes.append(f"{path.relative_to(self.root)} cannot be read: {error.strerror}")
            return Events()
        self._note_broken(path, found.broken)
        return found

    def _note_broken(self, path: Path, count: int) -> None:
        if count:
            self.notes.append(f"{path.relative_to(self.root)}: {count} lines cannot be read")

    def lines(self, path: Path) -> list[str]:
        """Without colours; none where there is no such file."""
        try:
            return _plain(path.read_text(errors="replace")).splitlines() if path.exists() else []
        except OSError as error:
            self.notes.append(f"{path.relative_to(self.root)} cannot be read: {error.strerror}")
            return []


def read_directory(root: Path) -> model.Report:
    """The run that left `root`. Raises UsageError where there is no results.json in it."""
    reader = _Reader(root)
    results = reader.json("results.json", None)
    entries = results.get("files", []) if isinstance(results, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(
            f"{root}: no results.json of a run with --report-dir" + "".join(f"; {n}" for n in reader.notes)
        )
    return _report(reader, results)


def read_results(root: Path, results: dict[str, Any]) -> model.Report:
    """The same of results that are in memory, whatever became of the file."""
    return _report(_Reader(root), results)


def _report(reader: _Reader, results: dict[str, Any]) -> model.Report:
    files = tuple(_file(reader, entry) for entry in results.get("files", []))
    scored = [run.score for run in files if run.score]
    suite, hw = results.get("suite") or "?", results.get("hw") or "?"
    target = results.get("target") or (scored[0].target if scored else None)
    return model.Report(
        title=f"main job on {target or 'unknown'}" if len(files) == 1 and (scored or target) else f"suite {suite}",
        target=target,
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
    happened = reader.events(directory)
    death = _death(happened)
    servers = {path: reader.lines(path) for path in sorted(directory.glob("*.log"))}
    everything = [line for content in servers.values() for line in content]
    examples = [e for path in sorted(directory.glob("*.jsonl")) for e in _examples(reader, path)]
    return model.FileRun(
        **base,
        launched=tuple(dict.fromkeys((event["name"], event["command"]) for event in happened.of("launch"))),
        phases=facts.phases_of(happened, seconds),
        score=facts.score_of(happened),
        acceptance_lengths=_floats(_ACCEPTANCE, everything)
        or tuple(filter(None, [facts.acceptance_length_of(happened)])),
        decode_rates=_floats(_DECODE_RATE, everything),
        examples=tuple(sorted(examples, key=lambda example: example.number)),
        tables=tuple(map(_table, happened.of("table"))),
        metrics=tuple(
            m for path in sorted(directory.glob("metrics.*.jsonl")) for m in reader.json_lines(path, _metric)
        ),
        logs=_logs(reader.root, servers, log, lines, death, happened),
        failure=_failure(happened),
        rows=rows_of(happened),
        hint=hint_of(happened),
        compared=tuple(map(_compared, happened.of("compared"))),
        death=death,
    )


def _death(happened: Events) -> model.Death | None:
    for event in happened.of("death"):
        log = event.get("log")
        return model.Death(
            event["name"], event["cause"], tuple(_plain(event["excerpt"]).splitlines()), log and Path(log).name
        )
    return None


def _examples(reader: _Reader, path: Path) -> list[model.Example]:
    if path.name == events.FILE or path.name.startswith("metrics."):
        return []
    return reader.json_lines(path, _example)


def _example(line: dict[str, Any]) -> model.Example:
    if not math.isfinite(line["seconds"]):
        raise ValueError(line["seconds"])
    given: dict[str, Any] = {name: line[name] for name in ("score", "seconds", "prompt", "answer")}
    perhaps = ("completion_tokens", "correct_answer", "extracted_answer", "began")
    given |= {name: line.get(name) for name in perhaps}
    return model.Example(number=line["example"], **given)


def _plain(text: str) -> str:
    """Without colours."""
    return _ANSI.sub("", text)


def _floats(pattern: re.Pattern[str], lines: Iterable[str]) -> tuple[float, ...]:
    return tuple(float(match[1]) for line in lines if (match := pattern.search(line)))


def _table(event: dict[str, Any]) -> model.Table:
    rows = tuple(tuple(map(str, row)) for row in event["rows"])
    return model.Table(event["title"], tuple(map(str, event["columns"])), rows, event.get("note") or "")


def _metric(line: dict[str, Any]) -> tuple[str, str]:
    value = line["value"]
    return line["metric_name"], f"{value:.4g}" if isinstance(value, float) else str(value)


def _logs(
    root: Path,
    servers: dict[Path, list[str]],
    log: Path,
    lines: list[str],
    death: model.Death | None,
    happened: Events,
) -> tuple[model.Log, ...]:
    """Who died first comes first; where nobody did it was the test that failed."""
    names = {Path(event["log"]).name: event["name"] for event in happened.of("launch") if event.get("log")}
    found = []
    for path in sorted(log.parent.glob(f"{log.stem}.hang.txt")):
        found.append(model.Log("where it hung", path.name, tuple(path.read_text(errors="replace").splitlines())))
    found.append(model.Log("test", log.name, tuple(lines[-TAIL_LINES:])))
    for path, content in servers.items():
        name = names.get(path.name) or path.stem.rpartition(".")[2].replace("_", " ")
        died = death is not None and path.name == death.log
        excerpt = death.excerpt if death and died else ()
        shown = excerpt or tuple(content[-TAIL_LINES:])
        found.append(model.Log(name, str(path.relative_to(root)), shown, died))
    return tuple(sorted(found, key=lambda each: not each.died))


def _compared(event: dict[str, Any]) -> model.ComparedRound:
    further = event.get("further")
    return model.ComparedRound(Evidence.of_event(event), None if further is None else tuple(further))


def _failure(happened: Events) -> str:
    """The first test that failed: which, why in plain words, and its traceback."""
    test = next((test for test in happened.of("test") if test["state"] in BAD), None)
    if test is None:
        return ""
    message = in_words(test["message"], happened[: happened.index(test)])
    lines = _plain(f"{test['state']}: {test['id']}\n{message}\n{test['details']}").splitlines()
    lines = [line for line in lines if line.strip()]
    kept = lines if len(lines) <= FAILURE_LINES else [*lines[:20], "...", *lines[-(FAILURE_LINES - 21) :]]
    return "\n".join(kept)
