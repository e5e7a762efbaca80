"""The fingerprint of a good deployment: an exact test of whether it moved, its file, and the command over real sockets."""

import itertools
import json
import os
import unittest
import zlib
from dataclasses import replace
from unittest import mock

import numpy as np
from cases import FolderCase, pdkit, without
from pdkit.checks.external import record
from pdkit.checks.external.record import ASKED, LEVEL, RECORDED, Fingerprint, Tracking
from pdkit.checks.parity.answers import Answer
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode, NotReady
from pdkit.core.split_test import median_interval, split_test
from stub_server import StubServer

register_cpu_ci(est_time=12, suite="stage-a-test-cpu")

RNG = np.random.default_rng


def answers(turns, noise=0.0, shift=0.0, seed=0, prompts=40, place=1):
    """By prompt and turn: two tokens with eight alternatives each, whose logprobs at `place` are off by `shift`."""
    rng, made = RNG(seed), []
    for prompt in range(prompts):
        base = np.sort(RNG(prompt).normal(-3, 1, (2, 8)), axis=1)[:, ::-1]
        turned = []
        for _ in range(turns):
            rows = base + rng.normal(0, noise, base.shape) if noise else base.copy()
            rows[place] += shift
            alternatives = tuple(
                tuple((float(p), 10 * at + token) for token, p in enumerate(row)) for at, row in enumerate(rows)
            )
            logprobs = tuple(row[0][0] for row in alternatives)
            turned.append(Answer((0, 10), logprobs, alternatives, text="ab", prompt_tokens=prompt))
        made.append(tuple(turned))
    return tuple(made)


def tracking(now, noise=0.0, seed=1):
    recorded = answers(RECORDED, noise, seed=seed, prompts=len(now))
    return Tracking(Fingerprint("m", None, ("x",) * len(now), recorded), now)


class TestSplitTest(unittest.TestCase):
    def test_equals_the_count_over_all_rearrangements(self):
        strata = [(RNG(seed).normal(size=(2, 2)), RNG(seed + 9).normal(0.8, 1, size=(1, 2))) for seed in range(4)]

        def total(arrangement):
            """Sum of ranks of the split chosen in each stratum, by counting."""
            found = 0
            for (before, after), chosen in zip(strata, arrangement):
                rows = np.concatenate([before, after])
                sizes = [np.linalg.norm(rows[i] - np.delete(rows, i, 0).mean(0)) for i in range(3)]
                found += sum(size < sizes[chosen] for size in sizes)
            return found

        totals = [total(each) for each in itertools.product(range(3), repeat=4)]
        expected = np.mean([each >= total((2, 2, 2, 2)) for each in totals])
        self.assertAlmostEqual(split_test(strata), expected)

    def test_equal_measurements_say_nothing(self):
        same = np.ones((3, 4)), np.ones((2, 4))
        self.assertEqual(split_test([same] * 40), 1.0)

    def test_four_prompts_that_moved_are_enough_where_there_is_no_noise(self):
        same, moved = (np.ones((3, 4)), np.ones((2, 4))), (np.ones((3, 4)), np.full((2, 4), 1.001))
        self.assertAlmostEqual(split_test([moved] * 4 + [same] * 36), 1e-4)
        self.assertGreater(split_test([moved] * 3 + [same] * 37), LEVEL / 2)

    def test_false_alarms_are_as_rare_as_stated(self):
        rng, below = RNG(3), 0
        for _ in range(400):
            rows = rng.standard_t(2, size=(12, 5, 3))  # heavy tails: nothing is assumed of the noise
            below += split_test([(each[:3], each[3:]) for each in rows]) <= 0.05
        self.assertLessEqual(below, 400 * 0.05 + 3 * np.sqrt(400 * 0.05))

    def test_the_interval_of_the_median(self):
        self.assertEqual(median_interval(range(40)), (13, 26))
        self.assertEqual(median_interval([7.0]), (7.0, 7.0))


class TestTracking(unittest.TestCase):
    def test_0_of_200_sound_deployments_are_called_otherwise(self):
        for noise in (0.0, 0.08):
            found = (tracking(answers(ASKED, noise, seed=1000 + seed), noise, seed) for seed in range(100))
            self.assertEqual(sum(bool(each.problems) for each in found), 0)

    def test_a_shift_of_the_token_after_the_transfer_is_named_and_measured(self):
        for noise, shift in ((0.0, 1e-6), (0.01, 0.02)):
            found = tracking(answers(ASKED, noise, shift), noise)
            self.assertEqual((len(found.drifted), found.broken), (1, ()))
            self.assertRegex(found.report(), r"^drifted: 40 prompts")
            self.assertIn(record.PLACES[1], found.drifted[0])
        self.assertRegex(found.drifted[0], r"by 0\.0(19|2|21) in the median")

    def test_a_shift_of_prefills_token(self):
        (found,) = tracking(answers(ASKED, 0.01, 0.03, place=0), 0.01).drifted
        self.assertIn(record.PLACES[0], found)

    def test_what_is_far_off_is_broken(self):
        now = list(answers(ASKED, 0.01))
        now[7] = tuple(replace(each, alternatives=tuple(tuple((p - 3, token) for p, token in row)
                                                        for row in each.alternatives)) for each in now[7])  # fmt: skip
        found = tracking(tuple(now), 0.01)
        self.assertRegex(found.report(), r"(?m)^broken: .*\nprompt 8: a logprob is off by 3")

    def test_another_tokenizer_is_broken(self):
        now = list(answers(ASKED))
        now[3] = tuple(replace(each, prompt_tokens=99) for each in now[3])
        self.assertIn("prompt 4 had 3 tokens and has 99", tracking(tuple(now)).report())

    def test_a_logprob_that_is_no_number_is_broken(self):
        now = list(answers(ASKED))
        nothing = (((float("nan"), 0),) * 8, ((float("nan"), 10),) * 8)
        now[0] = tuple(replace(each, alternatives=nothing, logprobs=(float("nan"),) * 2) for each in now[0])
        self.assertTrue(tracking(tuple(now)).broken)


class Deployment(StubServer):
    """A pair whose logprobs after the KV transfer are off by `self.shift`; counts requests for tokens in `self.asked`."""

    INFO = {"/v1/models": {"data": [{"id": "m"}]}, "/model_info": {"model_path": "/no/such/model"},
            "/get_server_info": {"prefill": [{"disaggregation_mode": "prefill", "version": "0.5.23"}],
                                 "decode": [{"disaggregation_mode": "decode"}]}}  # fmt: skip

    def __init__(self, test, shift=0.0):
        self.shift, self.asked = shift, 0
        super().__init__(test)

    def reply(self, path, request):
        if request is None:
            return (200, self.INFO[path]) if path in self.INFO else (404, {})
        self.asked += 1
        base = -1 - zlib.crc32(request["text"].encode()) % 97 / 100
        rows = [[(base - at - 0.5 * token + at * self.shift, 10 * at + token, None) for token in range(8)]
                for at in range(2)]  # fmt: skip
        meta = {"prompt_tokens": len(request["text"]), "finish_reason": {"type": "length", "length": 2},
                "output_token_logprobs": [row[0] for row in rows], "output_top_logprobs": rows}  # fmt: skip
        return 200, {"text": "ab", "output_ids": [0, 10], "meta_info": meta}


class TestCommand(FolderCase):
    def setUp(self):
        super().setUp()
        self.path = self.root / "good.json"
        self.enterContext(mock.patch.dict(os.environ, without("SGLANG_PD_", "OPENAI_"), clear=True))

    def check(self, server, *words, expected=ExitCode.PASSED):
        code, out, err = pdkit("check", server.url, "--baseline-record", self.path, *words)
        self.assertEqual(code, expected, out + err)
        return out + err

    def test_same_drifted_and_broken_have_a_code_each_and_at_most_200_requests(self):
        server = Deployment(self)
        self.assertIn(f"recorded: {self.path}", self.check(server, "--record"))
        self.assertLessEqual(server.asked, 200)
        for shift, code, says in (
            (0.0, ExitCode.PASSED, "answers like the record: same: 40 prompts"),
            (1e-12, ExitCode.PASSED, "same"),
            (1e-4, ExitCode.DRIFTED, "answers like the record: DRIFTED, drifted: 40 prompts"),
            (2.0, ExitCode.FAILED, "answers like the record: FAILED, broken: 40 prompts"),
        ):
            server.shift, server.asked = shift, 0
            shown = self.check(server, expected=code)
            self.assertIn(says, shown)
            self.assertIn(f"every request was answered: {server.asked} of {server.asked}\n", shown)
            self.assertLessEqual(server.asked, 200)
        self.assertIn(f"{code.name}: ", shown)

    def test_a_good_record_is_not_overwritten_and_not_made_unasked(self):
        server = Deployment(self)
        self.assertIn("with --record it is made", self.check(server, expected=ExitCode.NOT_READY))
        self.check(server, "--record")
        before = self.path.read_bytes()
        self.assertIn("is there already", self.check(server, "--record", expected=ExitCode.BAD_USAGE))
        self.assertEqual(self.path.read_bytes(), before)

    def test_a_record_of_another_model_or_of_none(self):
        server = Deployment(self)
        self.check(server, "--record")
        data = json.loads(self.path.read_text())
        for changed, code, says in (
            ({"model": "other"}, ExitCode.BAD_USAGE, "is of other"),
            ({"format": 0}, ExitCode.NOT_READY, "has format 0"),
            ({"answers": data["answers"][:3]}, ExitCode.NOT_READY, "is not whole: 40 prompts, 3 answered"),
            ({"answers": 5}, ExitCode.NOT_READY, "is not a record"),
        ):
            self.path.write_text(json.dumps(data | changed))
            self.assertIn(says, self.check(server, expected=code))
        self.path.write_text("{")
        with self.assertRaisesRegex(NotReady, "not JSON"):
            Fingerprint.read(self.path)


if __name__ == "__main__":
    unittest.main()
