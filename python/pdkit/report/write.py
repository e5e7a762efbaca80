"""Writing the report of a run beside its evidence."""

import os
from pathlib import Path

from pdkit.report.html import page
from pdkit.report.junit import junit
from pdkit.report.markdown import markdown
from pdkit.report.read import read_directory
from pdkit.report.terminal import terminal

STEP_SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


def write(directory: Path) -> list[str]:
    """Writes report.html, junit.xml and summary.md into `directory`; returns lines for the terminal.

    Within a GitHub workflow the summary also goes into that of its step. Raises NoReport, or OSError.
    """
    report = read_directory(directory)
    (directory / "report.html").write_text(page(report))
    (directory / "junit.xml").write_text(junit(report))
    (directory / "summary.md").write_text(markdown(report))
    if step_summary := os.environ.get(STEP_SUMMARY_VARIABLE):
        with open(step_summary, "a") as file:
            file.write(markdown(report))
    return [*terminal(report), f"report: {directory / 'report.html'}"]
