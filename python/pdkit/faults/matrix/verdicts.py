"""From the outcome of one test to verdicts of the checks that it holds.

A test of the suite says more than passed or failed: requests and servers are accounted for apart from what it asserts
itself, and the accuracy gate says what its first look alone would have decided.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pdkit.checks.accounting.checks import OWN_RESULT
from pdkit.checks.accounting.invariants import CLIENT, SERVERS
from pdkit.checks.accuracy.checks import FIRST_LOOK
from pdkit.core.events import BAD, SKIPPED, Events

SEQUENTIAL = "sequential gate"
LEADING = (FIRST_LOOK, SEQUENTIAL, CLIENT, SERVERS)

GSM8K_TEST = "test_gsm8k"
MESSAGE_LIMIT = 300


@dataclass(frozen=True)
class CheckVerdict:
    """caught: the check failed. message: why, on one line. seconds: how long the test ran that holds the check."""

    caught: bool
    seconds: float
    message: str = ""


def check_of(test: str) -> str:
    """Name of the check that a test method is, if it holds no other."""
    return SEQUENTIAL if test == GSM8K_TEST else test.removeprefix("test_").replace("_", " ")


def checks_of(tests: Iterable[str]) -> list[str]:
    """The checks that the tests hold, in the order of the matrix."""
    found = {check_of(test) for test in tests} | {CLIENT, SERVERS}
    if GSM8K_TEST in tests:
        found.add(FIRST_LOOK)
    return [name for name in LEADING if name in found] + [
        check_of(test) for test in tests if check_of(test) not in LEADING
    ]


def one_line(text: str) -> str:
    return " ".join(text.split())[:MESSAGE_LIMIT]


def verdicts_of(test: str, happened: Events, seconds: float) -> dict[str, CheckVerdict]:
    """{check: verdict} of one test by its events; nothing of one that was skipped. Raises ValueError without events.

    Where requests are accounted for, the test's event has the outcome of both together, and the verdict on the test by
    itself tells them apart. Of a test that was tried again the last verdicts count.
    """
    tests = happened.of("test")
    if not tests:
        raise ValueError(f"{test} ran and left no event")
    bad = next((event for event in tests if event["state"] in BAD), None)
    if bad is None and any(event["state"] == SKIPPED for event in tests):
        return {}
    told = {event["check"]: _verdict(event, seconds) for event in happened.of("verdict")}
    own = CheckVerdict(bad is not None, seconds, one_line(bad["message"]) if bad else "")
    accounted = {check: told[check] for check in (OWN_RESULT, CLIENT, SERVERS) if check in told}
    if any(verdict.caught for verdict in accounted.values()):  # they are why the test failed
        own = accounted.get(OWN_RESULT, own)
    return {check_of(test): own} | {check: told[check] for check in (CLIENT, SERVERS, FIRST_LOOK) if check in told}


def _verdict(event: dict[str, Any], seconds: float) -> CheckVerdict:
    return CheckVerdict(not event["passed"], seconds, "" if event["passed"] else one_line(event["message"]))


def merged(one: CheckVerdict | None, other: CheckVerdict) -> CheckVerdict:
    """Of a check that several tests hold: the first that catches counts, and the time of all until then."""
    if one is None or one.caught:
        return one or other
    return CheckVerdict(other.caught, one.seconds + other.seconds, other.message)
