#!/usr/bin/env python3
"""Operating characteristic of the accuracy gate: P(pass) and examples scored, by the true accuracy of the engine.

Result (docs/checks.md): `auto` fails an engine of 0.965 in 0.93 % of runs and passes one of 0.93 in 0.97 %, with 424 and 385
examples expected; one look at 200 examples does so in 16.59 % and 10.10 %.

With a monolithic server beside it the paired gate takes 132 to 174 examples where nothing is lost, 91 to 96 where 3.5 %
of right answers are (docs/decisions/paired-gate.md). `--paired` prints its table alone.

Side by side: the score of one look, the same with retries, TensorRT-LLM's threshold, and the sequential gates, all
exact; `test_gate.py` holds the exact values against drawn answers. From the repository root:

    scripts/env.sh python3 studies/gate_operating_characteristic.py
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from pdkit.checks.accuracy.gate import GateOptions, Policy
from pdkit.checks.accuracy.paired import PairedOptions
from pdkit.core.console import columns
from pdkit.core.paired import error_rates, paired_point
from pdkit.core.stats import (
    OperatingPoint,
    Plan,
    detectable_loss,
    fixed_plan,
    hypothesis_threshold,
    operating_point,
    with_retries,
)

ACCURACIES = (0.90, 0.92, 0.93, 0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975, 0.98, 0.99)


@dataclass(frozen=True)
class Rule:
    """A plan, and how often it is run again on fresh answers until it passes."""

    name: str
    plan: Plan
    retries: int = 0

    def exact(self, accuracy: float) -> OperatingPoint:
        return with_retries(operating_point(self.plan, accuracy), self.retries)


def rules_of(options: GateOptions, available: int) -> list[Rule]:
    """The gates to compare; ValueError where the data set is too small for one."""
    gates = [
        Rule(policy.value, replace(options, policy=policy).plan(available))
        for policy in (Policy.SEQUENTIAL, Policy.AUTO)
    ]
    size, above = options.first_look, options.threshold
    once = fixed_plan(size, above)
    thresholds = {n: hypothesis_threshold(options.good, n) for n in (size, available)}
    return [
        Rule(f"> {above:g} once", once),
        Rule("1 retry", once, retries=1),
        Rule("3 retries", once, retries=3),
        # TensorRT-LLM passes at the threshold, `fixed_plan` above it.
        *(Rule(f"TRT-LLM n={n}", fixed_plan(n, np.nextafter(threshold, 0))) for n, threshold in thresholds.items()),
        *gates,
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    return columns(rows, right=range(len(rows[0])))


def report(rules: Sequence[Rule]) -> str:
    """P(pass) and expected examples of each rule, by accuracy."""
    points = [[rule.exact(accuracy) for rule in rules] for accuracy in ACCURACIES]
    return "\n\n".join(
        f"{title}\n{table([['accuracy', *(rule.name for rule in rules)], *cells])}"
        for title, cells in (
            ("P(pass)", [[f"{row[0].accuracy:.3f}", *(f"{p.pass_probability:.4f}" for p in row)] for row in points]),
            ("examples", [[f"{row[0].accuracy:.3f}", *(f"{p.expected_examples:.0f}" for p in row)] for row in points]),
        )
    )


def summary(rules: Sequence[Rule], options: GateOptions) -> str:
    """Error rates of each rule at the two named accuracies."""
    rows = [["rule", f"false alarm at {options.good}", f"miss at {options.bad}", "expected examples", "worst"]]
    between = np.arange(options.bad, options.good, 0.001)
    for rule in rules:
        good, bad = rule.exact(options.good), rule.exact(options.bad)
        worst = max(rule.exact(accuracy).expected_examples for accuracy in between)
        rows.append(
            [
                rule.name,
                f"{1 - good.pass_probability:.2%}",
                f"{bad.pass_probability:.2%}",
                f"{good.expected_examples:.0f} and {bad.expected_examples:.0f}",
                f"{worst:.0f}",
            ]
        )
    return table(rows)


FLIPS = (0.0025, 0.005, 0.01, 0.02, 0.04)
LOSSES = (0.0, 0.005, 0.01, 0.02, 0.035, 0.05, 0.1)


def paired_table(available: int) -> str:
    """The paired gate for each flip rate that it may be planned for: error rates and examples, exact."""
    options = PairedOptions()
    rows = [
        ["flips up to", "false alarm", f"miss of {options.loss}", "examples, equal", "examples, loss", "at 2x flips"]
    ]
    for flips in FLIPS:
        plan = replace(options, flips=flips).plan(available)
        alarm, miss = error_rates(plan, shares=10)
        equal = [paired_point(plan, rate / 2, rate / 2).expected_examples for rate in (0, flips)]
        lossy = [paired_point(plan, rate / 2 + options.loss, rate / 2).expected_examples for rate in (0, flips)]
        more = paired_point(plan, flips, flips).fail_probability
        ranges = [f"{min(each):.0f} to {max(each):.0f}" for each in (equal, lossy)]
        rows.append([f"{flips:g}", f"{alarm:.2%}", f"{miss:.2%}", *ranges, f"{more:.1%}"])
    plan = options.plan(available)
    curve = [["loss", "P(pass)", "examples"]]
    for loss in LOSSES:
        point = paired_point(plan, options.flips / 4 + loss, options.flips / 4)
        curve.append([f"{loss:g}", f"{point.pass_probability:.4f}", f"{point.expected_examples:.0f}"])
    return (
        f"paired gate, of {available} examples, looks every {options.step}; the largest rates of all flip rates up to the "
        f"one planned for\n{table(rows)}\n\nplanned for {options.flips:g}, where it is {options.flips / 2:g}\n{table(curve)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1314, help="scored examples of the data set (%(default)s)")
    parser.add_argument("--paired", action="store_true", help="print the table of the paired gate alone")
    args = parser.parse_args()
    if args.paired:
        return print(paired_table(args.examples))
    options = GateOptions()
    try:
        rules = rules_of(options, args.examples)
    except ValueError as error:
        parser.error(str(error))
    losses = " or ".join(f"{detectable_loss(n):.3f} (n={n})" for n in (options.first_look, args.examples))
    print(report(rules), summary(rules, options), sep="\n\n")
    print(f"\nTRT-LLM's beta of 0.2 is the chance to miss a loss of accuracy of {losses}, by its own approximation")


if __name__ == "__main__":
    main()
