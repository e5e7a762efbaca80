"""Teacher-forced parity: its tests against drawn tokens, and its requests against a server that answers by the book."""

import math
import unittest

import numpy as np
from pdkit.checks.http import RequestFailed
from pdkit.checks.parity.forced import LEVEL, Forced, ForcedParityChecks, differences, sign_flips
from pdkit.core.ci_register import register_cpu_ci
from stub_server import StubServer

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")


def arm(seed, shift=0.0, noise=0.05, prompts=16, tokens=128):
    return tuple(map(tuple, np.random.default_rng(seed).normal(shift, noise, (prompts, tokens)).tolist()))


class TestForced(unittest.TestCase):
    def test_0_of_200_sound_pairs_fail(self):
        self.assertEqual(sum(bool(Forced(arm(seed), arm(1000 + seed)).problems) for seed in range(200)), 0)

    def test_a_mean_shift_of_a_hundredth_is_seen_within_16_prompts(self):
        found = [Forced(arm(seed, 0.01), arm(1000 + seed)) for seed in range(50)]
        self.assertGreaterEqual(sum(bool(each.problems) for each in found), 45)
        self.assertRegex(found[0].report(), r"(?m)^  mean: 0\.\d+, the control's is")
        self.assertLess(found[0].smallest_shift, 0.01)

    def test_all_signs_are_counted(self):
        self.assertEqual(sign_flips(np.array([1.0, 2.0, 3.0])), 1 / 8)
        self.assertEqual(sign_flips(np.array([1.0, 1.0, -1.0])), 4 / 8)
        self.assertEqual(sign_flips(np.zeros(4)), 1.0)

    def test_few_tokens_do_not_show_a_mean_shift(self):
        low = [Forced(arm(seed, 0.01, tokens=8), arm(1000 + seed, tokens=8)).problems for seed in range(50)]
        self.assertLess(sum(map(bool, low)), 40)  # 128 tokens are too few

    def test_more_noise_and_a_few_far_off(self):
        self.assertTrue(Forced(arm(1, noise=0.06), arm(2)).problems)
        tail = tuple((*row[:-8], *(0.5,) * 4, *(-0.5,) * 4) for row in arm(1))
        self.assertIn("share beyond 0.1", Forced(tail, arm(2)).report())
        self.assertTrue(Forced(((math.nan,) * 5,) * 16, arm(2, tokens=5)).problems)

    def test_equal_to_the_bit(self):
        exact = ((0.0,) * 9,) * 16
        self.assertEqual(Forced(exact, exact).p_values, (1.0, 1.0, 1.0))
        self.assertTrue(Forced(((1e-7,) * 9,) * 16, exact).problems)

    def test_arms_that_do_not_pair_up(self):
        for candidate, control in (((), ()), (((1.0,),), ()), (((1.0,),), ((),))):
            with self.assertRaisesRegex(ValueError, "do not pair up"):
                Forced(candidate, control)
        self.assertLess(LEVEL, 0.01)


class Coin(StubServer):
    """Continues by heads and tails, and reports the logprob of each less `self.off`; its prefill is right."""

    def __init__(self, test, off=0.0, short=0):
        self.off, self.short, self.count = off, short, 0
        super().__init__(test)

    def reply(self, path, request):
        self.count += 1
        size, ids = request["sampling_params"]["max_new_tokens"], request["input_ids"]
        drawn = np.random.default_rng(self.count).integers(10, 12, size).tolist()
        meta = {"output_token_logprobs": [(math.log(0.5) + self.off, token, None) for token in drawn],
                "finish_reason": {"type": "length"}, "prompt_tokens": len(ids)}  # fmt: skip
        if "logprob_start_len" in request:
            known = [(math.log(0.5), token, None) for token in ids[1 + self.short :]]
            meta["input_token_logprobs"] = [(None, ids[0], None), *known]
        return 200, {"text": "", "output_ids": drawn, "meta_info": meta}


class TestRequests(unittest.TestCase):
    def test_each_token_is_scored_by_prefill(self):
        pair, monolithic = Coin(self, off=0.25), Coin(self)
        found = differences(pair.url, monolithic.url, [[1, 2, 3]] * 4, 6, 10)
        self.assertEqual([len(row) for row in found], [6] * 4)
        for each in (token for row in found for token in row):
            self.assertAlmostEqual(each, 0.25)
        self.assertEqual((pair.count, monolithic.count), (4, 4))

    def test_as_a_test(self):
        for off, passes in ((0.0, True), (1e-3, False)):
            names = {"lb_url": Coin(self, off).url, "monolithic_url": Coin(self).url, "request_timeout": 10.0}
            case = type("TestForcedKit", (ForcedParityChecks, unittest.TestCase), names)("test_parity_teacher_forced")
            result = unittest.TestResult()
            case.run(result)
            self.assertEqual(result.wasSuccessful(), passes)

    def test_a_server_that_does_not_score_all(self):
        server = Coin(self, short=1)
        with self.assertRaisesRegex(RequestFailed, "logprobs of 8 prompt tokens, 9 were sent"):
            differences(server.url, server.url, [[1, 2, 3]], 6, 10)


if __name__ == "__main__":
    unittest.main()
