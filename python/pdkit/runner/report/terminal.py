"""The report in short for a terminal: what failed, in which phase, and the end of the log of who failed first."""

from collections.abc import Iterator

from pdkit.runner.report.model import FileRun, Report

TAIL_LINES = 20


def terminal(report: Report) -> list[str]:
    return [line for run in report.files for line in _lines(run)]


def _lines(run: FileRun) -> Iterator[str]:
    if run.score:
        low, high = run.score.interval
        yield (
            f"{run.file}: score {run.score.value:.3f} ({run.score.correct} of {run.score.examples}), "
            f"exact 95 % interval {low:.3f} to {high:.3f}, {run.score.gate}"
        )
    if not run.is_bad:
        return
    yield f"{run.file} {run.state}" + (f" in phase {run.failed_phase}" if run.failed_phase else "")
    if run.death:
        yield f"  died first: {run.death.cause}"
    for log in run.logs[:1]:
        if log.died:
            yield f"  last lines of {log.path}:"
            yield from (f"    {line}" for line in log.lines[-TAIL_LINES:])
