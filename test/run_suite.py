"""Runs the registered tests of one suite, e.g. `run_suite.py --hw cpu --suite stage-a-test-cpu` (see --help)."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "python"))

from pdkit.core.command import run_command  # noqa: E402
from pdkit.core.errors import ExitCode, UsageError  # noqa: E402
from pdkit.core.registry import collect  # noqa: E402
from pdkit.runner.options import parse_options  # noqa: E402
from pdkit.runner.select import select  # noqa: E402


def main(argv: list[str]) -> ExitCode:
    options = parse_options(argv, default_test_root=HERE / "registered")
    collection = collect(options.test_root)
    if collection.errors:
        raise UsageError("\n".join(collection.errors))
    selection = select(collection, options)
    if options.list_only:
        from pdkit.runner.listing import as_json, table

        print((as_json if options.json else table)(selection, options))
        return ExitCode.PASSED if selection.enabled else ExitCode.NOTHING_RAN
    if selection.enabled:
        from pdkit.runner.orphans import end_earlier_runs

        for line in end_earlier_runs():
            print(line, flush=True)
    if options.environment_check and selection.enabled:
        from pdkit.preflight.environment.require import require

        require(selection.enabled)
    from pdkit.runner.suite import run_suite

    return run_suite(selection, options)


if __name__ == "__main__":
    sys.exit(run_command("run_suite.py", main, sys.argv[1:]))
