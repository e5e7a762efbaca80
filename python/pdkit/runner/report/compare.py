"""Two runs side by side: what was tested where, and what came of it."""

from collections.abc import Iterable, Iterator, Sequence

from pdkit.core.console import columns
from pdkit.runner.report.model import FAIL, FileRun, Report, ReportRow

INCOMPLETE = "data incomplete"
NONE = "none"
HEAD = ("", "A", "B", "")
OTHER, SAME = "differs", ""
LONGEST = 80

Row = tuple[str, str, str, str]


def compared(one: Report, other: Report) -> str:
    """Tables for a console: the two runs, then each file that both or one of them has, check by check where they differ.

    What one of them does not report is `data incomplete`, which is not a difference.
    """
    parts = [_table(list(_runs(one, other)))]
    ours, theirs = ({run.file: run for run in report.files} for report in (one, other))
    for file in ours | theirs:
        parts.append(f"{file}\n{_table(list(_files(ours.get(file), theirs.get(file))))}")
    notes = [f"{name}: {note}" for name, report in (("A", one), ("B", other)) for note in report.notes]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _table(rows: Sequence[Row]) -> str:
    return columns([HEAD, *rows], indent="  ")


def _row(name: str, found: Iterable[str | None], is_measured: bool = False) -> Row:
    """`found` of A and B. `is_measured`: numbers that are never equal are not called different."""
    ours, theirs = found
    differs = not is_measured and None not in (ours, theirs) and ours != theirs
    return name, _cell(ours), _cell(theirs), OTHER if differs else SAME


def _cell(text: str | None) -> str:
    if text is None:
        return INCOMPLETE
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def _runs(one: Report, other: Report) -> Iterator[Row]:
    both = one, other
    yield _row("result", (report.verdict if report.result else None for report in both))
    yield _row("target", (report.target for report in both))
    for name in ("commit", "python", "platform", "cpus", "memory_gib"):
        found = [report.surroundings.get(name) for report in both]
        yield _row(name, (None if each is None else str(each) for each in found))
    gpus = [report.surroundings.get("gpus") for report in both]
    yield _row("gpus", (None if each is None else "; ".join(each) or NONE for each in gpus))
    versions = [report.surroundings.get("versions") for report in both]
    for package in sorted({name for each in versions if each for name in each}):
        yield _row(package, (None if each is None else each.get(package, NONE) for each in versions))
    yield _row("seconds", (f"{report.seconds:.1f}" if report.seconds else None for report in both), is_measured=True)


def _files(ours: FileRun | None, theirs: FileRun | None) -> Iterator[Row]:
    both = ours, theirs
    yield _row("state", (run.state if run else None for run in both))
    if any(run and run.score for run in both):
        scores = [run.score if run else None for run in both]
        shown = (f"{each.value:.3f} of {each.examples} ({each.gate})" if each else None for each in scores)
        yield _row("score", shown, is_measured=True)
        intervals = [each.interval for each in scores if each]
        if len(intervals) == 2:
            apart = intervals[0][1] < intervals[1][0] or intervals[1][1] < intervals[0][0]
            spans = [f"{low:.3f} to {high:.3f}" for low, high in intervals]
            yield "exact 95 % interval", spans[0], spans[1], "apart" if apart else "they overlap"
    lengths = [run.acceptance_lengths if run else () for run in both]
    measured: dict[str, list[float | None]] = {
        "output tokens/s": [run.score.throughput if run and run.score else None for run in both],
        "acceptance length": [sum(each) / len(each) if each else None for each in lengths],
        "seconds": [run.seconds if run else None for run in both],
    }
    for name, values in measured.items():
        if any(values):
            yield _row(name, (f"{value:.2f}" if value else None for value in values), is_measured=True)
    phases = [{phase.name: phase for phase in run.phases} if run else {} for run in both]
    for name in dict.fromkeys(name for each in phases for name in each):
        found = [each.get(name) for each in phases]
        yield _row(f"phase {name}", (f"{p.seconds:.1f} s{f', {p.state}' * p.is_bad}" if p else None for p in found),
                   is_measured=True)  # fmt: skip
    yield from _checks(ours, theirs)


def _checks(ours: FileRun | None, theirs: FileRun | None) -> Iterator[Row]:
    """Those that did not end alike, and how many did."""
    both = [{row.name: row for row in run.rows} if run else {} for run in (ours, theirs)]
    names = list(dict.fromkeys(name for each in both for name in each))
    alike = [name for name in names if _ended_alike(*(each.get(name) for each in both))]
    for name in names:
        if name not in alike:
            found = [each.get(name) for each in both]
            yield _row(name, (f"{row.state} {row.sentence}".strip() if row else None for row in found))
    if alike:
        yield "checks that ended alike", str(len(alike)), str(len(alike)), SAME


def _ended_alike(ours: ReportRow | None, theirs: ReportRow | None) -> bool:
    """Failures only if they say the same."""
    if ours is None or theirs is None or ours.state != theirs.state:
        return False
    return ours.state != FAIL or ours.sentence == theirs.sentence
