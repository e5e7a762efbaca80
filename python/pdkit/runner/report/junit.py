"""The report as JUnit XML, which CI servers show: one suite per file, one test case per check."""

import re

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from pdkit.runner.report.model import FAIL, SKIP, FileRun, Report, ReportRow

_NO_CHAR = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SKIPPED = ("disabled", "not run", "all skipped", "nothing ran")


def junit(report: Report) -> str:
    xml = JUnitXml(report.title)
    for run in report.files:
        xml.add_testsuite(_suite(report, run))
    return xml.tostring().decode()


def _suite(report: Report, run: FileRun) -> TestSuite:
    """A test case per row; one of the file itself where it has none, or failed and none of them did."""
    suite = TestSuite(run.file)
    for name, value in (("hw", report.hw), ("result", report.verdict)):
        suite.add_property(name, value)
    for line in report.not_exercised:
        suite.add_property(f"not exercised on {report.target}", line)
    cases = [_row(run, row) for row in run.rows]
    first_bad = next((case for case, row in zip(cases, run.rows, strict=True) if row.state == FAIL), None)
    if first_bad is None and (run.is_bad or not cases):
        cases.append(_whole(run))
    elif first_bad is not None:
        first_bad.result = [_outcome(run, Failure)]
    if run.score:
        cases[0].system_out = str(run.score)
    suite.add_testcases(cases)
    return suite


def _row(run: FileRun, row: ReportRow) -> TestCase:
    case = TestCase(row.name, run.file.replace("/", ".").removesuffix(".py"), row.seconds)
    sentence = _printable(row.sentence)
    if row.state == FAIL:
        case.result = [Failure(sentence, row.state)]
    elif row.state == SKIP:
        case.result = [Skipped(sentence)]
    elif sentence:
        case.system_out = sentence
    return case


def _whole(run: FileRun) -> TestCase:
    directory, _, name = run.file.rpartition("/")
    case = TestCase(name, directory.replace("/", "."), run.seconds)
    if run.is_bad:
        case.result = [_outcome(run, Failure if run.state == "failed" else Error)]
    elif run.state in _SKIPPED:
        case.result = [Skipped(_printable(f"{run.state}: {run.reason}") if run.reason else run.state)]
    return case


def _outcome(run: FileRun, kind: type[Failure] | type[Error]) -> Failure | Error:
    outcome = kind(_printable(f"{run.state}{run.in_phase}: {run.death.cause if run.death else run.reason}"), run.state)
    outcome.text = _printable(run.failure + (f"\nhint: {run.hint}" if run.hint else ""))
    return outcome


def _printable(text: str) -> str:
    """With a ? for each character that XML 1.0 cannot hold (its production 2, Char)."""
    return _NO_CHAR.sub("?", text)
