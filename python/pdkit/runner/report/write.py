"""Writing the report of a run beside its evidence."""

import os
from pathlib import Path

from pdkit.runner.report.html import page
from pdkit.runner.report.junit import junit
from pdkit.runner.report.markdown import markdown
from pdkit.runner.report.read import read_directory
from pdkit.runner.report.terminal import scores

STEP_SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


def write(directory: Path) -> list[str]:
    """Writes report.html, junit.xml and summary.md into `directory`; returns lines for the terminal.

    Within a GitHub workflow the summary also goes into that of its step. Raises UsageError, or OSError.
    """
    report = read_directory(directory)
    (directory / "report.html").write_text(page(report))
    (directory / "junit.xml").write_text(junit(report))
    (directory / "summary.md").write_text(markdown(report))
    if step_summary := os.environ.get(STEP_SUMMARY_VARIABLE):
        with open(step_summary, "a") as file:
            file.write(markdown(report))
    return [*scores(report), f"report: {directory / 'report.html'}"]
