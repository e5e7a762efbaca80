"""History to look at: a table and lines of blocks for a terminal, and a picture."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pdkit.core.errors import ExitCode
from pdkit.runner.history.drift import LEVEL
from pdkit.runner.history.record import Record
from pdkit.runner.history.series import MOST_RUNS, Series

BLOCKS = "▁▂▃▄▅▆▇█"
LATEST = 12
WIDTH = 40
MARKERS = "osv^DPX*<>"


def sparkline(values: Sequence[float]) -> str:
    """One block a value, from the lowest to the highest; all in the middle where they are equal."""
    low, high = min(values), max(values)
    if high == low:
        return BLOCKS[3] * len(values)
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in values)


def _result(code: int) -> str:
    try:
        return ExitCode(code).name.lower().replace("_", " ")
    except ValueError:
        return f"exit code {code}"


def _score(record: Record) -> str:
    scores = [f"{m.correct}/{m.examples} {m.rung}" for m in record.measurements if m.examples]
    return ", ".join(scores) or "-"


def runs_table(records: Sequence[Record]) -> Table:
    """The latest runs, newest last."""
    table = Table(title=f"{len(records)} runs, the latest {min(LATEST, len(records))}", box=box.SIMPLE_HEAD)
    for name in ("began (UTC)", "commit", "sglang", "suite", "files", "score", "seconds", "result"):
        table.add_column(name, justify="right" if name in ("files", "seconds") else "left", no_wrap=name != "suite")
    for record in records[-LATEST:]:
        passed = sum(file.passed for file in record.files)
        began = f"{record.time:%Y-%m-%d %H:%M}"
        cells = (record.revision, record.sglang or "-", record.suite, f"{passed}/{len(record.files)}", _score(record))
        table.add_row(began, *cells, f"{record.seconds:.0f}", _result(record.exit_code))
    return table


def verdict_of(series: Series, count: int, level: float = LEVEL) -> str:
    """Drift or noise, where it began and how sure that is; `count` series are looked at together."""
    change = series.change(count, level)
    if change is None:
        return "one run: nothing to compare"
    if not change.is_drift:
        return f"noise (p {change.p_value:.2g})"
    first = series.point_of(change).record
    return (
        f"DRIFT {series.show(change.before)} -> {series.show(change.after)} since {first.time:%Y-%m-%d %H:%M} "
        f"({first.revision}, sglang {first.sglang}, {first.host}), p {change.p_value:.1g}"
    )


def as_dict(series: Series, count: int, level: float = LEVEL) -> dict:
    """A series and its verdict for JSON."""
    change = series.change(count, level)
    return {
        "rung": series.rung,
        "name": series.name,
        "unit": series.unit,
        "times": [point.record.time.isoformat() for point in series.points],
        "values": [point.value for point in series.points],
        "counts": [point.counts for point in series.points] if series.points[0].counts else None,
        "drift": bool(change and change.is_drift),
        "p_value": change.p_value if change else None,
        "since": series.point_of(change).record.time.isoformat() if change and change.is_drift else None,
    }


def series_table(all_series: Sequence[Series], level: float = LEVEL) -> Table:
    """Each series as a line of blocks with its range, latest value, and drift or noise."""
    table = Table(title="over time, oldest first", box=box.SIMPLE_HEAD)
    for name in ("rung", "what", "", "lowest", "highest", "latest", "drift or noise"):
        table.add_column(name, justify="right" if name in ("lowest", "highest", "latest") else "left")
    for series in all_series:
        values = [point.value for point in series.points]
        shown = (series.show(value) for value in (min(values), max(values), values[-1]))
        verdict = verdict_of(series, len(all_series), level)
        style = "bold" if verdict.startswith("DRIFT") else ""
        table.add_row(series.rung, series.name, sparkline(values[-WIDTH:]), *shown, Text(verdict, style))
    return table


def explanation(all_series: Sequence[Series], level: float = LEVEL) -> str:
    """What the verdicts promise."""
    return (
        f"Drift: a change at some run whose exact p-value, times the number of runs where it may lie, is below the "
        f"share of this look. All looks, one after each run, at all {len(all_series)} series together call unchanged "
        f"engines drifting with probability {level:g} at most: the look after run n may use 1/(n(n+1)) of that. "
        f"Looked at are the latest {MOST_RUNS} runs. Scores: Fisher's exact test; others: exact permutation of the "
        f"rank sum. Seconds drift with the machine as well as with the code."
    )


def terminal(records: Sequence[Record], all_series: Sequence[Series], level: float = LEVEL) -> Group:
    """All of it, for a rich console."""
    parts = [runs_table(records)]
    if all_series:
        parts += [series_table(all_series, level), Text(explanation(all_series, level), "dim")]
    return Group(*parts)


def draw(all_series: Sequence[Series], path: Path, level: float = LEVEL) -> None:
    """For each rung: scores with exact 95 % intervals, phases (which may overlap), acceptance length. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rungs = list(dict.fromkeys(series.rung for series in all_series))
    rows = [(rung, unit) for rung in rungs for unit in ("", "s", "tokens") if _of(all_series, rung, unit)]
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(10, 3.4 * len(rows)), layout="constrained", squeeze=False)
    for (rung, unit), panel in zip(rows, axes[:, 0]):
        chosen = _of(all_series, rung, unit)
        if unit == "s":
            _phases(panel, chosen)
        else:
            _points(panel, chosen[0], unit)
        for series in chosen:
            change = series.change(len(all_series), level)
            if change and change.is_drift:
                _mark(panel, series, change)
        panel.set_title(f"{rung}: {'phases' if unit == 's' else chosen[0].name}", loc="left", fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)


def _of(all_series, rung, unit):
    return [series for series in all_series if (series.rung, series.unit) == (rung, unit)]


def _ticks(panel, records):
    stride = max(1, len(records) // 10)
    labels = [f"{record.time:%m-%d %H:%M}\n{record.revision}" for record in records[::stride]]
    panel.set_xticks(range(0, len(records), stride), labels, fontsize=7)


def _points(panel, series, unit):
    values = [point.value for point in series.points]
    errors = list(zip(*((p.value - p.interval[0], p.interval[1] - p.value) for p in series.points)))
    panel.errorbar(range(len(values)), values, errors, fmt="o", color="#1f4e79", ecolor="#9a9a9a", markersize=4)
    if not unit:
        gates = {m.gate for p in series.points for m in p.record.measurements if m.rung == series.rung and m.gate}
        for gate in sorted(gates):
            panel.axhline(float(gate.lstrip(">=")), color="#b35900", linestyle="--")
            panel.annotate(f"gate {gate}", (0, float(gate.lstrip(">="))), va="bottom", fontsize=8, color="#b35900")
    panel.set_ylabel(
        "share of right answers, 95 % interval" if not unit else "tokens per verification step", fontsize=8
    )
    _ticks(panel, [point.record for point in series.points])


def _phases(panel, chosen):
    whole = next(series for series in chosen if series.name == "in all")
    places = {id(point.record): place for place, point in enumerate(whole.points)}
    for series, marker in zip(chosen, cycle(MARKERS)):
        x = [places[id(point.record)] for point in series.points]
        y = [point.value for point in series.points]
        style = {"color": "black", "linewidth": 2} if series is whole else {"linewidth": 1}
        panel.plot(x, y, marker=marker, markersize=4, label=series.name, **style)
    panel.set_ylabel("seconds", fontsize=8)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    _ticks(panel, [point.record for point in whole.points])


def _mark(panel, series, change):
    place = len(series.points) - len(series.points[-MOST_RUNS:]) + change.at
    panel.axvline(place - 0.5, color="#b30000", linewidth=1)
    text = f"{series.name}: {series.show(change.before)} -> {series.show(change.after)}"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    where = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right"}
    panel.annotate(text, (place - 0.6, 0.03), fontsize=7, bbox=box, **where)
