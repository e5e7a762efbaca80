"""How long `pdkit list` takes on this tree, and on a generated tree of 700 registered files in the shape of SGLang's.

Result (2026-11-26, 2 cores shared with nine other jobs, an upper bound): median 0.35 s here, best 0.25 s, goal 0.3 s;
0.51 s of 700 files, goal 1 s.

    scripts/env.sh python3 studies/bench_list.py
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOAL_HERE_S, GOAL_TREE_S = 0.3, 1.0

HEAD = '''"""Generated file {number}."""

import unittest

from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci

register_cuda_ci(est_time={est_time}, stage="stage-b", runner_config="1-gpu-{size}")
register_cpu_ci(est_time={est_time}, suite="stage-a-test-cpu")


class TestGenerated{number}(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.arguments = ["--trust-remote-code", "--tp", "4", "--mem-fraction-static", "0.7"]
        cls.environment = {{"SGLANG_IS_IN_CI": "1", "SGLANG_TEST_MAX_RETRY": "0"}}
'''
METHOD = '''
    def test_score_{method}(self):
        """The score of configuration {method} stays above its threshold."""
        requests = [{{"text": f"question {{i}}", "max_new_tokens": 512}} for i in range(200)]
        scores = []
        for index, request in enumerate(requests):
            answer = self.answer(request["text"], limit=request["max_new_tokens"])
            if answer is None or not answer.strip():
                continue
            scores.append(float(answer == f"answer {{index}}"))  # one point an answer
        mean = sum(scores) / max(len(scores), 1)
        self.assertGreater(mean, 0.{method}, msg=f"scored {{mean:.3f}} on {{len(scores)}} answers")
'''
TAIL = """

if __name__ == "__main__":
    unittest.main()
"""


def generate(root: Path, files: int, lines: int) -> int:
    """Writes `files` test files of about `lines` lines below `root`; returns the number of lines."""
    methods = max(1, (lines - HEAD.count("\n") - TAIL.count("\n")) // METHOD.count("\n"))
    total = 0
    for number in range(files):
        text = HEAD.format(number=number, est_time=10 + number % 90, size="large" if number % 2 else "small")
        text += "".join(METHOD.format(method=method) for method in range(methods)) + TAIL
        path = root / f"area_{number % 25:02d}" / f"test_generated_{number:03d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        total += text.count("\n")
    return total


def time_list(repeats: int, *arguments: str) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pdkit", "list", *arguments], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return seconds


def report(what: str, seconds: list[float], goal: float):
    print(
        f"{what}: median {statistics.median(seconds):.2f} s, best {min(seconds):.2f} s, worst {max(seconds):.2f} s "
        f"of {len(seconds)} (goal {goal:g} s)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=700)
    parser.add_argument("--lines", type=int, default=200, help="lines per generated file")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    report("this tree", time_list(args.repeats), GOAL_HERE_S)
    with tempfile.TemporaryDirectory(prefix="bench_list_") as root:
        lines = generate(Path(root), args.files, args.lines)
        seconds = time_list(args.repeats, "--test-root", root)
        report(f"{args.files} files of {lines // args.files} lines", seconds, GOAL_TREE_S)


if __name__ == "__main__":
    main()
