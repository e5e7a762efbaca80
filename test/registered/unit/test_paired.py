"""The paired gate: its maths checked by independent ways, its verdicts and its report."""

import itertools
import unittest
from functools import lru_cache

import numpy as np
from pdkit.checks.accuracy.gate import Verdict
from pdkit.checks.accuracy.paired import FEW_FLIPS, MANY_FLIPS, PairedGate, PairedOptions
from pdkit.core import stats
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.paired import PairedPlan, error_rates, log_ratio, paired_plan, paired_point

register_cpu_ci(est_time=12, suite="stage-a-test-cpu")

OPTIONS = PairedOptions()
GOOD = (True,)


decided = lru_cache(maxsize=None)(PairedPlan.decide)


def end_of(plan, pairs):
    """(whether it passes, after how many) of a sequence of pairs: 1 is lost, -1 gained, 0 neither; by definition."""
    for look, examples in enumerate(plan.looks):
        seen = pairs[:examples]
        passes = decided(plan, look, seen.count(1), seen.count(-1))
        if passes is not None:
            return passes, examples
    raise AssertionError("the last look decides")


class TestPoint(unittest.TestCase):
    def test_equals_the_sum_over_all_sequences(self):
        plan = PairedPlan((2, 5, 8), loss=0.3, flips=0.1, pass_at=-1.0, fail_at=1.2, level=0.1)
        for lost, gained in ((0.05, 0.05), (0.35, 0.05), (0.3, 0.0)):
            rates = {1: lost, -1: gained, 0: 1 - lost - gained}
            passes, expected = 0.0, 0.0
            for pairs in itertools.product((1, 0, -1), repeat=8):
                probability = np.prod([rates[pair] for pair in pairs])
                passed, examples = end_of(plan, pairs)
                passes, expected = passes + probability * passed, expected + probability * examples
            point = paired_point(plan, lost, gained)
            with self.subTest(lost=lost, gained=gained):
                self.assertAlmostEqual(point.pass_probability, passes, places=10)
                self.assertAlmostEqual(point.fail_probability, 1 - passes, places=10)
                self.assertAlmostEqual(point.expected_examples, expected, places=8)

    def test_agrees_with_drawn_pairs_within_their_own_error(self):
        plan, rng, runs = OPTIONS.plan(1314), np.random.default_rng(5), 500
        for lost, gained in ((0.01, 0.0025), (0.0375, 0.0025)):
            drawn = rng.choice((1, -1, 0), p=(lost, gained, 1 - lost - gained), size=(runs, plan.looks[-1]))
            passes = np.mean([end_of(plan, pairs.tolist())[0] for pairs in drawn])
            exact = paired_point(plan, lost, gained).pass_probability
            self.assertAlmostEqual(passes, exact, delta=5 * np.sqrt(exact * (1 - exact) / runs) + 1e-3)

    def test_the_ratio_is_that_of_two_mean_likelihoods(self):
        loss, flips, lost, gained, same = 0.1, 0.04, 2, 1, 7
        rates = np.linspace(0, flips, 4001)[1:] - flips / 8000
        none = np.mean((rates / 2) ** (lost + gained) * (1 - rates) ** same)
        some = np.mean((rates / 2 + loss) ** lost * (rates / 2) ** gained * (1 - rates - loss) ** same)
        self.assertAlmostEqual(float(log_ratio(10, lost, gained, loss, flips)), np.log(some / none), places=2)


class TestPlan(unittest.TestCase):
    def test_keeps_the_error_rates_for_every_flip_rate_at_half_of_the_examples_of_the_unpaired_gate(self):
        plan = OPTIONS.plan(1314)
        alarm, miss = error_rates(plan, shares=10)
        self.assertLessEqual(max(alarm, miss), 0.01)
        for flips in (0.0, FEW_FLIPS / 2, FEW_FLIPS):
            self.assertLess(paired_point(plan, flips / 2, flips / 2).expected_examples, 424 / 2)
            self.assertLess(paired_point(plan, flips / 2 + OPTIONS.loss, flips / 2).expected_examples, 385 / 2)

    def test_keeps_them_where_flips_are_many(self):
        plan = PairedOptions(flips=MANY_FLIPS).plan(1314)
        self.assertLessEqual(max(error_rates(plan, shares=4)), 0.01)

    def test_the_last_look_is_mcnemars(self):
        plan = OPTIONS.plan(1314)
        for lost, gained in ((6, 0), (7, 0), (40, 20), (40, 22)):
            expected = stats.sign_test_of(lost, gained).p_value > 0.01
            self.assertIs(plan.decide(len(plan.looks) - 1, lost, gained), expected)

    def test_more_flips_than_planned_do_not_fail_early(self):
        plan = OPTIONS.plan(1314)
        self.assertIs(plan.decide(1, 6, 0), False)
        self.assertIsNone(plan.decide(1, 6, 6))
        self.assertTrue(plan.more_flips(88, 6))

    def test_bad_options_and_too_few_examples_are_one_line(self):
        usual = {"loss": 0.035, "flips": 0.005, "alpha": 0.01, "beta": 0.01, "step": 44}
        for changed, message in (
            ({"alpha": 0.7}, "error rates between 0 and 0.5"),
            ({"flips": 0.0}, "loss and flips between 0 and 0.5"),
            ({"step": 0}, "a positive step"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                paired_plan(1314, **usual | changed)
        with self.assertRaisesRegex(stats.UnattainableError, "100 pairs cannot find a loss of 0.035"):
            paired_plan(100, **usual)


class TestGate(unittest.TestCase):
    def gate(self, lost=0, gained=0, examples=132, both_wrong=0):
        same = examples - lost - gained - both_wrong
        baseline = (True,) * (lost + same) + (False,) * (gained + both_wrong)
        candidate = (False,) * lost + (True,) * (same + gained) + (False,) * both_wrong
        return PairedGate(OPTIONS, 1314, baseline, candidate)

    def test_equal_answers_pass_and_a_few_losses_fail(self):
        self.assertEqual(self.gate(examples=44).verdict, Verdict.UNDECIDED)
        self.assertEqual(self.gate(examples=44).next_examples, 44)
        self.gate().assert_passed()
        self.assertEqual(self.gate(lost=3, examples=44).verdict, Verdict.FAIL)
        with self.assertRaisesRegex(AssertionError, "3 right with the baseline only, 0 right with the candidate only"):
            self.gate(lost=3, examples=44).assert_passed()

    def test_what_both_get_wrong_is_no_loss(self):
        self.gate(both_wrong=5).assert_passed()

    def test_a_baseline_that_is_bad_itself_proves_nothing(self):
        with self.assertRaisesRegex(AssertionError, "the baseline itself gets 102 of 132 right"):
            self.gate(both_wrong=30).assert_passed()

    def test_takes_the_slice_asked_for(self):
        gate = PairedGate(OPTIONS, 1314)
        self.assertEqual((gate.verdict, gate.next_examples), (Verdict.UNDECIDED, 44))
        with self.assertRaisesRegex(AssertionError, "asked for 44 examples, got 1"):
            gate.record(GOOD, GOOD)
        with self.assertRaisesRegex(ValueError, "44 and 43"):
            gate.record(GOOD * 44, GOOD * 43)

    def test_the_report_states_the_rates_of_its_own_plan(self):
        alarm, miss = error_rates(OPTIONS.plan(1314))
        report = self.gate().report()
        self.assertIn(f"fail with a probability of at most {alarm:.4f} (flips up to 0.005)", report)
        self.assertIn(f"passes with at most {miss:.4f}", report)
        self.assertIn("more flips than 0.005", self.gate(gained=6).report())
        self.assertIn("nothing scored", PairedGate(OPTIONS, 1314).report())


if __name__ == "__main__":
    unittest.main()
