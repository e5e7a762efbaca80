"""From the outcome of one test to verdicts of the checks that it holds.

A test of the suite says more than passed or failed: requests and servers are accounted for apart from what it asserts
itself, and the accuracy gate says what its first look alone would have decided.
"""

import re
from dataclasses import dataclass

from pdkit.checks.accounting.checks import unwrapped

FIRST_LOOK = "accuracy gate"
SEQUENTIAL = "sequential gate"
CLIENT = "request accounting"
SERVERS = "division of labour"
LEADING = (FIRST_LOOK, SEQUENTIAL, CLIENT, SERVERS)

GSM8K_TEST = "test_gsm8k"
MESSAGE_LIMIT = 300

_FIRST_LOOK = re.compile(r"^the first look alone \(.*\): [\d.]+, (?P<verdict>\w+)", re.MULTILINE | re.IGNORECASE)
_ACCOUNT = re.compile(r"^(?P<side>client|servers): (?P<verdict>PASS|FAIL)", re.MULTILINE)


@dataclass(frozen=True)
class Verdict:
    """caught: the check failed. message: why, on one line. seconds: how long the test ran that holds the check."""

    caught: bool
    seconds: float
    message: str = ""


def check_of(test: str) -> str:
    """Name of the check that a test method is, if it holds no other."""
    return SEQUENTIAL if test == GSM8K_TEST else test.removeprefix("test_").replace("_", " ")


def checks_of(tests) -> list[str]:
    """The checks that the tests hold, in the order of the matrix."""
    found = {check_of(test) for test in tests} | {CLIENT, SERVERS}
    if GSM8K_TEST in tests:
        found.add(FIRST_LOOK)
    return [name for name in LEADING if name in found] + [
        check_of(test) for test in tests if check_of(test) not in LEADING
    ]


def one_line(text: str) -> str:
    return " ".join(text.split())[:MESSAGE_LIMIT]


def verdicts_of(test: str, error: BaseException | None, output: str, seconds: float) -> dict[str, Verdict]:
    """{check: verdict} of one test that ended with `error`, or None, and printed `output`.

    The request accounting raises its own report from the error of the test, if there was one.
    """
    told = f"{output}\n{error or ''}"
    accounts = {match["side"]: match["verdict"] == "FAIL" for match in _ACCOUNT.finditer(told)}
    own = error.__cause__ if error is not None and str(error).startswith("request accounting: FAIL") else error
    found = {check_of(test): Verdict(own is not None, seconds, "" if own is None else one_line(f"{unwrapped(own)}"))}
    for side, check in (("client", CLIENT), ("servers", SERVERS)):
        if side in accounts:
            found[check] = Verdict(accounts[side], seconds, one_line(_after(told, side)) if accounts[side] else "")
    if test == GSM8K_TEST:
        matches = list(_FIRST_LOOK.finditer(told))
        if matches:
            failed = matches[-1]["verdict"].upper() == "FAIL"
            found[FIRST_LOOK] = Verdict(failed, seconds, matches[-1][0] if failed else "")
    return found


def _after(text, side):
    return text[text.rindex(f"{side}: FAIL") :]


def merged(one: Verdict | None, other: Verdict) -> Verdict:
    """Of a check that several tests hold: the first that catches counts, and the time of all until then."""
    if one is None or one.caught:
        return one or other
    return Verdict(other.caught, one.seconds + other.seconds, other.message)
