"""A recorded run, judged again by the checkers of this version: pure functions of what its report directory holds.

A checker that was not there when the run was recorded finds what the run's own tests could not; where the run did not
record what a checker needs, its data are incomplete, which is neither a pass nor a failure.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pdkit.checks.accuracy.client import last_number
from pdkit.checks.hints import hint
from pdkit.checks.order import Ordered, by_load, by_number, of_answers
from pdkit.checks.parity.verdict import LEVEL
from pdkit.core.console import columns
from pdkit.core.errors import ExitCode
from pdkit.core.stats import sign_test_of
from pdkit.runner.report.compare import INCOMPLETE
from pdkit.runner.report.model import FAIL, PASS, FileRun, Report


@dataclass(frozen=True)
class Judged:
    """One checker on one file's run: PASS, FAIL or INCOMPLETE, and why."""

    check: str
    state: str
    sentence: str


Checker = Callable[[FileRun], Iterator[Judged]]


def score(run: FileRun) -> Iterator[Judged]:
    """The score against the gate that was recorded, and against the answers themselves."""
    if run.score is None:
        return
    shown = f"{run.score.correct} of {run.score.examples}"
    if run.score.threshold is None:
        yield Judged("score", INCOMPLETE, f"{shown}, the gate was not recorded")
    else:
        yield Judged(
            "score", PASS if run.score.passed else FAIL, f"{shown}, must be greater than {run.score.threshold:g}"
        )
    if len(run.examples) != run.score.examples:
        yield Judged("answers", INCOMPLETE, f"{len(run.examples)} of {run.score.examples} answers are recorded")
        return
    right = sum(example.is_right for example in run.examples)
    gold = [example for example in run.examples if example.correct_answer is not None]
    other = [
        example.number for example in gold if example.is_right != _is_right(example.answer, example.correct_answer)
    ]
    if right != run.score.correct:
        yield Judged("answers", FAIL, f"{right} answers were right, the score says {run.score.correct}")
    elif other:
        numbers = ", ".join(map(str, other[:5]))
        yield Judged("answers", FAIL, f"{len(other)} are scored otherwise by their last number, such as {numbers}")
    else:
        yield Judged("answers", PASS, f"{len(gold)} of {len(run.examples)} read again, each scored as it was")


def _is_right(answer: str, correct: str | None) -> bool:
    return correct is not None and last_number(answer) == last_number(correct)


def order(run: FileRun) -> Iterator[Judged]:
    """Wrong answers by request number and load."""
    if not run.examples:
        return
    begun = [(example, example.began) for example in run.examples if example.began is not None]
    if len(begun) < len(run.examples):
        yield Judged("order of wrong answers", INCOMPLETE, "when each request began was not recorded")
        return
    yield from _ordered(of_answers([(each.is_right, began, began + each.seconds) for each, began in begun]))


def parity(run: FileRun) -> Iterator[Judged]:
    """ComparedRound requests: none may differ where no control arm was taken, and not more than chance explains where one was."""
    if not run.compared:
        return
    exact = [request for each in run.compared if each.further == () for request in each.evidence.requests]
    wrong = [request.name for request in exact if request.differs]
    if exact:
        where = hint([each.evidence for each in run.compared]) if wrong else None
        sentence = f"{len(wrong)} of {len(exact)} differ" + (f", first {wrong[0]}" if wrong else "")
        yield Judged("compared to the bit", FAIL if wrong else PASS, sentence + (f"; {where}" if where else ""))
    unknown = sum(len(each.evidence.requests) for each in run.compared if each.further is None)
    if unknown:
        yield Judged("compared", INCOMPLETE, f"of {unknown} requests it was not recorded what the control arm answered")
    with_control = [each for each in run.compared if each.further]
    signs = [sign for each in with_control for sign in each.further or ()]
    if not signs:
        return
    found = sign_test_of(signs.count(1), signs.count(-1))
    sentence = (
        f"further off than the control in {found.larger} of {found.larger + found.smaller}, p = {found.p_value:.2g}"
    )
    yield Judged("compared with a control", FAIL if found.p_value <= LEVEL / 2 else PASS, sentence)
    loads = [request.in_flight for each in with_control for request in each.evidence.requests]
    pairs = [(sign > 0, load) for sign, load in zip(signs, loads, strict=True) if sign]
    further, at = [each for each, _ in pairs], [load for _, load in pairs]
    what = "candidate further off"
    yield from _ordered((by_number(what, further, LEVEL / 2), by_load(what, further, at, LEVEL / 2)))


def _ordered(judged: Sequence[Ordered]) -> Iterator[Judged]:
    for each in judged:
        sentence = each.report().removeprefix("order: ").removeprefix(f"{FAIL}, ").removeprefix(f"{PASS}, ")
        yield Judged(f"by {each.by}", PASS if each.passed else FAIL, sentence)


CHECKERS: tuple[Checker, ...] = (score, order, parity)


def judged(run: FileRun) -> tuple[Judged, ...]:
    """What each checker says of a file's run; nothing where it recorded nothing that one is about."""
    return tuple(found for checker in CHECKERS for found in checker(run))


def rejudged(report: Report) -> tuple[str, ExitCode]:
    """(text for a console, FAILED where a checker now fails, NOTHING_RAN where none can say anything, else PASSED)."""
    parts, states = [], []
    for run in report.files:
        found = judged(run)
        states += [each.state for each in found]
        if found:
            rows = [["checker", "now", ""], *([each.check, each.state, each.sentence] for each in found)]
            parts.append(f"{run.file}: {run.state} when it ran\n{columns(rows, indent='  ')}")
    failed, passed, incomplete = (states.count(state) for state in (FAIL, PASS, INCOMPLETE))
    code = ExitCode.FAILED if failed else ExitCode.PASSED if passed else ExitCode.NOTHING_RAN
    total = (
        f"judged again: {passed} passed, {failed} failed, {incomplete} {INCOMPLETE}; {report.title}, {report.verdict}"
    )
    return "\n\n".join([*parts, *report.notes, total]), code
