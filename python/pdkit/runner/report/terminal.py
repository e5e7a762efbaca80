"""A report in short for a console: scores, the logs of what failed, and the cause of each failure."""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from pdkit.runner.report.model import FileRun, Log, Report

TAIL_LINES = 20
GROUP_LINES = 300
CAUSE_LINES = 12
SENTENCE = 160
TEST, HUNG = "test", "where it hung"


def scores(report: Report) -> list[str]:
    return [f"{run.file}: {run.score}" for run in report.scored]


def rows(run: FileRun, is_whole: bool = True) -> list[str]:
    """One line per row; of many, or where `is_whole` is False, those that did not pass, and how many did."""
    shown, passed = run.shown(is_whole)
    width = max((len(row.name) for row in shown), default=0)
    lines = [f"  {row.state}  {row.name:<{width}}  {_cut(row.sentence)}".rstrip() for row in shown]
    return [*lines, f"  PASS  {passed} more"] if passed else lines


def not_exercised(report: Report) -> list[str]:
    lines = report.not_exercised
    return [f"not exercised on {report.target}:", *(f"  {line}" for line in lines)] if lines else []


def _cut(sentence: str) -> str:
    return sentence if len(sentence) <= SENTENCE else f"{sentence[: SENTENCE - 4]} ..."


def log_tails(run: FileRun, directory: Path, is_grouped: bool = False) -> Iterator[str]:
    """The end of what the test printed, of the log of the server that died first, and where it hung.

    Paths are below `directory`. `is_grouped`: more of it, as a group of lines that GitHub opens at a click.
    """
    if is_grouped:
        yield f"::group::logs of {run.file}"
    hung = any(log.name == HUNG for log in run.logs)  # that ends with the last lines of the test
    for log in run.logs:
        if log.died or log.name == (HUNG if hung else TEST):
            yield f"{log.name}, {'' if log.name == HUNG else 'the end of '}{directory / log.path}:"
            yield from (f"  {line}" for line in _shown(log, directory, is_grouped))
    if is_grouped:
        yield "::endgroup::"


def _shown(log: Log, directory: Path, is_grouped: bool) -> Sequence[str]:
    if log.name == HUNG:
        return log.lines
    if not is_grouped:
        return log.lines[-TAIL_LINES:]
    with open(directory / log.path, errors="replace") as lines:
        return [line.rstrip("\n") for line in deque(lines, maxlen=GROUP_LINES)]


def words_of(run: FileRun) -> list[str]:
    """Which test failed first and why, without its traceback and the hint that the report gives itself."""
    lines = run.failure.partition("\nTraceback (most recent call last)")[0].splitlines()
    return [line for line in lines if not (run.hint and line.lstrip().startswith("hint: "))]


def cause(run: FileRun) -> Iterator[str]:
    """In which phase it failed, what died first, and what the first test that failed says, at most CAUSE_LINES."""
    if run.failed_phase:
        yield f"  in phase {run.failed_phase}"
    if run.death:
        yield f"  died first: {run.death.cause}"
    said = words_of(run)
    yield from (f"  {line}" for line in said[:CAUSE_LINES])
    if len(said) > CAUSE_LINES:
        yield "  ..."
    if run.hint:
        yield f"  hint: {run.hint}"
