"""Thresholds of scores, against the noise of as many examples as the test asks."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from pdkit.core.source import Function, Source, TestClass
from pdkit.preflight.finding import Finding, broken

RATE = 0.05
_COUNTS = {"num_examples", "num_questions"}
_SCORE = re.compile(r"score|accuracy|\bacc\b", re.IGNORECASE)
# Attributes of SGLang's eval mixins, which score 200 examples unless told otherwise.
_MIXINS, _MIXIN_COUNTS = (
    ("gsm8k_accuracy_thres", "gsm8k_score_threshold"),
    ("gsm8k_num_examples", "gsm8k_num_questions"),
)


@dataclass(frozen=True)
class Noise:
    """How often a threshold says the wrong thing of engines that lie clearly on one side of it.

    `better` and `worse` are accuracies with half and with twice the share of answers that the threshold allows to be
    of the rarer kind (wrong ones above 0.5, right ones below); `false_alarm` is P(fail | better), `miss`
    P(pass | worse), both exact; `enough` is the fewest examples with which some threshold keeps both at RATE.
    """

    better: float
    worse: float
    false_alarm: float
    miss: float
    enough: int | None


def noise(threshold: float, examples: int, strict: bool = True) -> Noise:
    """Noise of `score > threshold` over that many examples, or of `>=` where not `strict`."""
    from pdkit.core import stats  # scipy: only a file with a threshold pays for it

    rare = min(threshold, 1 - threshold)
    better, worse = (1 - rare / 2, 1 - 2 * rare) if threshold >= 0.5 else (2 * rare, rare / 2)
    plan = stats.fixed_plan(examples, threshold)
    if not strict:
        most = max(wrong for wrong in range(examples + 1) if (examples - wrong) / examples >= threshold)
        plan = stats.Plan((examples,), (most,), (most + 1,))
    good, bad = (stats.operating_point(plan, accuracy).pass_probability for accuracy in (better, worse))
    enough = stats.examples_needed(better, max(worse, 1e-9), RATE, RATE)
    return Noise(better, worse, 1 - good, bad, enough)


@dataclass(frozen=True)
class Threshold:
    """`score > value` over `examples`, written at `line` of `source`."""

    source: Source
    line: int
    value: float
    strict: bool
    examples: int


def noisy_threshold(source: Source, _: object) -> Iterator[Finding]:
    """A threshold tells half the errors that it allows from twice as many, each time but one in twenty."""
    found = [t for cls in source.classes.values() for t in _thresholds(cls)]
    for threshold in dict.fromkeys(t for t in found if t.source is source):
        n = noise(threshold.value, threshold.examples, threshold.strict)
        if max(n.false_alarm, n.miss) > RATE:
            sign = ">" if threshold.strict else ">="
            message = (
                f"score {sign} {threshold.value:g} over {threshold.examples} examples is within its own noise: "
                f"accuracy {n.better:g} fails {n.false_alarm:.0%} and {n.worse:g} passes {n.miss:.0%} of the time; "
                f"{n.enough or 'over 100000'} examples can tell them apart, or use pdkit.checks.accuracy.checks.AccuracyGateChecks"
            )
            yield broken(source.path, threshold.line, "noisy-threshold", message)


def _thresholds(cls: TestClass) -> Iterator[Threshold]:
    for name in dict.fromkeys(name for owner in cls.mro for name in owner.methods if name.startswith("test")):
        found = cls.method(name)
        assert found, name
        owner, function = found
        counts = list(_counts(cls, owner, function))
        for line, score, bound, strict in _comparisons(function):
            examples = [count for count_line, count in counts if count_line <= line]
            if examples and _SCORE.search(ast.unparse(score)):
                yield from _threshold(cls, owner, line, bound, strict, examples[-1])
    asked = next((n for n in map(cls.value, _MIXIN_COUNTS) if isinstance(n, int)), 200)
    for name in _MIXINS:
        attribute = cls.attribute(name)
        value = cls.value(name)
        if attribute and _is_share(value):
            yield Threshold(attribute[0].source, attribute[1].lineno, value, False, asked)


def _threshold(
    cls: TestClass, owner: TestClass, line: int, bound: ast.expr, strict: bool, examples: int
) -> Iterator[Threshold]:
    attribute = cls.attribute(bound.attr) if _is_own(bound) else None
    source, line = (attribute[0].source, attribute[1].lineno) if attribute else (owner.source, line)
    value = _resolve(cls, owner, bound)
    if _is_share(value):
        yield Threshold(source, line, value, strict, examples)


def _is_share(value: object) -> TypeGuard[float]:
    return isinstance(value, float) and 0 < value < 1


def _is_own(node: ast.expr) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _resolve(cls: TestClass, owner: TestClass, node: ast.expr) -> object:
    return cls.value(node.attr) if _is_own(node) else owner.source.value(node)


def _counts(cls: TestClass, owner: TestClass, function: Function) -> Iterator[tuple[int, int]]:
    for node in ast.walk(function):
        if isinstance(node, ast.keyword) and node.arg in _COUNTS:
            value = _resolve(cls, owner, node.value)
            if isinstance(value, int) and value > 0:
                yield node.value.lineno, value


def _comparisons(function: Function) -> Iterator[tuple[int, ast.expr, ast.expr, bool]]:
    """(line, score, threshold, strict) of each assertion that something is above something."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) >= 2:
            first, second = node.args[:2]
            if node.func.attr in ("assertGreater", "assertGreaterEqual"):
                yield node.lineno, first, second, node.func.attr == "assertGreater"
            elif node.func.attr in ("assertLess", "assertLessEqual"):
                yield node.lineno, second, first, node.func.attr == "assertLess"
        elif isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare) and len(node.test.ops) == 1:
            left, operator, right = node.test.left, node.test.ops[0], node.test.comparators[0]
            if isinstance(operator, (ast.Gt, ast.GtE)):
                yield node.lineno, left, right, isinstance(operator, ast.Gt)
            elif isinstance(operator, (ast.Lt, ast.LtE)):
                yield node.lineno, right, left, isinstance(operator, ast.Lt)
