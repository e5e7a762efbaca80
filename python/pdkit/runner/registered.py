"""Lists or runs the registered test files that a command line selects."""

from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.registry import collect
from pdkit.runner.options import Options
from pdkit.runner.select import select


def run_registered(options: Options) -> ExitCode:
    """Raises UsageError for a bad registration or an unknown suite, NotReady where this machine lacks what it needs."""
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
