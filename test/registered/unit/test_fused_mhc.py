"""What the source of the installed SGLang shows: at which hidden sizes the fused mHC kernel counts positions twice, and more."""

import unittest
from importlib.machinery import ModuleSpec
from unittest import mock

from cases import FolderCase
from pdkit.core.ci_register import register_cpu_ci
from pdkit.deployment import fused_mhc, quirks

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")


def counted(hidden_size, splits):
    """How often each position is summed up: the kernel's own indices, as a loop."""
    share = -(-hidden_size // splits)
    times = [0] * hidden_size
    for split in range(splits):
        for step in range(-(-share // fused_mhc.THREADS)):
            for thread in range(fused_mhc.THREADS):
                position = split * share + step * fused_mhc.THREADS + thread
                if position < hidden_size:
                    times[position] += 1
    return times


class TestFusedMhc(FolderCase):
    def test_sizes_at_which_shares_overlap(self):
        for hidden_size in (128, 512, 1024, 1536, 2048, 4096, 5120, 7168):
            used = [splits for splits in fused_mhc.SPLITS if splits == 4 or hidden_size <= 4096]
            overlap = any(max(counted(hidden_size, splits)) > 1 for splits in used)
            self.assertEqual(fused_mhc.is_falsified(hidden_size), overlap, hidden_size)

    def installed(self, path):
        """A folder in the place of the installed SGLang, and `path` in it, which is not there yet."""
        source = self.root / path
        source.parent.mkdir(parents=True)
        spec = ModuleSpec("sglang", None, origin=str(self.root / "__init__.py"))
        self.enterContext(mock.patch.object(quirks.PathFinder, "find_spec", lambda name, path: spec))
        return source

    def test_only_releases_that_let_an_empty_text_pass_are_not_given_one(self):
        source = self.installed("srt/managers/tokenizer_manager.py")
        self.assertIsNone(quirks.empty_text_is_fatal(), "nothing is known of it")
        source.write_text("        if not texts:\n            raise ValueError()\n")
        self.assertIsNone(quirks.empty_text_is_fatal())
        source.write_text(f"        if not texts or {quirks.LETS_EMPTY_TEXT_PASS}:\n            return\n")
        self.assertRegex(quirks.empty_text_is_fatal(), "ends prefill")

    def test_logprobs_of_prompts_are_left_out_where_they_overwrite_memory(self):
        source = self.installed(quirks.COPIERS[0])
        both = ["--enable-dp-attention", "--speculative-algorithm", "EAGLE"]
        self.assertIsNone(quirks.prompt_logprobs_are_fatal(both), "nothing is known of it")
        source.write_text(f"    {quirks.COPIES_PAST_THE_END}\n")
        self.assertRegex(quirks.prompt_logprobs_are_fatal(both), "overwrites memory")
        for words in (["--attn-dp-size", "4"], ["--attn-dp-size=4"]):
            self.assertTrue(quirks.prompt_logprobs_are_fatal([*words, "--speculative-algorithm=EAGLE"]), words)
        self.assertIsNone(quirks.prompt_logprobs_are_fatal(both[:1]))
        self.assertIsNone(quirks.prompt_logprobs_are_fatal(both[1:]))
        patched = source.parents[3] / quirks.COPIERS[1]
        patched.parent.mkdir(parents=True)
        patched.write_text(f"    {quirks.BOUNDED}max=1)\n")
        self.assertIsNone(quirks.prompt_logprobs_are_fatal(both))

    def test_what_a_running_server_reports_says_whether_it_may_be_asked_for_them(self):
        exposed = {"version": "0.5.23", "enable_dp_attention": True, "speculative_algorithm": "EAGLE"}
        self.assertTrue(quirks.overwritten_by_prompt_logprobs(exposed))
        for other in ({"version": "0.5.24"}, {"version": None}, {"version": "embedded"}, {"enable_dp_attention": False},
                      {"speculative_algorithm": None}):  # fmt: skip
            self.assertFalse(quirks.overwritten_by_prompt_logprobs(exposed | other), other)

    def test_only_releases_with_the_defect_get_the_switch(self):
        source = self.installed(fused_mhc.SOURCE)
        self.assertEqual(fused_mhc.environment(128), {}, "an older release has no such kernel")
        source.write_text(f"{fused_mhc.WRONG}\n")
        self.assertEqual(fused_mhc.environment(128), {fused_mhc.SWITCH: "0"})
        self.assertEqual(fused_mhc.environment(2048), {})
        source.write_text("if hidden_idx < T.min(hidden_size, hidden_split_start + hidden_per_split):\n")
        self.assertEqual(fused_mhc.environment(128), {})


if __name__ == "__main__":
    unittest.main()
