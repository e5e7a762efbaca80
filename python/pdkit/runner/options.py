"""The command line of `test/run_suite.py`: SGLang's flags, and a few on top."""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pdkit.core import ci_register
from pdkit.core.command import Parser, count, natural, positive, seconds, text_path
from pdkit.core.errors import MEANINGS, UsageError
from pdkit.core.source import read

DEFAULT_TIMEOUT_S = 1200.0
EST_TIME_FACTOR = 1.5
HISTORY_VARIABLE = "PDKIT_HISTORY"
LAST_FAILED = "last-failed.json"  # beside the history


@dataclass(frozen=True)
class Options:
    """Everything that the user asked for; times in seconds."""

    test_root: Path
    hw: str | None = None
    suite: str | None = None
    nightly: bool = False
    timeout_per_file: float | None = None
    continue_on_error: bool = False
    partition_id: int | None = None
    partition_size: int | None = None
    partition_model_file: Path | None = None
    enable_retry: bool = False
    max_attempts: int = 2
    retry_wait_seconds: float = 60.0
    retry_timeout_increase: float = 600.0
    test_max_retry: int = 0
    jobs: int | None = None  # None: the runner chooses
    warm: bool = True  # fork test files from processes that have imported what they need, where that can be
    files: tuple[str, ...] = ()
    only: str | None = None  # -k
    last_failed: bool = False
    repeat: int = 1
    last_failed_file: Path | None = None
    verbose: bool = False
    timings: bool = False
    failfast: bool = True
    report_dir: Path | None = None
    history: Path | None = None
    environment_check: bool = True
    list_only: bool = False
    json: bool = False
    target: str | None = None  # what the files test, for those that do not name it themselves

    @property
    def attempts(self) -> int:
        return self.max_attempts if self.enable_retry else 1

    def timeout(self, est_time: float) -> float:
        """Seconds that one attempt at a file may take, from what the file says it takes."""
        limit = self.timeout_per_file or default_timeout(est_time)
        return limit + (self.retry_timeout_increase if self.enable_retry else 0)


@cache
def _timeout_rule() -> tuple[float, float]:
    """(factor, seconds on top) by which the installed SGLang derives a limit from est_time; (0, 0) before 0.5.23."""
    try:
        source = read(ci_register.locate().with_name("ci_utils.py"))
    except (ci_register.CIRegisterNotFound, OSError):
        return 0, 0
    rule = [source.value(source.constants.get(f"DERIVED_TIMEOUT_{part}")) for part in ("FACTOR", "SLACK")]
    factor, slack = (value if isinstance(value, float) else 0 for value in rule)
    return factor, slack


def default_timeout(est_time: float) -> float:
    """Seconds that one attempt at a file may take where the command line sets no limit, as in the installed SGLang."""
    factor, slack = _timeout_rule()
    if slack:
        return max(factor * est_time, est_time + slack)
    return max(DEFAULT_TIMEOUT_S, EST_TIME_FACTOR * est_time)


def add_common(group: argparse._ActionsContainer) -> None:
    """What every command that runs tests takes; `history_file` reads `--history FILE` and `--no-history`."""
    group.add_argument("-v", "--verbose", action="store_true", help="print what tests print, one file at a time")
    group.add_argument(
        "--skip-environment-check",
        dest="environment_check",
        action="store_false",
        help="start even if this machine lacks what is needed",
    )
    group.add_argument("--report-dir", type=text_path, metavar="DIR", help="keep logs and results.json there")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help=f"append a record there (default: {HISTORY_VARIABLE}, or a state file)",
    )
    choice.add_argument("--no-history", action="store_true", help="append none")


def default_history(environ: Mapping[str, str] = os.environ) -> Path | None:
    """What PDKIT_HISTORY names, nothing where it is empty; unset, a file in the state directory of the user (XDG).

    https://specifications.freedesktop.org/basedir-spec
    """
    named = environ.get(HISTORY_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    home = environ.get("HOME") or os.path.expanduser("~")  # of the user's entry in passwd, where HOME is not set
    state = environ.get("XDG_STATE_HOME") or os.path.join(home, ".local", "state")
    return Path(state, "sglang-pd-suite", "history.jsonl") if os.path.isabs(state) else None


def history_file(args: argparse.Namespace, is_own_tree: bool) -> Path | None:
    """Where a record of the run goes, if anywhere: runs of other trees only where they are told to.

    Raises UsageError where a file that was named cannot be one.
    """
    if args.no_history:
        return None
    is_named = args.history or os.environ.get(HISTORY_VARIABLE)
    path: Path | None = args.history or (default_history() if is_named or is_own_tree else None)
    if is_named and path and (path.is_dir() or not path.absolute().parent.is_dir()):
        flag = "--history" if args.history else HISTORY_VARIABLE
        raise UsageError(f"{flag} {path}: {'is a directory' if path.is_dir() else 'its directory does not exist'}")
    return path


def add_selection(parser: argparse.ArgumentParser, default_test_root: Path) -> argparse._ArgumentGroup:
    """Which files: what every command that lists or runs registered files takes."""
    select = parser.add_argument_group("which files")
    select.add_argument("--hw", metavar="NAME", help="hardware: cpu, cuda, amd, npu, xpu, musa, ...")
    select.add_argument("--suite", metavar="NAME", help="suite, for example stage-a-test-cpu")
    select.add_argument("--nightly", action="store_true", help="nightly registrations instead of the others")
    select.add_argument(
        "--test-root",
        type=Path,
        default=default_test_root,
        metavar="DIR",
        help="tree of registered tests (default: this repository's)",
    )
    return select


def add_running(parser: argparse.ArgumentParser, default_test_root: Path) -> None:
    which = add_selection(parser, default_test_root)
    which.add_argument("files", nargs="*", metavar="FILE", help="these alone: paths, or names such as test_gate")
    which.add_argument("-k", dest="only", metavar="NAME", help="files and tests that are called like NAME")
    which.add_argument("--last-failed", action="store_true", help="files that failed when they last ran")
    which.add_argument("--repeat", type=count, default=1, metavar="N", help="run them N times over")
    run = parser.add_argument_group("how to run them")
    run.add_argument(
        "--timeout-per-file",
        type=positive,
        metavar="S",
        help="end a file after S seconds (default: as SGLang derives it)",
    )
    run.add_argument(
        "--jobs",
        type=count,
        metavar="N",
        help="run N files side by side (default: 4 on two cores; 1 with GPUs)",
    )
    run.add_argument(
        "--no-warm",
        dest="warm",
        action="store_false",
        help="start files and servers anew, none forked from a warm process",
    )
    run.add_argument("--continue-on-error", action="store_true", help="go on with the next file after a failed one")
    run.add_argument(
        "--no-failfast",
        dest="failfast",
        action="store_false",
        help="without -f: other methods run after one failed",
    )
    add_common(run)


def _add_for_ci(parser: argparse.ArgumentParser) -> None:
    """SGLang's own options of its runner, which its CI passes."""
    select = parser.add_argument_group("partitions")
    select.add_argument("--auto-partition-id", type=natural, metavar="I", help="run partition I, from 0, ...")
    select.add_argument("--auto-partition-size", type=count, metavar="N", help="... of N of about equal time")
    select.add_argument(
        "--partition-model-file",
        type=Path,
        metavar="F",
        help="JSON object of file -> seconds, or JSON lines as printed between TIMINGS BEGIN and END: "
        "used instead of the registered est_time",
    )
    select.add_argument("--list", dest="list_only", action="store_true", help="print what would run, and run nothing")
    select.add_argument("--json", action="store_true", help="with --list: print JSON")

    retry = parser.add_argument_group("retries")
    retry.add_argument(
        "--enable-retry", action="store_true", help="try a file again after a timeout or a missed measurement"
    )
    retry.add_argument("--max-attempts", type=count, default=2, metavar="N", help="tries per file (default: 2)")
    retry.add_argument("--retry-wait-seconds", type=seconds, default=60.0, metavar="S", help="default: 60")
    retry.add_argument(
        "--retry-timeout-increase",
        type=seconds,
        default=600.0,
        metavar="S",
        help="with --enable-retry: added to the timeout of each try (default: 600)",
    )
    retry.add_argument(
        "--test-max-retry",
        type=natural,
        default=0,
        metavar="N",
        help="SGLANG_TEST_MAX_RETRY of the files: retries per test method (default: 0, whatever the environment says)",
    )


def parse_options(argv: list[str], default_test_root: Path) -> Options:
    """Options from the command line of `test/run_suite.py`; `--help` prints and leaves by SystemExit.

    Raises UsageError where the flags are wrong by themselves; the registry knows whether suite and hardware exist.
    """
    codes = "; ".join(f"{int(code)} {meaning}" for code, meaning in MEANINGS.items())
    parser = Parser(
        prog="run_suite.py",
        description="Run the registered test files of one suite, each as `python3 FILE -f` in a process of its own.",
        epilog=f"Exit codes: {codes}.",
    )
    add_running(parser, default_test_root)
    _add_for_ci(parser)
    parser.set_defaults(timings=True)
    return options_of(parser.parse_args(argv), default_test_root)


def options_of(given: argparse.Namespace, default_test_root: Path) -> Options:
    """Options from what a parser found; those that its command does not take have their defaults. Raises UsageError."""
    fields = {field.name: field.default for field in dataclasses.fields(Options)}
    args = argparse.Namespace(**fields, auto_partition_id=None, auto_partition_size=None, no_history=False)
    vars(args).update(vars(given))
    args.files = tuple(args.files)
    if args.only and not (args.files or args.last_failed or args.hw or args.suite):
        args.hw = "cpu"
    is_narrow = args.files or args.only or args.last_failed
    missing = [flag for flag, value in (("--hw", args.hw), ("--suite", args.suite)) if not value]
    size, rank = args.auto_partition_size, args.auto_partition_id
    if missing and not args.list_only and not is_narrow:
        raise UsageError(f"{' and '.join(missing)} missing: say what to run, or --list to see what there is")
    if args.files and args.last_failed:
        raise UsageError("FILE and --last-failed both name files: choose one")
    if args.json and not args.list_only:
        raise UsageError("--json goes with --list; a run writes its results.json with --report-dir DIR")
    if missing and (size is not None or args.partition_model_file):
        raise UsageError(f"{' and '.join(missing)} missing: only the files of one suite are partitioned")
    if rank is not None and size is None:
        raise UsageError("--auto-partition-id needs --auto-partition-size")
    if size is not None and rank is None and not args.list_only:
        raise UsageError("--auto-partition-size needs --auto-partition-id")
    if size is not None and rank is not None and rank >= size:
        raise UsageError(f"unknown partition {rank}; nearest known: {size - 1} (partitions run from 0 to {size - 1})")
    if not args.test_root.is_dir():
        raise UsageError(f"--test-root {args.test_root}: no such directory")
    if args.report_dir and args.report_dir.exists() and not args.report_dir.is_dir():
        raise UsageError(f"--report-dir {args.report_dir}: not a directory")

    is_own_tree = args.test_root.absolute() == default_test_root.absolute()
    args.history = None if args.list_only else history_file(args, is_own_tree)
    args.last_failed_file = args.history and args.history.with_name(LAST_FAILED)
    if is_narrow or args.repeat > 1:
        args.history = None  # it compares runs of whole suites
    args.partition_id, args.partition_size = rank, size
    return Options(**{name: getattr(args, name) for name in fields})
