"""How long `pdkit list` takes on this tree, and on one of 700 registered files of 200 lines, the shape of SGLang's.

Result (2026-11-26, 2 cores shared with nine other jobs, an upper bound): median 0.35 s here, best 0.25 s, goal 0.3 s;
0.51 s of 700 files, which were generated then, goal 1 s.

    scripts/env.sh python3 studies/bench_list.py
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pdkit.core import paths

COPIED = paths.registered_tests() / "distributed" / "test_disaggregation_dsv4_attached.py"
GOAL_HERE_S, GOAL_TREE_S = 0.3, 1.0


def time_list(what: str, goal: float, repeats: int, *arguments: str) -> None:
    """Prints how long a list takes."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pdkit", "list", *arguments], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    print(
        f"{what}: median {statistics.median(seconds):.2f} s, best {min(seconds):.2f} s, worst {max(seconds):.2f} s "
        f"of {repeats} (goal {goal:g} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=700)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    time_list("this tree", GOAL_HERE_S, args.repeats)
    with tempfile.TemporaryDirectory(prefix="bench_list_") as root:
        for number in range(args.files):
            folder = Path(root, f"area_{number % 25:02d}")
            folder.mkdir(exist_ok=True)
            shutil.copy(COPIED, folder / f"test_copied_{number:03d}.py")
        time_list(f"{args.files} files", GOAL_TREE_S, args.repeats, "--test-root", root)


if __name__ == "__main__":
    main()
