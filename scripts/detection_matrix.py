#!/usr/bin/env python3
"""The detection matrix: each fault of the library against each check of the suite, and the suite without a fault.

    scripts/env.sh python3 scripts/detection_matrix.py --out matrix

writes results.jsonl, matrix.md, matrix.csv and the logs of all servers below --out.
Exit code 0: each fault that changes anything was caught and no clean run failed; 1: not so.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pdkit.core.errors import ExitCode

REPOSITORY = Path(__file__).resolve().parents[1]
ASSETS = REPOSITORY / "python" / "pdkit" / "assets"
SUBJECTS = REPOSITORY / "python" / "pdkit" / "faults" / "matrix" / "subjects.py"

QUICK_FAULTS = (
    "128x-compressed-zeroed",
    "indexer-compressed-zeroed",
    "rooms-swapped",
    "compressed-aliased",
    "seed-lost",
    "transfer-fails-one-in-ten",
)
QUICK_TESTS = (
    "test_parity_alone",
    "test_parity_shared_prefix",
    "test_parity_rooms",
    "test_parity_request_parameters",
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="where everything goes (default: a new directory)")
    add("--faults", metavar="A,B", help="these faults only; --list names all")
    add("--clean-runs", type=int, metavar="N", help="runs without a fault (default: 50, with --quick 1)")
    add(
        "--quick",
        action="store_true",
        help=f"{len(QUICK_FAULTS)} faults, one pair of servers, {len(QUICK_TESTS)} tests",
    )
    add("--resume", action="store_true", help="go on with the results in --out")
    add("--list", action="store_true", help="print the faults, and run nothing")
    args = parser.parse_args(argv)
    if args.clean_runs is None:
        args.clean_runs = 1 if args.quick else 50
    if args.clean_runs < 0:
        parser.error("--clean-runs must be 0 or more")
    if args.resume and not args.out:
        parser.error("--resume needs --out, the directory of the results to go on with")
    return args


def chosen_faults(args) -> list[str]:
    """Raises UnknownFault."""
    from pdkit.faults import LIBRARY
    from pdkit.faults.switch import find

    if args.faults:
        return [find(name.strip()).name for name in args.faults.split(",")]
    return list(QUICK_FAULTS if args.quick else LIBRARY)


def subjects_of(args):
    from pdkit.faults.matrix.session import Subject

    random = Subject("random", SUBJECTS, "RandomWeights", QUICK_TESTS if args.quick else ())
    return [random] if args.quick else [Subject("trained", SUBJECTS, "Trained"), random]


def models_of(args):
    from pdkit.faults.matrix.truth import TriedModel

    random = TriedModel("random", ASSETS / "random-dsv4", "dummy", 1)
    return [random] if args.quick else [TriedModel("trained", ASSETS / "nano-dsv4", "auto", 0), random]


def print_library():
    from pdkit.faults import LIBRARY

    for fault in LIBRARY.values():
        print(f"{fault.name:36s} {fault.what}" + (f" [{fault.resembles}]" if fault.resembles else ""))


def run_matrix(args, out: Path) -> ExitCode:
    from pdkit.faults.matrix.results import Results, planned
    from pdkit.faults.matrix.session import Session
    from pdkit.faults.matrix.truth import truths_of
    from pdkit.faults.matrix.verdicts import checks_of
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    faults = chosen_faults(args)
    wanted = planned(faults, args.clean_runs)
    out.mkdir(parents=True, exist_ok=True)
    results = Results.open(out / "results.jsonl", args.resume)
    todo = [key for key in wanted if key not in results.runs]
    console = Console()
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("ground truth", total=len(wanted), completed=len(wanted) - len(todo))

        def tell(text):
            progress.update(task, description=f"{text:60.60s}")

        results.add_truths(truths_of([name for name in faults if name not in results.truths], models_of(args), tell))
        if todo:
            with Session(subjects_of(args), out / "logs", tell) as session:
                results.set_checks(checks_of([test for tests in session.tests.values() for test in tests]))
                for fault, index in todo:
                    run = session.run(fault, index)
                    results.add(run)
                    progress.advance(task)
                    console.print(line_of(run), highlight=False)
    problems = results.problems(wanted)
    write(results, problems, out)
    return ExitCode.FAILED if problems else ExitCode.PASSED


def write(results, problems, out: Path):
    """The table into `out`; prints the summary."""
    from pdkit.faults.matrix import report

    (out / "matrix.md").write_text(f"# Detection matrix\n\n{report.markdown(results, problems)}", encoding="utf-8")
    report.write_csv(results, out / "matrix.csv")
    print(f"\n{report.summary(results, problems)}\nwritten: {out}/matrix.md, matrix.csv")


def line_of(run) -> str:
    name = run.fault or f"no fault, run {run.index}"
    caught = f"caught by {', '.join(run.caught_by)}" if run.caught_by else "not caught" if run.fault else "passed"
    return f"{run.seconds:6.1f} s  {name}: {caught}" + (f"; restarted: {run.restarted}" if run.restarted else "")


def main(argv: Sequence[str] | None = None) -> ExitCode:
    args = parse(argv)
    if args.list:
        print_library()
        return ExitCode.PASSED
    from pdkit.faults.matrix.results import ResultsError
    from pdkit.faults.matrix.session import WorkerFailed
    from pdkit.faults.switch import UnknownFault

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_matrix(args, args.out or Path(tempfile.mkdtemp(prefix="detection_matrix_")))
    except (UnknownFault, ResultsError) as error:
        code, message = ExitCode.BAD_USAGE, error
    except WorkerFailed as error:
        code, message = ExitCode.NOT_READY, error
    except OSError as error:
        code, message = ExitCode.BAD_USAGE, f"{error.filename}: {error.strerror}; choose another --out"
    except KeyboardInterrupt:
        code, message = ExitCode.INTERRUPTED, "interrupted; go on with --resume"
    print(f"detection_matrix.py: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
