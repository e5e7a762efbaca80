"""From the events of one test file to a row per test method and per check that is not a test of its own."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pdkit.checks.accounting.invariants import CLIENT, SERVERS
from pdkit.checks.hints import Evidence, hint
from pdkit.core.events import BAD, EXPECTED_FAILURE, SKIPPED, Events
from pdkit.core.recording import without_numpy
from pdkit.runner.report.model import FAIL, PASS, SKIP, ReportRow

MOST_FINDINGS = 12
_NOT_GREATER = re.compile(r"(-?[\d.]+(?:e-?\d+)?) not greater than (-?[\d.]+(?:e-?\d+)?)(?: : .*)?$")
CHECKS = (CLIENT, SERVERS)  # verdicts that each test of a class adds to; others are about one test


def rows_of(events: Events) -> tuple[ReportRow, ...]:
    """Tests in the order in which they ended, then what was checked of all of them together."""
    rows: dict[str, ReportRow] = {}
    since: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] != "test":
            since.append(event)
            continue
        method = event.get("method") or event["id"]
        row = _row(method, event, since)
        if method == event["id"]:  # a sub-test that failed comes before its test
            since = []
        if method not in rows or rows[method].state != FAIL:
            rows[method] = row
    left = (name for event in events.of("run") for name in event.get("left") or ())
    not_run = (
        ReportRow(name_of(name), SKIP, "not run, the run stopped before it") for name in left if name not in rows
    )
    return (*rows.values(), *not_run, *_together(events))


def _row(method: str, event: dict[str, Any], since: Sequence[dict[str, Any]]) -> ReportRow:
    state = FAIL if event["state"] in BAD else SKIP if event["state"] == SKIPPED else PASS
    said = event["message"].strip().splitlines()
    if state != PASS:
        sentence = in_words(said[0], since) if said else event["state"]
    elif event["state"] == EXPECTED_FAILURE:
        sentence = "it fails, as it is expected to" + (f": {said[0]}" if said else "")
    else:
        sentence = _joined(_found(since)) or event.get("what") or ""
    return ReportRow(name_of(method), state, sentence, event.get("seconds"))


def in_words(message: str, since: Sequence[dict[str, Any]]) -> str:
    """What an assertion says of a score that was taken before it; otherwise `message`."""
    message = without_numpy(message)
    compared = _NOT_GREATER.match(message)
    for event in reversed(since):
        if compared and event["kind"] == "score" and math.isclose(event["score"], float(compared[1]), abs_tol=1e-9):
            return (
                f"score {event['score']:.3f} of {event['examples']} {event['eval']} examples, must be greater than "
                f"{float(compared[2]):g}"
            )
    return message


def _found(since: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was found while a test ran that passed."""
    for event in since:
        if event["kind"] == "score" and 0 <= event["score"] <= 1 and event["examples"]:
            gate = "" if event.get("gate") is None else f", must be greater than {event['gate']:g}"
            yield f"score {event['score']:.3f} of {event['examples']} examples{gate}"
        elif event["kind"] == "finding" and event["passed"]:
            yield event["sentence"]


def _joined(sentences: Iterable[str]) -> str:
    found = list(dict.fromkeys(sentences))
    more = f"; and {len(found) - MOST_FINDINGS} more" if len(found) > MOST_FINDINGS else ""
    return "; ".join(found[:MOST_FINDINGS]) + more


def _together(events: Events) -> Iterator[ReportRow]:
    for check in CHECKS:
        verdicts = [event for event in events.of("verdict") if event["check"] == check]
        bad = [event for event in verdicts if not event["passed"]]
        if bad:
            first = next(iter(bad[0]["message"].strip().splitlines()), "")
            yield ReportRow(check, FAIL, f"in {len(bad)} of {len(verdicts)} tests: {first}")
        elif verdicts:
            yield ReportRow(check, PASS, f"adds up in each of {len(verdicts)} tests")


def hint_of(events: Events) -> str | None:
    """Where to look, by what was compared; None where no test failed."""
    if not any(test["state"] in BAD for test in events.of("test")):
        return None
    return hint([Evidence.of_event(event) for event in events.of("compared")])


def name_of(method: str) -> str:
    """`TestX.test_y` of `__main__.TestX.test_y`; what unittest calls `setUpClass (__main__.TestX)` likewise."""
    name, _, rest = method.partition(" (")
    if rest:
        return f"{rest.removesuffix(')').rpartition('.')[2]}.{name}"
    return ".".join(method.split(".")[-2:])
