"""The report as one HTML page that needs nothing else: no network, no script."""

from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from pdkit.runner.report.model import ROWS, Distribution, FileRun, Phase, Report, Score
from pdkit.runner.report.terminal import words_of

WRONG_SHOWN = 30
_ENVIRONMENT = Environment(
    loader=PackageLoader("pdkit", "assets"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`; places on it are in percent."""

    low: float
    high: float

    def at(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 2) if self.high > self.low else 0.0

    def share(self, length: float) -> float:
        return round(100 * length / (self.high - self.low), 2) if self.high > self.low else 100.0


def score_axis(score: Score) -> Axis:
    """From a little below all that is shown, to 1."""
    lowest = min(score.interval[0], score.value, score.value if score.threshold is None else score.threshold)
    return Axis(max(0.0, lowest - 0.15 * (1 - lowest) - 0.005), 1.0)


def timeline_axis(phases: Iterable[Phase], seconds: float) -> Axis:
    return Axis(0.0, max([seconds, *(phase.start + phase.seconds for phase in phases)]))


def distribution(values: Iterable[float | None]) -> Distribution | None:
    known = tuple(value for value in values if value is not None)
    return Distribution(known) if known else None


def state_mark(state: str) -> str:
    """A sign beside the colour, for who does not see it."""
    good = ("passed", "passed on retry")
    neutral = ("disabled", "not run", "all skipped", "nothing ran")
    return "✓" if state in good else "–" if state in neutral else "✗"


def anchor(run: FileRun) -> str:
    return "f-" + "".join(c if c.isalnum() else "-" for c in run.file)


def page(report: Report) -> str:
    return (
        _ENVIRONMENT.get_template("report.html.jinja")
        .render(
            report=report,
            score_axis=score_axis,
            timeline_axis=timeline_axis,
            distribution=distribution,
            mark=state_mark,
            anchor=anchor,
            wrong_shown=WRONG_SHOWN,
            rows_shown=ROWS,
            words_of=words_of,
        )
        .strip()
        + "\n"
    )
