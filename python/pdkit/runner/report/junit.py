"""The report as JUnit XML, which CI servers show: one test case for each test file."""

import re

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from pdkit.runner.report.model import FileRun, Report

_NO_CHAR = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SKIPPED = ("disabled", "not run", "all skipped", "nothing ran")


def junit(report: Report) -> str:
    suite = TestSuite(report.title)
    for name, value in (("hw", report.hw), ("result", report.verdict)):
        suite.add_property(name, value)
    for run in report.files:
        suite.add_testcase(_case(run))
    suite.update_statistics()
    xml = JUnitXml()
    xml.add_testsuite(suite)
    return xml.tostring().decode()


def _case(run: FileRun) -> TestCase:
    directory, _, name = run.file.rpartition("/")
    case = TestCase(name, directory.replace("/", "."), run.seconds)
    if run.is_bad:
        where = f" in phase {run.failed_phase}" if run.failed_phase else ""
        kind = Failure if run.state == "failed" else Error
        outcome = kind(_printable(f"{run.state}{where}: {run.death.cause if run.death else run.reason}"), run.state)
        outcome.text = _printable(run.failure)
        case.result = [outcome]
    elif run.state in _SKIPPED:
        case.result = [Skipped(_printable(f"{run.state}: {run.reason}") if run.reason else run.state)]
    if run.score:
        low, high = run.score.interval
        case.system_out = (
            f"score {run.score.value:.3f} ({run.score.correct} of {run.score.examples}), "
            f"exact 95 % interval {low:.3f} to {high:.3f}, {run.score.gate}"
        )
    return case


def _printable(text: str) -> str:
    """With a ? for each character that XML 1.0 cannot hold (its production 2, Char)."""
    return _NO_CHAR.sub("?", text)
