"""Runs the main job, `TestDisaggregationDSV4`, on the highest rung that this machine can run (`scripts/run.sh`)."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pdkit.exit_codes import ExitCode
from pdkit.rung import LADDER, Gpu, Rung, RungUnavailable, UnknownRung, choose, found, visible_gpus, why

TEST_DIR = Path(__file__).resolve().parents[2] / "test"

_PHASE = re.compile(r"\[phase\] (?P<name>.+): (?P<seconds>[\d.]+) s")
_RESULT = re.compile(r"rung=(?P<rung>\S+) engine=(?P<engine>.+) gsm8k=(?P<score>[\d.]+) gate=(?P<gate>\S+)")


@dataclass(frozen=True)
class Result:
    """What the test says that it measured, and on what."""

    rung: str
    engine: str
    score: float
    gate: str


@dataclass(frozen=True)
class Report:
    """What a run printed: phases as (name, seconds) in order, and the result once there is one."""

    phases: tuple[tuple[str, float], ...] = ()
    result: Result | None = None


def read_report(lines: Iterable[str]) -> Report:
    """Finds phases and result among the lines that the test printed."""
    phases, result = [], None
    for line in lines:
        if match := _PHASE.fullmatch(line.strip()):
            phases.append((match["name"], float(match["seconds"])))
        elif match := _RESULT.fullmatch(line.strip()):
            result = Result(match["rung"], match["engine"], float(match["score"]), match["gate"])
    return Report(tuple(phases), result)


def verdict(returncode: int, report: Report, rung: Rung, interrupted: bool = False) -> ExitCode:
    """A run passes only where it was scored, and on the rung that was meant: unittest returns 0 for a skip, too."""
    if interrupted:
        return ExitCode.INTERRUPTED
    if returncode == 0 and (report.result is None or report.result.rung != rung.name):
        return ExitCode.NOTHING_RAN
    return ExitCode.PASSED if returncode == 0 else ExitCode.FAILED


def summary(rung: Rung, report: Report, code: ExitCode, seconds: float) -> str:
    """The closing lines: verdict, rung, engine, score, gate and the time of each phase."""
    result = report.result
    head = f"main job on rung {rung.name}: {code.name.replace('_', ' ')}"
    rows = [("engine", result.engine if result else rung.engine)]
    rows += [("score", f"{result.score:.3f} (gate {result.gate})" if result else "none, the test did not get that far")]
    rows += [(name, f"{took:.1f} s") for name, took in report.phases]
    rows += [("total", f"{seconds:.1f} s")]
    width = max(len(name) for name, _ in rows)
    return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def ladder(gpus: Sequence[Gpu]) -> str:
    """One line per rung, highest first: what it needs, and whether this machine can run it."""
    rows = [(rung.name, rung.needs, "runs here" if rung.runs_on(gpus) else "not here") for rung in LADDER]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, f"this machine has {found(gpus)}"])


@contextmanager
def _left_to(child: subprocess.Popen):
    """Leaves Ctrl-C and SIGTERM to the child, which stops its servers; yields the list of the signals received.

    A terminal sends Ctrl-C to the child as well, so that only SIGTERM has to be passed on.
    """
    received = []

    def handle(number, _frame):
        received.append(number)
        if number == signal.SIGTERM:
            child.send_signal(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(rung: Rung) -> ExitCode:
    """Runs the test of `rung`, passing its output on, and ends with the summary."""
    command = [sys.executable, str(TEST_DIR / rung.test_file), "-f"]
    started, lines = time.monotonic(), []
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    with _left_to(child) as signals:
        for line in child.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            lines.append(line.decode(errors="replace"))
        returncode = child.wait()
    report = read_report(lines)
    code = verdict(returncode, report, rung, bool(signals))
    print("\n" + summary(rung, report, code, time.monotonic() - started), flush=True)
    return code


def main(argv: Sequence[str]) -> ExitCode:
    parser = argparse.ArgumentParser(prog="scripts/run.sh", description=__doc__.strip(), allow_abbrev=False)
    parser.add_argument("--rung", metavar="NAME", help="run this rung, and no other: " + ", ".join(r.name for r in LADDER))
    parser.add_argument("--ladder", action="store_true", help="print the rungs and which of them run here, and run nothing")
    args = parser.parse_args(argv)
    gpus = visible_gpus()
    if args.ladder:
        print(ladder(gpus))
        return ExitCode.PASSED
    try:
        rung = choose(gpus, args.rung)
    except (UnknownRung, RungUnavailable) as error:
        print(f"run.sh: error: {error}", file=sys.stderr)
        return ExitCode.BAD_USAGE if isinstance(error, UnknownRung) else ExitCode.NOT_READY
    print(f"main job on rung {rung.name}: {rung.engine}", *why(rung, gpus).splitlines(), sep="\n  ", flush=True)
    return run(rung)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
