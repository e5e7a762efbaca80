"""The study of false alarms: its draws from a clean run do not fail the checks, and those of a planted fault do."""

import sys
import unittest
from pathlib import Path

import numpy as np
from pdkit.checks.parity.answers import Answer
from pdkit.checks.parity.verdict import Parity
from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "studies"))
import false_alarms  # noqa: E402


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
