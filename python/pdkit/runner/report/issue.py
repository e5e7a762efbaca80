"""A failure as Markdown to paste into an issue: what failed, where to look, where it ran, how to run it again."""

from collections.abc import Iterator
from pathlib import PurePath

from pdkit.runner.report.markdown import failure
from pdkit.runner.report.model import PASS, FileRun, Report

TAIL_LINES = 25
FENCE = "~~~"


def issue(report: Report) -> str:
    """One block per file that failed; a line that says so where none did."""
    bad = [run for run in report.files if run.is_bad]
    if not bad:
        return f"{report.title}: {report.verdict}, no file failed\n"
    return "\n".join(line for run in bad for line in _block(report, run)) + "\n"


def _block(report: Report, run: FileRun) -> Iterator[str]:
    on = f" on target {report.target}" if report.target else ""
    yield from (f"**{run.file} {run.state}{run.in_phase}{on}** ({run.reason})", "")
    yield from failure(run)
    yield from (f"- {row.state} {row.name}: {row.sentence}" for row in run.rows if row.state != PASS)
    yield from (f"- PASS: {sum(row.state == PASS for row in run.rows)} checks", "")
    yield from _surroundings(report, run)
    for log in run.logs[:1] if run.death else run.logs[:2]:
        yield from (f"<details><summary>End of the log: {log.name}</summary>", "", f"{FENCE}text")
        yield from log.lines[-TAIL_LINES:]
        yield from (FENCE, "", "</details>", "")


def _surroundings(report: Report, run: FileRun) -> Iterator[str]:
    found = report.surroundings
    if not found:
        yield from ("Where it ran is not known: the report has no environment.json.", "")
        return
    facts = {
        "commit": found.get("commit"),
        "Python": found.get("python"),
        "machine": found.get("platform"),
        "GPUs": "; ".join(found.get("gpus") or ()) or "none",
        **(found.get("versions") or {}),
    }
    yield from ("| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items() if value), "")
    again = f"scripts/pdkit test {PurePath(run.file).stem}"
    if report.target and len(report.files) == 1:
        again = f"scripts/run.sh --on {report.target}"
    yield from ("Run again:", "", f"{FENCE}sh", again, FENCE, "")
