"""Results of a detection matrix on disk, what is still to do, and whether the goal is met."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pdkit.faults.library import LIBRARY
from pdkit.faults.matrix.truth import Truth
from pdkit.faults.matrix.verdicts import CheckVerdict


class ResultsError(ValueError):
    """The file of results cannot be used; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Run:
    """All checks once, under `fault`, or under none (None): then `index` tells the clean runs apart.

    met           requests that the fault met
    seconds       wall time of the run
    restarted     why servers had to be restarted after it, or empty
    first_caught  seconds from the start of the run to the end of the first test that caught it; None if none did
    """

    fault: str | None
    index: int
    met: int
    seconds: float
    restarted: str = ""
    verdicts: dict[str, CheckVerdict] = field(default_factory=dict)
    first_caught: float | None = None

    @property
    def caught_by(self) -> list[str]:
        return [check for check, verdict in self.verdicts.items() if verdict.caught]

    @property
    def headline(self) -> str | None:
        """The message of the first check that caught the fault in words that name its kind; None if none did."""
        says = LIBRARY[self.name].says if self.fault else ""
        messages = (verdict.message for verdict in self.verdicts.values() if verdict.caught)
        return next((message for message in messages if re.search(says, message)), None)

    @property
    def name(self) -> str:
        """Of the fault; empty without one."""
        return self.fault or ""

    @property
    def key(self) -> tuple[str | None, int]:
        return self.fault, self.index


def planned(faults: Sequence[str], clean_runs: int) -> list[tuple[str | None, int]]:
    """(fault or None, index) of each run: a clean one first, the others spread evenly between the faults."""
    runs: list[tuple[str | None, int]] = []
    clean = 0
    for place, fault in enumerate((None, *faults)):
        wanted = max(1, round(clean_runs * place / len(faults))) if faults and clean_runs else clean_runs
        runs += [(fault, 0)] if fault else []
        runs += [(None, index) for index in range(clean, wanted)]
        clean = max(clean, wanted)
    return runs


class Shortfall(NamedTuple):
    """One reason why the goal is missed."""

    what: str
    why: str


@dataclass
class Results:
    """A JSONL file: a header, then one line a run or truth, each written once it is complete."""

    path: Path
    checks: list[str] = field(default_factory=list)
    runs: dict[tuple[str | None, int], Run] = field(default_factory=dict)
    truths: dict[str, Truth] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, resume: bool) -> "Results":
        """Raises ResultsError where results are there and nobody said to go on, or where they cannot be read."""
        results = cls(path)
        if path.exists():
            if not resume:
                raise ResultsError(
                    f"{path} holds results of an earlier matrix; go on with --resume, or choose another --out"
                )
            results._load()
        return results

    def _load(self) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            self.path.write_text("".join(lines), encoding="utf-8")
        try:
            for line in lines:
                self._take(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise ResultsError(f"{self.path} is not a file of this program ({error!r}); choose another --out") from None

    def _take(self, record: dict[str, Any]) -> None:
        kind = record.pop("kind")
        if kind == "checks":
            self.checks = record["checks"]
        elif kind == "truth":
            self.truths[record["fault"]] = Truth(**record)
        else:
            record["verdicts"] = {check: CheckVerdict(**told) for check, told in record["verdicts"].items()}
            run = Run(**record)
            self.runs[run.key] = run

    def _append(self, kind: str, record: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **record}) + "\n")

    def set_checks(self, checks: Sequence[str]) -> None:
        """The columns. Raises ResultsError if earlier results have others."""
        if self.checks and self.checks != list(checks):
            raise ResultsError(f"{self.path} has other checks than the suite of today; choose another --out")
        if not self.checks:
            self.checks = list(checks)
            self._append("checks", {"checks": self.checks})

    def add(self, run: Run) -> None:
        self.runs[run.key] = run
        self._append("run", asdict(run))

    def add_truths(self, truths: Iterable[Truth]) -> None:
        for truth in truths:
            self.truths[truth.fault] = truth
            self._append("truth", asdict(truth))

    @property
    def clean(self) -> list[Run]:
        return [run for run in self.runs.values() if run.fault is None]

    @property
    def faulty(self) -> list[Run]:
        """In the order of the library."""
        return [self.runs[name, 0] for name in LIBRARY if (name, 0) in self.runs]

    def problems(self, wanted: Sequence[tuple[str | None, int]]) -> list[Shortfall]:
        """What keeps the runs `wanted` from the goal: each fault that changes anything caught, no clean run failed."""
        found = []
        for fault, index in wanted:
            run = self.runs.get((fault, index))
            name = fault or f"clean run {index}"
            if run is None:
                found.append(Shortfall(name, "did not run"))
            elif fault is None and (run.caught_by or run.restarted):
                found.append(Shortfall(name, f"failed: {', '.join(run.caught_by) or run.restarted}"))
            elif fault is not None:
                found += [Shortfall(name, why) for why in self._problems_of(run)]
        return found

    def _problems_of(self, run: Run) -> Iterator[str]:
        name = run.name
        truth = self.truths.get(name)
        if truth is None:
            yield "whether it changes anything is not known"
        elif not run.met:
            yield "it met no request"
        elif truth.changes and not run.caught_by:
            yield "changes something and was not caught"
        elif truth.changes and run.headline is None:
            yield f"no headline names its kind: expected {LIBRARY[name].says!r}"
        elif not truth.changes and not LIBRARY[name].harmless:
            yield "changes nothing, and nobody has said why"
        elif LIBRARY[name].harmless and (parity := [name for name in run.caught_by if name.startswith("parity")]):
            yield f"should change nothing, yet {', '.join(parity)} saw a difference"
