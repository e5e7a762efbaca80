#!/usr/bin/env python3
"""Writes the next registered PD test, once lint and the installed SGLang have nothing against it.

scripts/new_pd_test.py Qwen3 --model Qwen/Qwen3-30B-A3B --gpus 4+4 --suite stage-c-test-dsv4-8-gpu-h200
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "python"))

from pdkit.core.command import Parser, run_command  # noqa: E402
from pdkit.core.errors import ExitCode, UsageError  # noqa: E402
from pdkit.preflight.contract.launches import report  # noqa: E402
from pdkit.preflight.plan import of_contract  # noqa: E402
from pdkit.preflight.scaffold import check, new_test, render  # noqa: E402

FLAGS = ("--flags", "--prefill-flags", "--decode-flags")
DIRECTORY = REPO / "test" / "registered" / "distributed"


def _joined(argv: list[str]) -> list[str]:
    """`--flags --x` as `--flags=--x`: argparse takes a word that begins with a dash for the next option."""
    words = iter(argv)
    return [f"{word}={next(words, '')}" if word in FLAGS else word for word in words]


def main(argv: list[str]) -> ExitCode:
    parser = Parser(
        prog="new_pd_test.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags = {"type": lambda text: tuple(shlex.split(text)), "default": (), "metavar": "'F ...'"}
    parser.add_argument("name", metavar="NAME", help="for example Qwen3: class TestDisaggregationQwen3")
    parser.add_argument("--model", metavar="M", help="repository or directory (default on CPU: the nano model)")
    parser.add_argument("--suite", required=True, metavar="S", help="the suite says which hardware")
    parser.add_argument("--gpus", metavar="P+D", help="GPUs of prefill and decode, or N that both share; none on CPU")
    for name, whose in zip(FLAGS, ("both servers", "prefill only", "decode only")):
        parser.add_argument(name, help=f"flags of {whose}", **flags)
    parser.add_argument("--min-score", type=float, metavar="X", help="what GSM8K must exceed (default: the main job's)")
    parser.add_argument("--est-time", type=int, metavar="S", help="seconds that it takes")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, metavar="DIR", help="where to write it")
    args = vars(parser.parse_args(_joined(argv)))
    directory = args.pop("directory")
    if not directory.is_dir():
        raise UsageError(f"--directory {directory}: no such directory")
    test = new_test(**args)
    path = directory / test.file_name
    if path.exists():
        raise UsageError(f"{path} exists; choose another name")
    contract = check(test, directory)
    with path.open("x") as file:
        file.write(render(test))
    shown = os.path.relpath(path)
    print(shown, *report(contract), sep="\n")
    for server in of_contract(contract, test.suite)[0].servers:
        print(f"  {server.name:<14}{server.why}")
    print(f"next: scripts/env.sh python3 {shown} -f")
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("new_pd_test.py", main, sys.argv[1:]))
