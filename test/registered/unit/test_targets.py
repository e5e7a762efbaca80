"""Which target a machine runs."""

import unittest
from pathlib import Path
from unittest import mock

from pdkit.core import paths
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import NotReady, UsageError
from pdkit.core.gpus import Gpu, found
from pdkit.runner.targets import DISTRIBUTED, PARTS, TARGETS, choose, left_out, why

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

H200 = Gpu("NVIDIA H200", 143_771, (9, 0))
H100 = Gpu("NVIDIA H100 80GB HBM3", 81_559, (9, 0))
B200 = Gpu("NVIDIA B200", 183_359, (10, 0))
TOP, MIDDLE, SGLANG_CPU, BOTTOM = TARGETS


class TestLeftOut(unittest.TestCase):
    def test_each_target_names_what_asks_more(self):
        for target in TARGETS:
            lines = left_out(target.name)
            for part in PARTS:
                with self.subTest(target=target.name, part=part):
                    self.assertEqual(any(part in line for line in lines), part not in target.exercises)
            for file in target.beside.values():
                self.assertTrue((paths.TEST / DISTRIBUTED / f"{file}.py").is_file(), file)
        self.assertEqual(left_out("no target"), ())

    def test_the_nearest_target_is_named(self):
        first, second, *_ = left_out("embedded")
        self.assertRegex(first, "^SGLang's scheduler .*: pdkit run --on sglang-cpu ")
        self.assertRegex(second, "^SGLang's GPU kernels .*: pdkit run --on 1xHopper ")


def machine(lacks: str | None = None):
    """A machine that lacks what SGLang on CPU needs, or nothing."""
    effect = {"side_effect": NotReady(lacks)} if lacks else {"return_value": None}
    return mock.patch("pdkit.deployment.cpu.requirements.require_machine", **effect)


class TestChoose(unittest.TestCase):
    def test_highest_target_that_the_machine_can_run(self):
        for gpus, target in (
            ((), SGLANG_CPU),
            ([H200] * 7, MIDDLE),
            ([H200] * 8, TOP),
            ([H200] * 9, TOP),
            ([H100] * 8, MIDDLE),
            ([H200] * 7 + [H100], MIDDLE),
            ([H100], MIDDLE),
            ([B200] * 8, SGLANG_CPU),
        ):
            with self.subTest(gpus=found(gpus)), machine():
                self.assertIs(choose(gpus), target)

    def test_a_machine_that_lacks_what_sglang_on_cpu_needs_takes_the_embedded_engine_and_says_what(self):
        with machine(lacks="no library\nno memory"):
            self.assertIs(choose(()), BOTTOM)
            self.assertEqual(why(BOTTOM, ()).splitlines()[-2:], ["no library", "no memory"])
            self.assertIs(choose((), wanted="sglang-cpu"), SGLANG_CPU)

    def test_looking_for_a_target_reports_nothing_of_a_working_tree(self):
        with machine(), mock.patch("pdkit.runner.sglang_cpu.prepare", side_effect=AssertionError):
            self.assertIs(choose(()), SGLANG_CPU)
            self.assertEqual(SGLANG_CPU.lacks(), ())

    def test_a_target_can_be_asked_for(self):
        self.assertIs(choose([H200] * 8, wanted="embedded"), BOTTOM)

    def test_a_working_tree_is_for_one_target_only(self):
        with self.assertRaisesRegex(UsageError, "not for target embedded; a working tree is tested on sglang-cpu"):
            BOTTOM.prepare("/tree")
        BOTTOM.prepare(None)

    def test_what_a_target_needs_beside_gpus_is_one_line_for_each_thing(self):
        with mock.patch.dict("os.environ"), self.assertRaisesRegex(NotReady, "/nonexistent has no package sglang"):
            SGLANG_CPU.prepare("/nonexistent")

    def test_a_target_out_of_reach_is_refused_and_never_replaced(self):
        reason = r"8xH200 needs 8 Hopper GPUs .* has 2 GPUs \(NVIDIA H200, 140 GiB\)"
        with machine(), self.assertRaisesRegex(NotReady, reason):
            choose([H200] * 2, wanted="8xH200")

    def test_why_not_higher(self):
        self.assertEqual(why(TOP, [H200] * 8), "")
        lines = "^8xH200 needs 8 Hopper GPUs .*; found no GPU\n1xHopper needs 1 Hopper GPU .*; found no GPU$"
        with machine():
            self.assertRegex(why(BOTTOM, ()), lines)

    def test_why_is_silent_on_a_lower_target_by_choice(self):
        with machine():
            self.assertEqual(why(BOTTOM, [H200] * 8), "")


class TestAgreesWithTheTests(unittest.TestCase):
    """The test of the first target imports no pdkit, so it states its needs itself."""

    def test_first_target(self):
        source = (Path(__file__).parents[2] / TOP.test_file).read_text()
        self.assertIn(f"get_device_count() >= {TOP.gpus}", source)


if __name__ == "__main__":
    unittest.main()
