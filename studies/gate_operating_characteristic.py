#!/usr/bin/env python3
"""Operating characteristic of the accuracy gate: P(pass) and examples scored, by the true accuracy of the engine.

Result (docs/checks.md): `auto` fails an engine of 0.965 in 0.93 % of runs and passes one of 0.93 in 0.97 %, with 424 and 385
examples expected; one look at 200 examples does so in 16.59 % and 10.10 %.

With a monolithic server beside it the paired gate takes 132 to 174 examples where nothing is lost, 91 to 96 where 3.5 %
of right answers are (docs/decisions/paired-gate.md). `--paired` prints its table alone.

Side by side: the score of one look, the same with retries, TensorRT-LLM's threshold, and the sequential gates. Each
cell holds the exact value and, behind it, that of a seeded simulation. From the repository root:

    scripts/env.sh python3 studies/gate_operating_characteristic.py --out gate.svg
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from pdkit.checks.accuracy.gate import GateOptions, Policy
from pdkit.checks.accuracy.paired import PairedOptions
from pdkit.core.errors import ExitCode
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

    def simulated(self, accuracy: float, runs: int, rng: np.random.Generator) -> OperatingPoint:
        """Share of `runs` that pass, and the mean number of examples, from drawn answers."""
        passed, examples = np.zeros(runs, bool), np.zeros(runs)
        for _ in range(self.retries + 1):
            again = np.flatnonzero(~passed)
            passed[again], used = _draw(self.plan, accuracy, len(again), rng)
            examples[again] += used
        return OperatingPoint(accuracy, float(passed.mean()), float(examples.mean()))


def _draw(plan: Plan, accuracy: float, runs: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    wrong, used, passed, scored = np.zeros(runs, int), np.zeros(runs, int), np.zeros(runs, bool), 0
    for n, at_most, at_least in zip(plan.looks, plan.pass_at_most, plan.fail_at_least, strict=True):
        wrong += rng.binomial(n - scored, 1 - accuracy, runs)
        scored, undecided = n, used == 0
        passes, fails = undecided & (wrong <= at_most), undecided & (wrong >= at_least)
        passed |= passes
        used[passes | fails] = n
    return passed, used


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def report(rules: Sequence[Rule], exact: list[list[OperatingPoint]], drawn: list[list[OperatingPoint]]) -> str:
    def rows(show: Callable[[OperatingPoint], str]) -> list[list[str]]:
        cells = [
            [f"{exacts[0].accuracy:.3f}", *(f"{show(e)} {show(d)}" for e, d in zip(exacts, draws, strict=True))]
            for exacts, draws in zip(zip(*exact, strict=True), zip(*drawn, strict=True), strict=True)
        ]
        return [["accuracy", *(rule.name for rule in rules)], *cells]

    return "\n\n".join(
        f"{title}\n{table(rows(show))}"
        for title, show in (
            ("P(pass): exact, simulated", lambda point: f"{point.pass_probability:.4f}"),
            ("examples scored: exact expectation, simulated mean", lambda point: f"{point.expected_examples:4.0f}"),
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


def draw(path: Path, rules: Sequence[Rule], drawn: list[list[OperatingPoint]], options: GateOptions) -> None:
    """P(pass) and expected examples against accuracy: lines are exact, dots simulated."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 9), layout="constrained")
    fine = np.linspace(ACCURACIES[0], ACCURACIES[-1], 181)
    for rule, dots in zip(rules, drawn, strict=True):
        lines = [rule.exact(accuracy) for accuracy in fine]
        style = "--" if rule.name == Policy.AUTO.value else "-"
        (line,) = above.plot(fine, [point.pass_probability for point in lines], style, label=rule.name)
        below.plot(fine, [point.expected_examples for point in lines], style, color=line.get_color())
        x = [point.accuracy for point in dots]
        above.plot(x, [point.pass_probability for point in dots], ".", color=line.get_color())
        below.plot(x, [point.expected_examples for point in dots], ".", color=line.get_color())
    for axes in (above, below):
        for accuracy, name in ((options.bad, "bad"), (options.good, "good")):
            axes.axvline(accuracy, color="grey", linestyle=":")
            axes.annotate(name, (accuracy, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    above.set_ylabel("probability of passing")
    above.legend()
    below.set_ylabel("examples scored (expected)")
    below.set_xlabel("accuracy of the engine")
    figure.savefig(path)


def _figure_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".png", ".pdf") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: name an .svg, .png or .pdf file in a directory that exists")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    default = GateOptions()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1314, help="scored examples of the data set (%(default)s)")
    parser.add_argument("--good", type=float, default=default.good, help="accuracy that must pass (%(default)s)")
    parser.add_argument("--bad", type=float, default=default.bad, help="accuracy that must fail (%(default)s)")
    parser.add_argument("--alpha", type=float, default=default.alpha, help="largest P(fail | good) (%(default)s)")
    parser.add_argument("--beta", type=float, default=default.beta, help="largest P(pass | bad) (%(default)s)")
    parser.add_argument("--first-look", type=int, default=default.first_look, help="its examples (%(default)s)")
    parser.add_argument("--slice", type=int, default=default.slice_examples, help="examples per slice (%(default)s)")
    parser.add_argument("--runs", type=int, default=50000, help="simulated runs a cell (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (%(default)s)")
    parser.add_argument("--out", type=_figure_path, help="draw it into this .svg, .png or .pdf file, too")
    parser.add_argument("--paired", action="store_true", help="print the table of the paired gate alone")
    args = parser.parse_args(argv)
    if args.paired:
        print(paired_table(args.examples))
        return ExitCode.PASSED
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    if args.out and not find_spec("matplotlib"):
        print("--out needs matplotlib: pip install matplotlib, or leave --out away", file=sys.stderr)
        return ExitCode.NOT_READY
    try:
        options = GateOptions(
            good=args.good,
            bad=args.bad,
            alpha=args.alpha,
            beta=args.beta,
            first_look=args.first_look,
            slice_examples=args.slice,
        )
        rules = rules_of(options, args.examples)
    except ValueError as error:
        parser.error(str(error))
    rng = np.random.default_rng(args.seed)
    exact = [[rule.exact(accuracy) for accuracy in ACCURACIES] for rule in rules]
    drawn = [[rule.simulated(accuracy, args.runs, rng) for accuracy in ACCURACIES] for rule in rules]
    print(report(rules, exact, drawn))
    print(f"\nof {args.examples} examples, {args.runs} simulated runs a cell, seed {args.seed}")
    print(f"\n{summary(rules, options)}")
    losses = " or ".join(f"{detectable_loss(n):.3f} (n={n})" for n in (options.first_look, args.examples))
    print(f"\nTRT-LLM's beta of 0.2 is the chance to miss a loss of accuracy of {losses}, by its own approximation")
    if args.out:
        draw(args.out, rules, drawn, options)
        print(f"\ndrawn: {args.out}")
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(main())
