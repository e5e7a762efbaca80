"""Numbers of many runs, one series for each thing that was measured."""

from collections.abc import Iterable
from dataclasses import dataclass

from pdkit.core import stats
from pdkit.runner.history.record import Record


@dataclass(frozen=True)
class Point:
    """What one run measured; a share has its counts, too."""

    record: Record
    value: float
    counts: tuple[int, int] | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval of a share; a measured value itself."""
        return stats.exact_interval(*self.counts) if self.counts else (self.value, self.value)


@dataclass(frozen=True)
class Series:
    """The points of one thing, in the order of time; `unit` is "" for a share, "s" for times, "tokens" for lengths."""

    target: str
    name: str
    unit: str
    points: tuple[Point, ...]

    def show(self, value: float) -> str:
        return f"{value:.1f} s" if self.unit == "s" else f"{value:.3f}"


def main_job_series(records: Iterable[Record]) -> list[Series]:
    """Score, acceptance length, phases and time in all of each target, of files that passed (the score: of all)."""
    found: dict[tuple[str, str, str], list[Point]] = {}

    for record in records:
        passed = {file.file: file.seconds for file in record.files if file.passed}
        for measured in record.measurements:
            if not measured.target:
                continue
            values: dict[tuple[str, str], float] = {}
            if measured.file in passed:
                if measured.acceptance_length is not None:
                    values["acceptance length", "tokens"] = measured.acceptance_length
                values |= {(name, "s"): seconds for name, seconds in measured.phases.items()}
                values["in all", "s"] = passed[measured.file]
            points = {key: Point(record, value) for key, value in values.items()}
            if measured.examples and measured.correct is not None:
                counts = measured.correct, measured.examples
                points["score", ""] = Point(record, measured.correct / measured.examples, counts)
            for key, point in points.items():
                found.setdefault((measured.target, *key), []).append(point)
    order = sorted(found, key=lambda key: (key[0], ("", "tokens", "s").index(key[2])))
    return [Series(target, name, unit, tuple(found[target, name, unit])) for target, name, unit in order]


def seconds_of_files(records: Iterable[Record], most: int) -> dict[tuple[str, str, str], list[float]]:
    """(file, hardware, suite) -> seconds of the latest `most` runs in which the file passed at its first attempt."""
    seconds: dict[tuple[str, str, str], list[float]] = {}
    for record in records:
        for file in record.files:
            if file.passed and file.attempts == 1:
                seconds.setdefault((file.file, file.hw, file.suite), []).append(file.seconds)
    return {key: values[-most:] for key, values in seconds.items()}
