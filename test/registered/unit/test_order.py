"""Right and wrong by order: the exact scan against counting, and what is judged by it."""

import itertools
import unittest

import numpy as np
from pdkit.checks.order import by_load, by_number, in_flight
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.order import latest_change
from scipy.stats import hypergeom

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")


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
        found = [latest_change(rng.permutation([True] * 9 + [False] * 191)).p_value <= 0.05 for _ in range(300)]
        self.assertLessEqual(sum(found), 300 * 0.05 + 3 * np.sqrt(15))

    def test_where_the_change_is(self):
        change = latest_change([False] * 150 + [False, True] * 25)
        self.assertEqual((change.after, change.early, change.late), (151, 0, 25))
        self.assertIsNone(latest_change([False] * 20))
        self.assertIsNone(latest_change([True, False], places=()))


class TestOrdered(unittest.TestCase):
    def test_a_decay_after_the_150th_request_fails_though_the_score_passes(self):
        bad = [False] * 150 + [index % 6 == 1 for index in range(50)]
        self.assertGreater(1 - sum(bad) / 200, 0.95)
        decay = r"FAIL, wrong answers by request number: 9 of 49 after the first 151, 0 of"
        with self.assertRaisesRegex(AssertionError, decay):
            by_number("wrong answers", bad).assert_passed()

    def test_the_same_count_spread_out_passes(self):
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
