"""Slicing the data set for `run_eval`, with a stand-in for it that reads what it is given."""

import json
import unittest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pdkit
from cases import FolderCase
from pdkit.checks.accuracy.gate import GateOptions, Verdict
from pdkit.checks.accuracy.gsm8k import (
    DatasetError,
    ScoreError,
    few_shot_prompts,
    gsm8k_gate,
    paired_gate,
    read_dataset,
    recover_correct,
)
from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

NANO = Path(pdkit.__file__).parent / "assets" / "gsm8k_nano.jsonl"


class DataSetTest(FolderCase):
    def setUp(self):
        super().setUp()
        self.write_rows(1000)

    def write_rows(self, scored, shots=5):
        rows = [{"question": f"row {i}\u2028", "answer": f"#### {i}"} for i in range(-shots, scored)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.path = self.write("test.jsonl", f"# a comment\n{lines}")

    def args(self, **more):
        return SimpleNamespace(gsm8k_data_path=str(self.path), num_threads=128, **more)


class Engine:
    """Behaves like `run_eval` against an engine that gets the rows in `wrong` wrong; notes what it was asked."""

    def __init__(self, wrong=(), outcomes=True, tamper=None):
        self.wrong, self.outcomes, self.tamper = frozenset(wrong), outcomes, tamper
        self.asked, self.shots, self.settings = [], [], []

    def __call__(self, args):
        with open(args.gsm8k_data_path, encoding="utf-8") as file:
            rows = [int(json.loads(line)["answer"].removeprefix("#### ")) for line in file if line[0] != "#"]
        shots, scored = rows[: args.num_shots], rows[args.num_shots :][: args.num_examples]
        self.settings.append(args)
        self.shots.append(shots)
        self.asked.append(scored)
        outcomes = tuple(row not in self.wrong for row in scored)
        metrics = {"score": np.mean([float(right) for right in outcomes]), "score:std": 0.1}
        if self.outcomes:
            metrics["outcomes"] = outcomes
        return {**metrics, **(self.tamper or {})}


class TestGate(DataSetTest):
    """What a test sees of it stands in test_gate_kit."""

    def test_it_ends_with_the_data_set(self):
        engine = Engine(wrong=range(0, 1000, 20))
        gate = gsm8k_gate(self.args(), run=engine, progress=str)
        self.assertEqual(sum(engine.asked, []), list(range(1000)))
        self.assertNotEqual(gate.verdict, Verdict.UNDECIDED)
        self.assertEqual(gate.outcomes, tuple(row % 20 != 0 for row in range(1000)))

    def test_settings_of_the_eval_are_kept_and_those_of_the_slice_are_set(self):
        engine = Engine()
        gsm8k_gate(self.args(max_tokens=512, num_examples=7, repeat=3, return_latency=True), run=engine, progress=str)
        (settings,) = engine.settings
        self.assertEqual((settings.num_threads, settings.max_tokens), (128, 512))
        self.assertEqual((settings.eval_name, settings.num_examples, settings.num_shots), ("gsm8k", 200, 5))
        self.assertEqual((settings.repeat, settings.return_latency), (1, False))
        self.assertFalse(Path(settings.gsm8k_data_path).exists(), "the slice's file is left behind")

    def test_number_of_shots_is_followed(self):
        self.write_rows(1000, shots=8)
        engine = Engine()
        gsm8k_gate(self.args(num_shots=8), run=engine, progress=str)
        self.assertEqual((engine.shots, engine.asked), ([list(range(-8, 0))], [list(range(200))]))

    def test_too_small_a_data_set_is_refused_before_anything_is_scored(self):
        for scored, options, message in (
            (300, GateOptions(), "861 can"),
            (150, GateOptions(policy="first-look"), "150 scored examples, the first look needs 200"),
        ):
            self.write_rows(scored)
            engine = Engine()
            with self.assertRaisesRegex(ValueError, message):
                gsm8k_gate(self.args(), options, run=engine)
            self.assertEqual(engine.asked, [])

    def test_a_score_that_does_not_add_up_is_an_error(self):
        for tamper, message in (
            ({"score": 0.9512}, "no whole number of right answers among 200"),
            ({"score": float("nan")}, "nan"),
            ({"score": None}, "None"),
            ({"score": 0.5}, "100 of 200, but scored 200 examples, 200 of them right"),
            ({"outcomes": (True,) * 199, "score": 199 / 200}, "but scored 199 examples"),
        ):
            with self.subTest(tamper=tamper), self.assertRaisesRegex(ScoreError, message):
                gsm8k_gate(self.args(), run=Engine(tamper=tamper))


class TestRecoverCorrect(unittest.TestCase):
    def test_every_count_survives_the_division(self):
        for examples in (1, 3, 7, 100, 200, 1314):
            for correct in range(examples + 1):
                outcomes = [1.0] * correct + [0.0] * (examples - correct)
                self.assertEqual(recover_correct(np.mean(outcomes), examples), correct)

    def test_what_is_no_share_is_refused(self):
        for score in (None, float("nan"), float("inf"), -0.005, 1.005, 0.9524):
            with self.subTest(score=score), self.assertRaises(ScoreError):
                recover_correct(score, 200)


class TestPaired(DataSetTest):
    def test_counts_without_outcomes_cannot_be_paired(self):
        for outcomes in ((True, False), (False, True)):
            engines = map(Engine, ((), ()), outcomes)  # the baseline is asked first
            with self.assertRaisesRegex(ScoreError, "no outcomes of single examples"):
                paired_gate(self.args(), self.args(), run=lambda args, of=engines: next(of)(args), progress=str)


class TestDataset(DataSetTest):
    def test_nano_data_set_is_large_enough_for_every_policy(self):
        data = read_dataset(NANO)
        self.assertEqual(len(data.shots), 5)
        for policy in ("first-look", "sequential", "auto"):
            GateOptions(policy=policy).plan(len(data.rows))

    def test_prompts_hold_the_shots_and_one_open_question(self):
        first, second = few_shot_prompts(self.path, 2)
        self.assertTrue(first.startswith("Question: row -5\u2028\nAnswer: #### -5\n\nQuestion: row -4"))
        self.assertTrue(first.endswith("Answer: #### -1\n\nQuestion: row 0\u2028\nAnswer:"))
        self.assertTrue(second.endswith("Question: row 1\u2028\nAnswer:"))

    def test_bad_files_are_one_clear_line(self):
        """More of them in test_robustness."""
        for content, message in (
            ('{"question": "a", "answer": "#### 1"}\n{"question": "a", "ans', "line 2 is not JSON .*complete"),
            ('{"question": "a", "answer": "#### 1"}\n' * 5, "has 5 rows, of which 5 are shots"),
        ):
            self.path.write_text(content)
            with self.subTest(message=message), self.assertRaisesRegex(DatasetError, message) as caught:
                read_dataset(self.path)
            self.assertNotIn("\n", str(caught.exception))


if __name__ == "__main__":
    unittest.main()
