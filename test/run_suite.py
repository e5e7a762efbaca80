"""Runs the registered tests of one suite, e.g. `run_suite.py --hw cpu --suite stage-a-test-cpu` (see --help)."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "python"))

from pdkit.core.command import run_command  # noqa: E402
from pdkit.core.errors import ExitCode  # noqa: E402
from pdkit.runner.options import parse_options  # noqa: E402
from pdkit.runner.registered import run_registered  # noqa: E402


def main(argv: list[str]) -> ExitCode:
    return run_registered(parse_options(argv, default_test_root=HERE / "registered"))


if __name__ == "__main__":
    sys.exit(run_command("run_suite.py", main, sys.argv[1:]))
