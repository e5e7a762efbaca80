"""History to look at: a table and lines of blocks for a terminal, and a picture."""

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pdkit.core.errors import ExitCode
from pdkit.runner.history.record import Record
from pdkit.runner.history.series import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    scores = [f"{m.correct}/{m.examples} {m.target}" for m in record.measurements if m.examples]
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


def failed_runs(records: Sequence[Record]) -> Iterator[str]:
    """A line for each of the latest runs of which a file did not pass: which files, and where its report is."""
    for record in records[-LATEST:]:
        if record.failed:
            if record.report_dir:
                where = f"pdkit report {record.report_dir} --issue"
            else:
                where = f"logs: {record.logs}" if record.logs else "no report: give --report-dir"
            yield f"{record.time:%Y-%m-%d %H:%M} failed: {', '.join(record.failed)}; {where}"


def as_dict(series: Series) -> dict[str, Any]:
    """A series for JSON."""
    return {
        "target": series.target,
        "name": series.name,
        "unit": series.unit,
        "times": [point.record.time.isoformat() for point in series.points],
        "values": [point.value for point in series.points],
        "counts": [point.counts for point in series.points] if series.points[0].counts else None,
    }


def series_table(all_series: Sequence[Series]) -> Table:
    """Each series as a line of blocks with its range and latest value."""
    table = Table(title="over time, oldest first", box=box.SIMPLE_HEAD)
    for name in ("target", "what", "", "lowest", "highest", "latest"):
        table.add_column(name, justify="right" if name in ("lowest", "highest", "latest") else "left")
    for series in all_series:
        values = [point.value for point in series.points]
        shown = (series.show(value) for value in (min(values), max(values), values[-1]))
        table.add_row(series.target, series.name, sparkline(values[-WIDTH:]), *shown)
    return table


def terminal(records: Sequence[Record], all_series: Sequence[Series]) -> Group:
    """All of it, for a rich console."""
    failed = [Text(line, overflow="fold") for line in failed_runs(records)]
    return Group(runs_table(records), *failed, *([series_table(all_series)] if all_series else ()))


def draw(all_series: Sequence[Series], path: Path) -> None:
    """For each target: scores with exact 95 % intervals, acceptance length, phases (which may overlap). Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[Series]] = {}
    for series in all_series:
        panels.setdefault((series.target, series.unit), []).append(series)
    size = (10, 3.4 * len(panels))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, layout="constrained", squeeze=False)
    for ((target, unit), chosen), panel in zip(panels.items(), axes[:, 0]):
        if unit == "s":
            _phases(panel, chosen)
        else:
            _points(panel, chosen[0])
        panel.set_title(f"{target}: {'phases' if unit == 's' else chosen[0].name}", loc="left", fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)


def _ticks(panel: "Axes", records: Sequence[Record]) -> None:
    stride = max(1, len(records) // 10)
    labels = [f"{record.time:%m-%d %H:%M}\n{record.revision}" for record in records[::stride]]
    panel.set_xticks(range(0, len(records), stride), labels, fontsize=7)


def _points(panel: "Axes", series: Series) -> None:
    values = [point.value for point in series.points]
    errors = list(zip(*((p.value - p.interval[0], p.interval[1] - p.value) for p in series.points)))
    panel.errorbar(range(len(values)), values, errors, fmt="o", color="#1f4e79", ecolor="#9a9a9a", markersize=4)
    if not series.unit:
        gates = {m.gate for p in series.points for m in p.record.measurements if m.target == series.target and m.gate}
        for gate in sorted(gates):
            panel.axhline(float(gate.lstrip(">=")), color="#b35900", linestyle="--")
            panel.annotate(f"gate {gate}", (0, float(gate.lstrip(">="))), va="bottom", fontsize=8, color="#b35900")
    what = "tokens per verification step" if series.unit else "share of right answers, 95 % interval"
    panel.set_ylabel(what, fontsize=8)
    _ticks(panel, [point.record for point in series.points])


def _phases(panel: "Axes", chosen: Sequence[Series]) -> None:
    whole = next(series for series in chosen if series.name == "in all")
    places = {id(point.record): place for place, point in enumerate(whole.points)}
    for series, marker in zip(chosen, cycle(MARKERS)):
        x = [places[id(point.record)] for point in series.points]
        y = [point.value for point in series.points]
        style: dict[str, Any] = {"color": "black", "linewidth": 2} if series is whole else {"linewidth": 1}
        panel.plot(x, y, marker=marker, markersize=4, label=series.name, **style)
    panel.set_ylabel("seconds", fontsize=8)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    _ticks(panel, [point.record for point in whole.points])
