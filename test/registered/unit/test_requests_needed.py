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
        nothing = {"prompts": 12, "tokens": 0, "logprobs": 0, "met": 12}
        none = {"trained": nothing, "random": nothing, "gate": {"asked": 200, "right": 200, "sees": False}}
        lost = {
            "trained": nothing | {"logprobs": 6},
            "random": nothing | {"tokens": 1, "logprobs": 12},
            "gate": none["gate"],
        }
        head, row, total, unseen = self.script.sglang_cpu_table({"none": none, "lost": lost})
        self.assertEqual(row, ["lost", "- / -", "- / -", "1 / 7", "6 / 12", "1 / 1"])
        self.assertEqual((total[3], unseen[1:3]), ("1 / 7", ["1 of 1", "1 of 1"]))
        unmet = lost | {"trained": nothing | {"met": 0}}
        _, row, *_ = self.script.sglang_cpu_table({"none": none, "lost": lost, "unmet": unmet})[1:]
        self.assertEqual(row, ["unmet", "not met", "not met", "not met", "6 / 12", "1 / 1"])
        with self.assertRaisesRegex(ValueError, "without a fault"):
            self.script.sglang_cpu_table({"none": none | {"random": lost["random"]}})


if __name__ == "__main__":
    unittest.main()
