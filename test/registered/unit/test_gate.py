"""The accuracy gates: their maths, and that of the order of wrong answers, checked by independent ways; verdicts, reports."""

import itertools
import math
import unittest
from functools import lru_cache

import numpy as np
from pdkit.checks.accuracy.gate import AccuracyGate, GateOptions, Policy, ScoredSlice, Verdict
from pdkit.checks.accuracy.paired import FEW_FLIPS, MANY_FLIPS, PairedGate, PairedOptions
from pdkit.checks.order import by_load, by_number, in_flight
from pdkit.core import stats
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.order import latest_change
from pdkit.core.paired import PairedPlan, error_rates, log_ratio, paired_plan, paired_point
from scipy.stats import beta, binom, hypergeom, norm

register_cpu_ci(est_time=7, suite="stage-a-test-cpu")

DEFAULT = {"good": 0.965, "bad": 0.93, "alpha": 0.01, "beta": 0.01, "first": 200, "step": 100}


def rates_of(plan, good=0.965, bad=0.93):
    """(false alarm, miss, the larger expected number of examples), exact."""
    points = [stats.operating_point(plan, accuracy) for accuracy in (good, bad)]
    return 1 - points[0].pass_probability, points[1].pass_probability, max(p.expected_examples for p in points)


def walk(plan, wrong):
    """Whether a sequence of wrong answers (booleans, one per example) passes, and after how many: by definition."""
    for n, at_most, at_least in zip(plan.looks, plan.pass_at_most, plan.fail_at_least, strict=True):
        count = sum(wrong[:n])
        if count <= at_most or count >= at_least:
            return count <= at_most, n
    raise AssertionError("the last look decides")


class TestInterval(unittest.TestCase):
    def test_is_the_beta_quantiles_of_clopper_and_pearson(self):
        for correct, examples in ((0, 200), (1, 200), (190, 200), (366, 400), (200, 200)):
            low, high = stats.exact_interval(correct, examples)
            with self.subTest(correct=correct, examples=examples):
                wrong = examples - correct
                self.assertAlmostEqual(low, beta.ppf(0.025, correct, wrong + 1) if correct else 0.0)
                self.assertAlmostEqual(high, beta.ppf(0.975, correct + 1, wrong) if wrong else 1.0)

    def test_all_right_has_the_closed_form(self):
        self.assertAlmostEqual(stats.exact_interval(200, 200)[0], 0.025 ** (1 / 200))


class TestFixedPlan(unittest.TestCase):
    def test_is_strictly_above_for_every_count(self):
        for examples, above in ((200, 0.95), (7, 0.5), (20, 0.35), (1314, 0.93), (3, 0.0)):
            plan = stats.fixed_plan(examples, above)
            for correct in range(examples + 1):
                with self.subTest(examples=examples, above=above, correct=correct):
                    self.assertEqual(examples - correct <= plan.pass_at_most[0], correct / examples > above)

    def test_its_operating_point_is_a_binomial_tail(self):
        for accuracy in (0.93, 0.95, 0.965):
            point = stats.operating_point(stats.fixed_plan(200, 0.95), accuracy)
            self.assertAlmostEqual(point.pass_probability, binom.sf(190, 200, accuracy))
            self.assertAlmostEqual(point.expected_examples, 200)

    def test_retries(self):
        once = stats.operating_point(stats.fixed_plan(200, 0.95), 0.93)
        p = once.pass_probability
        for retries, passes in ((0, p), (1, p + (1 - p) * p), (3, 1 - (1 - p) ** 4)):
            self.assertAlmostEqual(stats.with_retries(once, retries).pass_probability, passes)
        self.assertAlmostEqual(stats.with_retries(once, 1).expected_examples, 200 + (1 - p) * 200)


class TestPlan(unittest.TestCase):
    def test_refuses_thresholds_that_cross_fall_or_leave_something_undecided(self):
        for looks, at_most, at_least in (
            ((10, 20), (5, 4), (6, 7)),
            ((10, 20), (1, 4), (9, 5)),
            ((10, 20), (3, 4), (3, 5)),
            ((10, 20), (1, 3), (4, 5)),
            ((20, 10), (1, 3), (3, 4)),
            ((10, 10), (1, 3), (3, 4)),
            ((), (), ()),
        ):
            with self.subTest(looks=looks, at_most=at_most), self.assertRaises(AssertionError):
                stats.Plan(looks, at_most, at_least)

    def test_looks(self):
        self.assertEqual(stats.look_sizes(500, 200, 100), (200, 300, 400, 500))
        self.assertEqual(stats.look_sizes(530, 200, 100), (200, 300, 400, 530))
        self.assertEqual(stats.look_sizes(570, 200, 100), (200, 300, 400, 500, 570))
        self.assertEqual(stats.look_sizes(150, 200, 100), (150,))


class TestWald(unittest.TestCase):
    def test_which_rate_belongs_to_which_threshold(self):
        to_pass, to_fail = stats.wald_thresholds(alpha=0.001, beta=0.05)
        self.assertAlmostEqual(to_pass, math.log(0.05 / 0.999))
        self.assertAlmostEqual(to_fail, math.log(0.95 / 0.001))

    def test_bounds_are_where_the_likelihood_ratio_crosses(self):
        good, bad, to_pass, to_fail = 0.965, 0.93, -3.0, 4.0
        looks = (200, 300, 1000)
        for n, at_most, at_least in zip(looks, *stats.sprt_bounds(looks, good, bad, to_pass, to_fail), strict=True):
            ratio = [binom.logpmf(k, n, 1 - bad) - binom.logpmf(k, n, 1 - good) for k in range(n + 1)]
            self.assertEqual(at_most, max(k for k in range(n + 1) if ratio[k] <= to_pass))
            self.assertEqual(at_least, min(k for k in range(n + 1) if ratio[k] >= to_fail))


class TestRecursion(unittest.TestCase):
    def test_equals_the_sum_over_all_sequences(self):
        plan = stats.Plan((4, 6, 9, 12), (-1, 0, 1, 3), (3, 4, 4, 4))
        for accuracy in (0.6, 0.8, 0.95):
            passes = expected = 0.0
            for wrong in itertools.product((False, True), repeat=12):
                probability = math.prod(1 - accuracy if w else accuracy for w in wrong)
                passed, n = walk(plan, wrong)
                passes += probability * passed
                expected += probability * n
            point = stats.operating_point(plan, accuracy)
            with self.subTest(accuracy=accuracy):
                self.assertAlmostEqual(point.pass_probability, passes)
                self.assertAlmostEqual(point.expected_examples, expected)

    def test_agrees_with_drawn_answers_within_their_own_error(self):
        plan, runs = stats.sequential_plan(1314, **DEFAULT), 2000
        rng = np.random.default_rng(0)
        for accuracy in (0.93, 0.945, 0.965):
            wrong = np.cumsum(rng.random((runs, 1314), dtype=np.float32) >= accuracy, axis=1)
            at_looks = wrong[:, np.array(plan.looks) - 1]
            decided = (at_looks <= plan.pass_at_most) | (at_looks >= plan.fail_at_least)
            look = decided.argmax(axis=1)
            passed = at_looks[np.arange(runs), look] <= np.array(plan.pass_at_most)[look]
            used = np.array(plan.looks)[look]
            point = stats.operating_point(plan, accuracy)
            p = point.pass_probability
            with self.subTest(accuracy=accuracy):
                self.assertLess(abs(passed.mean() - p), 5 * math.sqrt(p * (1 - p) / runs))
                self.assertLess(abs(used.mean() - point.expected_examples), 5 * used.std() / math.sqrt(runs))


class TestSequentialPlan(unittest.TestCase):
    def test_keeps_the_promise_of_the_issue(self):
        for examples, first in itertools.product((1000, 1195, 1314), (100, 200)):
            plan = stats.sequential_plan(examples, **{**DEFAULT, "first": first})
            false_alarm, miss, expected = rates_of(plan)
            with self.subTest(examples=examples, first=first):
                self.assertLessEqual(false_alarm, 0.01)
                self.assertLessEqual(miss, 0.01)
                self.assertLessEqual(expected, 450)

    def test_each_rate_keeps_to_its_own_limit(self):
        for alpha, beta_ in ((0.001, 0.05), (0.05, 0.001)):
            plan = stats.sequential_plan(1314, **{**DEFAULT, "alpha": alpha, "beta": beta_})
            false_alarm, miss, _ = rates_of(plan)
            with self.subTest(alpha=alpha, beta=beta_):
                self.assertLessEqual(false_alarm, alpha)
                self.assertLessEqual(miss, beta_)
                self.assertGreater(max(false_alarm, miss), 0.01)

    def test_saves_examples_over_one_look_of_the_same_power(self):
        self.assertLess(rates_of(stats.sequential_plan(1314, **DEFAULT))[2], 861 / 2)

    def test_a_better_engine_passes_more_often(self):
        plan = stats.sequential_plan(1314, **DEFAULT)
        passes = [stats.operating_point(plan, accuracy).pass_probability for accuracy in np.arange(0.5, 1, 0.01)]
        self.assertEqual(passes, sorted(passes))

    def test_no_look_waits_for_what_can_no_longer_change(self):
        for examples, step in ((878, 100), (878, 2), (1314, 100)):
            plan = stats.sequential_plan(examples, **{**DEFAULT, "step": step})
            for n, at_most, at_least in zip(plan.looks, plan.pass_at_most, plan.fail_at_least, strict=True):
                self.assertLessEqual(at_least, plan.pass_at_most[-1] + 1)
                self.assertGreaterEqual(at_most, plan.pass_at_most[-1] - (examples - n))

    def test_too_few_examples_are_refused_with_the_number_needed(self):
        with self.assertRaisesRegex(stats.UnattainableError, r"850 scored examples cannot .* 861 can"):
            stats.sequential_plan(850, **DEFAULT)
        false_alarm, miss, _ = rates_of(stats.sequential_plan(861, **DEFAULT))
        self.assertLessEqual(max(false_alarm, miss), 0.01)

    def test_the_number_needed_is_the_fewest(self):
        def suffices(n):
            tails = [(binom.sf(c, n, 0.2), binom.cdf(c, n, 0.4)) for c in range(n + 1)]
            return any(false_alarm <= 0.05 and miss <= 0.1 for false_alarm, miss in tails)

        fewest = next(n for n in itertools.count(1) if suffices(n))
        self.assertEqual(stats.examples_needed(0.8, 0.6, 0.05, 0.1), fewest)

    def test_refuses_what_makes_no_sense(self):
        for wrong in ({"good": 0.93, "bad": 0.965}, {"good": 1.0}, {"bad": 0.0}, {"alpha": 0.0}, {"beta": 0.5}):
            with self.subTest(wrong=wrong), self.assertRaises(ValueError):
                stats.sequential_plan(1314, **{**DEFAULT, **wrong})


class TestHypothesisThreshold(unittest.TestCase):
    def test_by_hand(self):
        self.assertAlmostEqual(stats.hypothesis_threshold(0.965, 200), 0.965 - 1.6448536 * 0.05)
        self.assertAlmostEqual(stats.hypothesis_threshold(0.965, 800), 0.965 - 1.6448536 * 0.025)

    def test_detectable_loss_is_detected_with_the_power_stated(self):
        reference, n, loss = 0.965, 1319, stats.detectable_loss(1319)
        sigma = math.sqrt(2 * 0.25 / n)
        self.assertAlmostEqual(norm.cdf((stats.hypothesis_threshold(reference, n) - reference + loss) / sigma), 0.8)


class TestMcNemar(unittest.TestCase):
    def test_p_value_is_the_tail_of_fair_coins(self):
        for lost, gained in ((7, 0), (0, 7), (8, 2), (5, 5), (0, 0)):
            baseline = (True,) * lost + (False,) * gained + (True, False)
            candidate = (False,) * lost + (True,) * gained + (True, False)
            pairs = stats.sign_test(baseline, candidate)
            n = lost + gained
            tail = sum(math.comb(n, k) for k in range(lost, n + 1)) / 2**n
            with self.subTest(lost=lost, gained=gained):
                self.assertEqual((pairs.larger, pairs.smaller), (lost, gained))
                self.assertAlmostEqual(pairs.p_value, tail)

    def test_must_pair_up(self):
        with self.assertRaises(ValueError):
            stats.sign_test((True,), ())


class TestGateOptions(unittest.TestCase):
    def test_policies(self):
        self.assertEqual(GateOptions().policy, Policy.AUTO)
        self.assertEqual(GateOptions(policy="first-look").plan(1314), stats.fixed_plan(200, 0.95))
        self.assertEqual(GateOptions(policy="auto").plan(1314).looks[:3], (200, 300, 400))
        self.assertEqual(GateOptions(policy="sequential").plan(1314).looks[:3], (100, 200, 300))

    def test_bad_options_are_one_clear_line(self):
        for make, message in (
            (lambda: GateOptions(policy="autom"), "unknown gate policy 'autom'; nearest known: auto"),
            (lambda: GateOptions(slice_examples=0), "at least one example"),
            (lambda: GateOptions(first_look=0), "at least one example"),
            (lambda: GateOptions().plan(199), "has 199 scored examples, the first look needs 200"),
            (lambda: GateOptions().plan(850), "861 can; score a larger data set, or choose policy 'first-look'"),
        ):
            with self.subTest(message=message), self.assertRaises(ValueError) as caught:
                make()
            self.assertIn(message, str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))


def gate_after(*correct):
    gate = AccuracyGate(GateOptions(), 1314)
    for count in correct:
        gate = gate.record(ScoredSlice(gate.next_examples, count))
    return gate


class TestAccuracyGate(unittest.TestCase):
    def test_a_clear_first_look_decides_and_an_unclear_one_does_not(self):
        at_most, at_least = GateOptions().plan(1314).pass_at_most[0], GateOptions().plan(1314).fail_at_least[0]
        for wrong, verdict, more in (
            (0, Verdict.PASS, 0),
            (at_most, Verdict.PASS, 0),
            (at_most + 1, Verdict.UNDECIDED, 100),
            (at_least - 1, Verdict.UNDECIDED, 100),
            (at_least, Verdict.FAIL, 0),
            (200, Verdict.FAIL, 0),
        ):
            gate = gate_after(200 - wrong)
            with self.subTest(wrong=wrong):
                self.assertEqual((gate.verdict, gate.next_examples), (verdict, more))

    def test_first_look_of_nine_wrong_passes_alone_but_is_looked_at_again(self):
        gate = gate_after(191)
        self.assertEqual(gate.verdict, Verdict.UNDECIDED)
        self.assertIn("the first look alone (200 examples, score > 0.95): 0.9550, PASS", gate.report())
        self.assertIn("0.9500, FAIL", gate_after(190).report().splitlines()[-1])
        self.assertEqual(gate_after(191, 98).verdict, Verdict.UNDECIDED)
        self.assertEqual(gate_after(191, 100).verdict, Verdict.PASS)
        self.assertEqual(gate_after(191, 85).verdict, Verdict.FAIL)

    def test_undecided_never_passes(self):
        for gate in (gate_after(), gate_after(190)):
            self.assertEqual(gate.verdict, Verdict.UNDECIDED)
            with self.assertRaisesRegex(AssertionError, "UNDECIDED"):
                gate.assert_passed()

    def test_the_whole_data_set_always_decides(self):
        slices = [95] * 10
        for last, verdict in ((109, Verdict.FAIL), (112, Verdict.PASS)):
            gate = gate_after(190, *slices, last)
            self.assertEqual((gate.examples, gate.next_examples), (1314, 0))
            with self.subTest(last=last):
                self.assertEqual(gate.verdict, verdict)
                self.assertIn("by the cut at the end of the data set", gate.report())

    def test_takes_the_slice_asked_for_and_nothing_after_the_verdict(self):
        with self.assertRaisesRegex(AssertionError, "asked for 200 examples, got 100"):
            gate_after().record(ScoredSlice(100, 100))
        with self.assertRaisesRegex(AssertionError, "asked for 0"):
            gate_after(200).record(ScoredSlice(100, 100))

    def test_the_failure_message_is_the_report(self):
        gate = gate_after(188, 95, 95, 90)
        with self.assertRaises(AssertionError) as caught:
            gate.assert_passed()
        self.assertEqual(str(caught.exception), gate.report())
        report = gate.report()
        low, high = stats.exact_interval(468, 500)
        self.assertIn(f"FAIL at look 4 of 12, 468 of 500 correct = 0.9360, exact 95 % interval {low:.4f} to", report)
        self.assertIn(f"{high:.4f}", report)
        rows = [row.split() for row in report.splitlines()[3:7]]
        self.assertEqual([row[:5] for row in rows][0], ["1", "200", "188", "0.9400", "12"])
        self.assertEqual([row[-1] for row in rows], ["UNDECIDED"] * 3 + ["FAIL"])
        self.assertEqual([row[5:9] for row in rows][3], ["<=", "20", ">=", "31"])
        self.assertIn("the first look alone (200 examples, score > 0.95): 0.9400, FAIL", report)

    def test_the_report_states_the_exact_error_rates_of_its_own_plan(self):
        gate = gate_after(188)
        false_alarm, miss, _ = rates_of(gate.plan)
        self.assertIn(f"0.965 fails with probability {false_alarm:.4f}, 0.93 passes with {miss:.4f}", gate.report())

    def test_outcomes_are_kept_only_where_all_slices_have_them(self):
        some = ScoredSlice(200, 190, (True,) * 190 + (False,) * 10)
        gate = gate_after().record(some)
        self.assertEqual(gate.outcomes, some.outcomes)
        self.assertIsNone(gate.record(ScoredSlice(100, 90)).outcomes)

    def test_a_slice_must_add_up(self):
        for examples, correct, outcomes in ((10, 11, None), (10, -1, None), (2, 1, (True, True)), (2, 1, (True,))):
            with self.assertRaises(AssertionError):
                ScoredSlice(examples, correct, outcomes)


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


class TestPairedPoint(unittest.TestCase):
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


class TestPairedPlan(unittest.TestCase):
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


class TestPairedGate(unittest.TestCase):
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


def smallest(bad, places=None):
    """The smallest of Fisher's p-values, by definition."""
    count, total = len(bad), sum(bad)
    places = places or range(1, count)
    return min(hypergeom.sf(sum(bad[place:]) - 1, count, total, count - place) for place in places)


class TestLatestChange(unittest.TestCase):
    def test_its_p_value_is_the_share_of_all_orders_that_are_as_remarkable(self):
        late, even, short = (0, 0, 0, 1, 0, 0, 1, 1), (0, 1, 0, 0, 1, 0, 0, 1), (1, 0, 0, 0, 1)
        for bad, places in ((late, None), (even, (2, 5)), (short, None)):
            orders = {order for order in itertools.permutations(bad)}
            share = np.mean([smallest(order, places) <= smallest(bad, places) * (1 + 1e-9) for order in orders])
            self.assertAlmostEqual(latest_change(bad, places).p_value, share)

    def test_false_alarms_are_no_more_than_stated(self):
        rng = np.random.default_rng(1)
        found = [latest_change(rng.permutation([True] * 9 + [False] * 191)).p_value <= 0.05 for _ in range(100)]
        self.assertLessEqual(sum(found), 100 * 0.05 + 3 * np.sqrt(5))

    def test_where_the_change_is(self):
        change = latest_change([False] * 150 + [False, True] * 25)
        self.assertEqual((change.after, change.early, change.late), (151, 0, 25))
        self.assertIsNone(latest_change([False] * 20))
        self.assertIsNone(latest_change([True, False], places=()))


class TestOrdered(unittest.TestCase):
    def test_wrong_answers_spread_out_pass(self):
        """Those that come late do not: test_gate_kit."""
        by_number("wrong answers", [index % 25 == 1 for index in range(200)]).assert_passed()
        by_number("wrong answers", [False] * 200).assert_passed()
        by_number("wrong answers", [True] * 20 + [False] * 180).assert_passed()  # early ones are no decay

    def test_load(self):
        loads = [1, 1, 1, 4, 4, 4, 16, 16] * 12
        bad = [load == 16 for load in loads]
        problem, *_ = by_load("wrong answers", bad, loads).problems
        self.assertRegex(problem, r"^wrong answers by requests in flight: 24 of 24 after the first 72, 0 of 72")
        self.assertEqual(by_load("wrong answers", bad, [3] * len(bad)).problems, ())

    def test_in_flight(self):
        self.assertEqual(in_flight([(0, 10), (1, 2), (1, 5), (5, 6), (20, 21)]), (1, 3, 3, 2, 1))


if __name__ == "__main__":
    unittest.main()
