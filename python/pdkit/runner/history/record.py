"""One run as one line of JSON."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from pdkit.core import events
from pdkit.core.errors import ExitCode
from pdkit.core.events import Events
from pdkit.core.host import commit, installed
from pdkit.runner.options import Options
from pdkit.runner.report import facts
from pdkit.runner.report.evidence import directory_of
from pdkit.runner.report.model import UNFINISHED
from pdkit.runner.results import FileResult, all_passed

VERSION = 1
_STRICT = {"allow_inf_nan": False}


@dataclass(frozen=True)
class Measurement:
    """What a test of the main job measured: `correct` of `examples`, phases in seconds, tokens per verification step."""

    __pydantic_config__ = _STRICT

    file: str
    target: str | None
    engine: str | None
    correct: int | None
    examples: int | None
    gate: str | None
    throughput: float | None
    acceptance_length: float | None
    phases: dict[str, float]


@dataclass(frozen=True)
class FileRecord:
    """A file that was started: its state, seconds of its last attempt, and what it was expected to take."""

    __pydantic_config__ = _STRICT

    file: str
    hw: str
    suite: str
    state: str
    seconds: float
    est_time: float
    attempts: int

    @property
    def passed(self) -> bool:
        return self.state == "passed"


@dataclass(frozen=True)
class Record:
    """A run of `test/run_suite.py` or `pdkit run`. `time`: when it began, in UTC; `seconds` in all."""

    __pydantic_config__ = _STRICT

    version: int
    time: datetime
    commit: str | None
    modified: bool
    sglang: str | None
    python: str
    host: str
    cpus: int
    hw: str
    suite: str
    seconds: float
    exit_code: int
    files: tuple[FileRecord, ...]
    measurements: tuple[Measurement, ...]
    report_dir: str | None = None  # records of before 2026-11-26 have none
    logs: str | None = None  # where they were kept, as files did not pass; records of before 2026-11-28 have none

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the files that did not pass."""
        return tuple(Path(file.file).stem for file in self.files if not file.passed)

    @property
    def revision(self) -> str:
        """The commit as people write it, with a + where the tree had changes on top."""
        return (self.commit or "?")[:8] + "+" * self.modified

    def to_json(self) -> str:
        """One line without its end."""
        return json.dumps({**asdict(self), "time": self.time.isoformat(timespec="seconds")}, allow_nan=False)


def measurement_of(file: str, happened: Events) -> Measurement | None:
    """What the events of a test file tell; None if there is no phase that ended, and no score."""
    score, phases = facts.score_of(happened), facts.phases_of(happened)
    ended = {phase.name: phase.seconds for phase in phases if phase.state != UNFINISHED}
    if not (score or ended):
        return None
    return Measurement(
        file=file,
        target=score.target if score else None,
        engine=score.engine if score else None,
        correct=score.correct if score else None,
        examples=score.examples if score else None,
        gate=None if score is None or score.threshold is None else f">{score.threshold:g}",
        throughput=score.throughput if score else None,
        acceptance_length=facts.acceptance_length_of(happened),
        phases=ended,
    )


def repository_path(options: Options, name: str) -> str:
    """`registered/x.py` as TIMINGS and `--partition-model-file` have it: `test/registered/x.py`."""
    return os.path.join(options.test_root.absolute().parent.name, name)


def of_run(
    options: Options,
    results: Sequence[FileResult],
    logs: Path,
    exit_code: ExitCode,
    began: datetime,
    seconds: float,
) -> Record:
    """The record of a run that is over, from its results and the logs in the directory `logs`. Raises OSError."""
    files, measured = [], []
    for result in results:
        if not result.attempts:
            continue
        name = repository_path(options, result.registration.name)
        measured.append(measurement_of(name, events.read(directory_of(logs / result.attempts[-1].log))))
        record = FileRecord(
            file=name,
            hw=result.registration.hw,
            suite=result.registration.suite,
            state=result.state.value,
            seconds=round(result.seconds, 3),
            est_time=result.registration.est_time,
            attempts=len(result.attempts),
        )
        files.append(record)
    revision = commit(options.test_root) or ""
    return Record(
        version=VERSION,
        time=began,
        commit=revision.removesuffix("+") or None,
        modified=revision.endswith("+"),
        sglang=installed("sglang"),
        python=platform.python_version(),
        host=platform.node(),
        cpus=os.cpu_count() or 0,
        hw=options.hw or "",
        suite=options.suite or "",
        seconds=round(seconds, 3),
        exit_code=int(exit_code),
        files=tuple(files),
        measurements=tuple(filter(None, measured)),
        report_dir=str(options.report_dir.absolute()) if options.report_dir else None,
        logs=None if all_passed(results) else str(logs),
    )
