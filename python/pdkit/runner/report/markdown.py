"""The report in short as GitHub's Markdown, for the summary of a workflow's step."""

from collections.abc import Iterable, Iterator

from pdkit.runner.report.model import FAIL, PASS, SKIP, FileRun, Report
from pdkit.runner.report.terminal import words_of

_MARKS = {"passed": "✅", "passed on retry": "✅", "failed": "❌", "timed out": "❌", "interrupted": "❌"}
_ROW_MARKS = {PASS: "✅", FAIL: "❌", SKIP: "–"}
TAIL_LINES = 15


def markdown(report: Report) -> str:
    lines = [f"## {report.title}: {report.verdict}", "", f"{report.seconds:.0f} s, {len(report.files)} files", ""]
    if len(report.files) > 1:
        lines += ["| | file | tests | seconds |", "| --- | --- | --: | --: |"]
        lines += [
            f"| {_MARKS.get(run.state, '–')} {run.state} | {_cell(run.file)} | {run.counts.get('executed', '')} "
            f"| {run.seconds:.1f} |"
            for run in report.files
        ]
        lines.append("")
    for run in report.files:
        lines += _rows(run, len(report.files) == 1 or run.is_bad or not run.is_plain)
        lines += _details(run)
    if report.not_exercised:
        lines += [f"### Not exercised on {report.target}", "", *(f"- {line}" for line in report.not_exercised), ""]
    return "\n".join(lines) + "\n"


def _details(run: FileRun) -> list[str]:
    lines = []
    if run.score:
        lines += [f"**{run.score}**, {run.score.where}", ""]
    if run.phases:
        phases = (f"{p.name} {p.seconds:.1f} s" + f" **{p.state}**" * p.is_bad for p in run.phases)
        lines += ["Phases: " + ", ".join(phases), ""]
    for table in run.tables:
        lines += [f"### {table.title}", "", _row(table.columns), _row("---" for _ in table.columns)]
        lines += [*map(_row, table.rows), "", *([table.note, ""] if table.note else [])]
    if run.is_bad:
        lines += [f"### {run.file} {run.state}{run.in_phase}", ""]
        lines += failure(run)
        for log in run.logs[:1]:
            lines += [f"End of {log.path}:", "", "~~~text", *log.lines[-TAIL_LINES:], "~~~", ""]
    return lines


def failure(run: FileRun) -> Iterator[str]:
    """What died first, which test failed and why, and where to look."""
    if run.death:
        yield from (f"Died first: {run.death.cause}", "")
    if run.failure:
        yield from ("~~~text", *words_of(run), "~~~", "")
    if run.hint:
        yield from (f"Hint, by which requests differ: {run.hint}", "")


def _rows(run: FileRun, is_whole: bool) -> list[str]:
    """All of a file that has a few, otherwise, or where `is_whole` is False, those that did not pass."""
    shown, passed = run.shown(is_whole)
    if not shown:
        return []
    lines = [f"### {run.file}", "", "| | check | what was found |", "| --- | --- | --- |"]
    lines += [_row((f"{_ROW_MARKS[row.state]} {row.state}", row.name, row.sentence)) for row in shown]
    return [*lines, *([_row(("✅ PASS", f"{passed} more", ""))] if passed else []), ""]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
