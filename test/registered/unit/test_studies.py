"""Studies: docs/findings can be posted as they are and shown without a GPU, the count of requests that faults need, and false alarms."""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
import unittest
from pathlib import Path
from statistics import median_low
from unittest import mock

import numpy as np
from cases import printed
from pdkit.checks.parity.answers import Answer
from pdkit.checks.parity.verdict import Parity
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.host import installed
from scipy.stats import binom

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

ROOT = Path(__file__).parents[3]
RELEASE = "0.5.23"  # whose source the patches are for
PARTS = "**Seen.**", "**Releases.**", "eproduction.** "
SOLUTIONS = "**Patch.**", "**Proposal.**"


def study(name):
    """The module of a study; studies are no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "studies" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    path = [str(ROOT / "studies"), *sys.path]
    with mock.patch.dict("sys.modules", {name: module}), mock.patch.object(sys, "path", path):
        spec.loader.exec_module(module)
    return module


class TestFindings(unittest.TestCase):
    def test_each_file_has_what_an_issue_needs_and_stands_in_the_table(self):
        folder = ROOT / "docs" / "findings"
        table = (folder / "README.md").read_text()
        files = sorted(path for path in folder.glob("*.md") if path.name != "README.md")
        self.assertGreater(len(files), 6)
        for path in files:
            text = path.read_text()
            with self.subTest(file=path.name):
                self.assertIn(f"]({path.name})", table)
                for part in PARTS:
                    self.assertIn(part, text)
                self.assertTrue(any(each in text for each in SOLUTIONS))

    @unittest.skipUnless(installed("sglang") == RELEASE, f"the patches are for SGLang {RELEASE}")
    def test_each_patch_applies_to_the_installed_source(self):
        packages = Path(importlib.util.find_spec("sglang").origin).parents[1]
        apply = ["git", "apply", "--check", "-p2", "-"]  # a/python/sglang/... -> sglang/...
        outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(packages.parent)}
        patches = 0
        for path in sorted((ROOT / "docs" / "findings").glob("*.md")):
            for patch in re.findall(r"^```diff\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
                with self.subTest(file=path.name):
                    run = subprocess.run(apply, input=patch, cwd=packages, env=outside, text=True, capture_output=True)
                    self.assertEqual(run.returncode, 0, run.stderr)
                patches += 1
        self.assertGreater(patches, 5)

    def test_exit_codes(self):
        module = study("sglang_findings")
        for there, code in ((True, ExitCode.FAILED), (False, ExitCode.PASSED)):
            with mock.patch.dict(module.FINDINGS, {"one-room": lambda there=there: (there, "rooms [7, 7]")}):
                said = printed(module.main, ["one-room"])
            self.assertEqual(said.returned, code)
            self.assertIn("rooms [7, 7]", said.out)

    def test_an_unknown_name_is_refused(self):
        with self.assertRaisesRegex(UsageError, "two-rooms: expected one-room, "):
            study("sglang_findings").main(["two-rooms"])


class TestRequestsNeeded(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.script = study("requests_needed")

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


class TestOperatingCharacteristic(unittest.TestCase):
    def run_study(self, *words):
        with mock.patch.object(sys, "argv", ["study", *words]):
            return printed(study("gate_operating_characteristic").main)

    def test_prints_the_promise_beside_the_alternatives(self):
        returned, out, _ = self.run_study()
        self.assertIsNone(returned)
        rows = re.findall(r"^ *(\S.*?)  +([\d.]+)% +([\d.]+)% ", out, re.MULTILINE)
        rates = {name: (float(false_alarm), float(miss)) for name, false_alarm, miss in rows}
        policies = ["> 0.95 once", "1 retry", "3 retries", "TRT-LLM n=200", "TRT-LLM n=1314", "sequential", "auto"]
        self.assertEqual(list(rates), policies)
        self.assertLessEqual(max(rates["auto"] + rates["sequential"]), 1.0)
        self.assertAlmostEqual(rates["> 0.95 once"][0], 100 * binom.cdf(190, 200, 0.965), places=2)
        self.assertAlmostEqual(rates["TRT-LLM n=200"][1], 100 * binom.sf(176, 200, 0.93), places=2)
        self.assertIn("miss a loss of accuracy of 0.124 (n=200) or 0.049 (n=1314)", out)

    def test_too_few_examples_are_bad_usage(self):
        code, _, err = self.run_study("--examples", "300")
        self.assertEqual(code, ExitCode.BAD_USAGE)
        self.assertIn("861 can", err.splitlines()[-1])


false_alarms = study("false_alarms")


def answer(prompt, noise, tokens, rng):
    rows = np.sort(np.random.default_rng(prompt).normal(-3, 1, (tokens, 8)), axis=1)[:, ::-1]
    rows = rows + rng.normal(0, noise, rows.shape)
    alternatives = tuple(
        tuple((float(p), 10 * at + token) for token, p in enumerate(row)) for at, row in enumerate(rows)
    )
    tokens = tuple(range(0, 10 * tokens, 10))
    return Answer(tokens, tuple(row[0][0] for row in alternatives), alternatives, text="a", prompt_tokens=prompt)


def clean_run(noise):
    rng = np.random.default_rng(7)
    right = tuple((rng.random(200) > 0.02).tolist())
    forced = [tuple(map(tuple, rng.normal(0, noise, (16, 32)).tolist())) for _ in range(2)]
    turns = tuple(tuple(answer(prompt, noise, 2, rng) for _ in range(8)) for prompt in range(40))
    reference, candidate, control = ([answer(n, each, 4, rng) for n in range(60)] for each in (0, noise, noise))
    loads = (4,) * 30 + (16,) * 30
    together = Parity("together", tuple(map(str, range(60))), reference, candidate, control, loads=loads)
    ties = [answer(prompt, 0, 3, rng) for prompt in range(len(false_alarms.LENGTHS))]
    return false_alarms.CleanRun((right, right), tuple(forced), turns, together, (ties, tuple((t, t) for t in ties)))


class TestDraws(unittest.TestCase):
    """The draws of false_alarms from a clean run do not fail the checks, and those of a planted fault do."""

    def test_only_what_is_planted_is_seen(self):
        for noise in (0, 0.03):
            run = clean_run(noise)
            for name, drawn in false_alarms.DRAWN.items():
                with self.subTest(name, noise=noise):
                    failing = [false_alarms.failing(drawn, run, planted, 2) for planted in (False, True)]
                    self.assertEqual(failing, [0, 2])

    def test_a_clean_run_that_is_not_clean(self):
        """Draws are of what was recorded: a pair that is off in the record fails in nearly all of them."""
        run = clean_run(0.03)
        forced = tuple(tuple(token + 0.05 for token in row) for row in run.forced[0]), run.forced[1]
        lost = run.right[0], tuple(right and number % 5 > 0 for number, right in enumerate(run.right[1]))
        off = false_alarms.replace(run, forced=forced, right=lost)
        for drawn in (false_alarms.teacher_forced, false_alarms.paired_gate):
            self.assertEqual(false_alarms.failing(drawn, off, False, 2), 2)


if __name__ == "__main__":
    unittest.main()
