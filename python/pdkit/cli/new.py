"""Writes the next registered PD test, once lint and the installed SGLang have nothing against it.

pdkit new Qwen3 --model Qwen/Qwen3-30B-A3B --gpus 4+4 --suite stage-c-test-dsv4-8-gpu-h200
"""

import os
import shlex
from argparse import Namespace
from pathlib import Path

from pdkit.core import paths
from pdkit.core.command import Parser
from pdkit.core.errors import ExitCode, UsageError

TAKE_FLAGS = ("--flags", "--prefill-flags", "--decode-flags")


def _words(text: str) -> tuple[str, ...]:
    return tuple(shlex.split(text))


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="for example Qwen3: class TestDisaggregationQwen3")
    parser.add_argument("--model", metavar="M", help="repository or directory (default on CPU: the nano model)")
    parser.add_argument("--suite", required=True, metavar="S", help="the suite says which hardware")
    parser.add_argument("--gpus", metavar="P+D", help="GPUs of prefill and decode, or N that both share; none on CPU")
    for name, whose in zip(TAKE_FLAGS, ("both servers", "prefill only", "decode only")):
        parser.add_argument(name, type=_words, default=(), metavar="'F ...'", help=f"flags of {whose}")
    parser.add_argument("--min-score", type=float, metavar="X", help="what GSM8K must exceed (default: the main job's)")
    parser.add_argument("--est-time", type=int, metavar="S", help="seconds that it takes")
    parser.add_argument(
        "--directory",
        type=Path,
        default=paths.registered_tests() / "distributed",
        metavar="DIR",
        help="where to write it (default: test/registered/distributed)",
    )


def main(args: Namespace) -> ExitCode:
    """Raises UsageError and NotReady."""
    from pdkit.preflight.contract.launches import report
    from pdkit.preflight.plan import of_contract
    from pdkit.preflight.scaffold import check, new_test

    given = {name: value for name, value in vars(args).items() if name not in ("command", "directory")}
    if not args.directory.is_dir():
        raise UsageError(f"--directory {args.directory}: no such directory")
    test = new_test(**given)
    path = args.directory / test.file_name
    if path.exists():
        raise UsageError(f"{path} exists; choose another name")
    contract = check(test, args.directory)
    with path.open("x") as file:
        file.write(test.source)
    shown = os.path.relpath(path)
    print(shown, *report(contract), sep="\n")
    for server in of_contract(contract, test.suite)[0].servers:
        print(f"  {server.name:<14}{server.why}")
    print(f"next: scripts/env.sh python3 {shown} -f")
    return ExitCode.PASSED
