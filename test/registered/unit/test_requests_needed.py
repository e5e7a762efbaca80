"""The study of requests needed: places of the first prompt that shows a fault, and the table of the recorded matrix."""

import importlib.util
import itertools
import unittest
from pathlib import Path
from statistics import median_low
from unittest import mock

from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

SCRIPT = Path(__file__).resolve().parents[3] / "studies" / "requests_needed.py"


class TestRequestsNeeded(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        spec = importlib.util.spec_from_file_location("requests_needed", SCRIPT)
        cls.script = importlib.util.module_from_spec(spec)
        with mock.patch.dict("sys.modules", {spec.name: cls.script}):
            spec.loader.exec_module(cls.script)

    def test_the_first_of_some_prompts_in_any_order(self):
        for seen, prompts in ((1, 6), (2, 6), (3, 7), (7, 7)):
            places = [min(chosen) + 1 for chosen in itertools.combinations(range(prompts), seen)]
            expected = median_low(sorted(places)), max(places)
            self.assertEqual(self.script.until_first(seen, prompts), expected)
        self.assertEqual(self.script.until_first(0, 12), (self.script.NEVER,) * 2)

    def test_the_table_of_the_recorded_matrix(self):
        head, *rows = self.script.recorded_table(self.script.MATRIX.read_text(encoding="utf-8"))
        found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
        self.assertEqual(found["window-zeroed"]["GSM8K gate"], "200 / 200")
        self.assertEqual(found["rounded-to-bf16"]["GSM8K gate"], "- / -")
        self.assertEqual(found["rounded-to-bf16"]["random, logprobs"], "1 / 1")
        self.assertNotIn("transfer-fails-one-in-ten", found)
        self.assertNotIn("newest-1-lost-after-20", found, "it begins later")
        self.assertRegex(found["**not seen**"]["random, logprobs"], r"^0 of \d\d$")

    def test_the_table_of_sglang_cpu(self):
        head, *rows = self.script.sglang_cpu_table(self.script.SGLANG_CPU.read_text(encoding="utf-8"))
        self.assertEqual(head, ["fault", "random, tokens", "random, logprobs"])
        found = {row[0]: row[1:] for row in rows}
        self.assertEqual(found["indexer-compressed-lost"], [self.cell(1), self.cell(1)], "the last prompt alone")
        self.assertEqual(found["buffers-lost"], [self.cell(0), self.cell(9)], "4 alone, 4 rooms, 1 indexed, all named")
        self.assertEqual(found["polls-fail"], [self.cell(3), self.cell(3)], "the first of each round failed")
        self.assertNotIn("transfer-slow", found)
        with self.assertRaisesRegex(ValueError, "without a fault"):
            self.script.sglang_cpu_table("  no fault   seen, met by 0 requests\n      alone: random-127: text is 'a'\n")

    def cell(self, seen):
        return self.script.shown(self.script.until_first(seen, 14))


if __name__ == "__main__":
    unittest.main()
