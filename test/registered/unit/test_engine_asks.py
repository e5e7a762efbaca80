"""Which sequences a body asks for: prompts, samples of each, and the bootstrap rooms that prefill and decode share."""

import unittest

from pdkit.core.ci_register import register_cpu_ci
from pdkit.engine.fields import BadRequest
from pdkit.engine.request import SamplingParams
from pdkit.engine.sequences import ROOMS, fan_out

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")


def rooms(prompts, room, n=1, **fields):
    asks = fan_out(prompts, SamplingParams(n=n), len(prompts) > 1, bootstrap_room=room, **fields)
    return [ask.bootstrap_room for ask in asks]


class TestFanOut(unittest.TestCase):
    def test_rooms_of_a_batch(self):
        self.assertEqual(rooms(["a", "b"], [7, 9]), [7, 9])
        self.assertEqual(rooms(["a", "b"], 7), [7, 8], "a mini LB sends one room for all prompts of a completion")

    def test_samples_of_a_prompt_have_rooms_of_their_own(self):
        self.assertEqual(rooms(["a"], 7, n=2), [7, 7 + ROOMS])
        self.assertEqual(rooms(["a", "b"], [7, 9], n=2), [7, 7 + ROOMS, 9, 9 + ROOMS])

    def test_bootstrap_fields_of_each_sample(self):
        """The Rust router counts the samples of a chat as a batch."""
        fields = {"bootstrap_host": ["h", "h"], "bootstrap_port": [5, 5]}
        self.assertEqual(rooms(["a"], [7, 9], n=2, **fields), [7, 7 + ROOMS])

    def test_fields_that_do_not_fit(self):
        for prompts, n, fields in (
            (["a"], 2, {"rid": ["x", "y"]}),
            (["a"], 2, {"bootstrap_host": ["h"] * 3}),
            (["a", "b"], 1, {"bootstrap_host": ["h"]}),
        ):
            with self.subTest(fields=fields), self.assertRaisesRegex(BadRequest, "entries for"):
                rooms(prompts, 7, n, **fields)
        for prompts, n, fields in (
            (["a"], 2, {"return_logprob": [True]}),
            (["a"], 2, {"top_logprobs_num": [1]}),
            (["a"], 1, {"extra_key": ["k"]}),
        ):
            (name,) = fields
            with self.subTest(fields=fields), self.assertRaisesRegex(BadRequest, f"{name} must be one value"):
                rooms(prompts, 7, n, **fields)
        with self.assertRaisesRegex(BadRequest, "bootstrap_room has 3 entries for 1 prompts"):
            rooms(["a"], [1, 2, 3], n=2)


if __name__ == "__main__":
    unittest.main()
