"""Accuracy on GSM8K: one look, or a gate with stated error rates."""

from collections.abc import Sequence
from types import SimpleNamespace

from pdkit.checks.accuracy.gate import GateOptions, Policy
from pdkit.checks.accuracy.gsm8k import gsm8k_args, gsm8k_gate, paired_gate
from pdkit.checks.accuracy.paired import FEW_FLIPS, PairedOptions
from pdkit.checks.accuracy.sglang_eval import run_eval_with_outcomes
from pdkit.checks.base import Checks
from pdkit.checks.order import by_number, of_answers
from pdkit.core import events
from pdkit.deployment.evals import run_eval

FIRST_LOOK = "accuracy gate"  # name of the check


class GSM8KChecks(Checks):
    """`test_gsm8k` as test_disaggregation_dsv4.py asks it: examples once, of which more than `min_score` must be right."""

    needs: tuple[str, ...] = ("lb_url", "model", "gsm8k_data_path")

    min_score = 0.95
    gsm8k_examples = 200

    def test_gsm8k(self) -> None:
        args = gsm8k_args(self.lb_url, self.model, self.gsm8k_data_path, num_examples=self.gsm8k_examples)
        metrics = run_eval(args, gate=self.min_score)
        with events.phase("gate"):
            self.assertGreater(metrics["score"], self.min_score)
            for judged in of_answers(metrics.get("answered", ())):
                judged.assert_passed()


class AccuracyGateChecks(Checks):
    """`test_gsm8k` with stated error rates.

    gsm8k_gate_policy   "first-look" (200 examples once), "sequential", or "auto", see `pdkit.checks.accuracy.gate.Policy`
    min_score           share of right answers that an engine must have
    monolithic_url      where the class has one that is up and the policy is "auto", it is asked the same examples, and
                        what the pair loses of its right answers decides, which takes a third of the examples
    gsm8k_flips         share of examples on which two sound servers differ, see `PairedOptions.flips`
    """

    needs: tuple[str, ...] = ("lb_url", "model", "gsm8k_data_path")

    gsm8k_gate_policy: str = "auto"
    min_score = 0.95
    gsm8k_flips = FEW_FLIPS

    def gsm8k_args(self, base_url: str) -> SimpleNamespace:
        """What `run_eval` gets, but for which examples."""
        return gsm8k_args(base_url, self.model, self.gsm8k_data_path, num_shots=5)

    def test_gsm8k(self) -> None:
        options = GateOptions(policy=Policy(self.gsm8k_gate_policy), threshold=self.min_score)
        monolithic_url = getattr(self, "monolithic_url", None)
        if monolithic_url and options.policy is Policy.AUTO:
            arguments = self.gsm8k_args(self.lb_url), self.gsm8k_args(monolithic_url)
            paired = paired_gate(*arguments, PairedOptions(flips=self.gsm8k_flips), run=run_eval_with_outcomes)
            paired.assert_passed()
            return self.assert_no_decay("right answers lost", paired.lost_in_order)
        gate = gsm8k_gate(self.gsm8k_args(self.lb_url), options, run=run_eval_with_outcomes)
        if gate.first_look_passed is not None:
            events.verdict(FIRST_LOOK, gate.first_look_passed, gate.first_look_alone())
        gate.assert_passed()
        self.assert_no_decay("wrong answers", [not right for right in gate.outcomes or ()])

    @staticmethod
    def assert_no_decay(what: str, bad: Sequence[bool]) -> None:
        """Raises AssertionError where `bad` ones of the examples, in their order, come late."""
        by_number(what, bad).assert_passed()
