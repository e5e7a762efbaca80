"""The detection matrix: each fault of the library against each check of the suite, and the suite without a fault.
Writes results.jsonl, matrix.md, matrix.csv and the logs of all servers below --out.
"""

import signal
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from pdkit.core.command import Parser, natural
from pdkit.core.errors import ExitCode, NotReady, UsageError

EPILOG = "Exit codes: 0 each fault that changes anything was caught and no clean run failed; 1 not so."


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="where everything goes (default: a new directory)")
    parser.add_argument("--faults", metavar="A,B", help="these faults only, or kinds: all families; --list names all")
    parser.add_argument(
        "--clean-runs", type=natural, metavar="N", help="runs without a fault (default: 50, with --quick 1)"
    )
    parser.add_argument("--quick", action="store_true", help="a few faults, one pair of servers, a few tests")
    parser.add_argument("--resume", action="store_true", help="go on with the results in --out")
    parser.add_argument("--list", action="store_true", help="print the faults, and run nothing")


def main(args: Namespace) -> ExitCode:
    """Raises UsageError and NotReady."""
    if args.list:
        from pdkit.faults.library import LIBRARY

        for fault in LIBRARY.values():
            print(f"{fault.name:36s} {fault.what}" + (f" [{fault.resembles}]" if fault.resembles else ""))
        return ExitCode.PASSED
    if args.resume and not args.out:
        raise UsageError("--resume needs --out, the directory of the results to go on with")
    from pdkit.faults.matrix.results import ResultsError
    from pdkit.faults.matrix.run import chosen_faults, run_matrix
    from pdkit.faults.matrix.session import WorkerFailed
    from pdkit.faults.switch import UnknownFault

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    clean_runs = args.clean_runs if args.clean_runs is not None else 1 if args.quick else 50
    try:
        faults = chosen_faults(args.faults, args.quick)
        out = args.out or Path(tempfile.mkdtemp(prefix="detection_matrix_"))
        return run_matrix(out, faults, clean_runs, args.quick, args.resume)
    except (UnknownFault, ResultsError) as error:
        raise UsageError(error) from None
    except WorkerFailed as error:
        raise NotReady(error) from None
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}; choose another --out") from None
    except KeyboardInterrupt:
        print("pdkit matrix: error: interrupted; go on with --resume", file=sys.stderr)
        return ExitCode.INTERRUPTED
