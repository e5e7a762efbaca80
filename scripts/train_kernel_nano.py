#!/usr/bin/env python3
"""Train the kernel-sized DeepSeek-V4 on the project's generated problems, with its MTP layer, and score it.

    scripts/env.sh python3 scripts/train_kernel_nano.py --device cuda [--seconds 240] [--out DIR]

writes a checkpoint for SGLang every --save-every seconds and at the end, and then `training.json`: what was done, what
the checkpoint scores once it is read back from fp8, and its hash.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pdkit.core.command import Parser, natural, positive, run_command
from pdkit.core.errors import ExitCode
from pdkit.models.cuda import store


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line. Raises UsageError."""
    parser = Parser(prog="train_kernel_nano.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, help=f"directory (default: {store.cached('trained')}, or the like)")
    store.add_hidden_size(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: %(default)s")
    parser.add_argument("--seconds", type=positive, default=240, help="for training (default: %(default)s)")
    parser.add_argument("--save-every", type=positive, default=60, help="seconds (default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of weights and data (default: %(default)s)")
    parser.add_argument("--workers", type=natural, default=4, help="processes that draw batches (default: %(default)s)")
    parser.add_argument("--score-rows", type=natural, default=200, help="of the evaluation file (default: %(default)s)")
    options = parser.parse_args(argv)
    if not (options.workers and options.score_rows):
        parser.error("--workers and --score-rows: at least 1")
    options.out = options.out or store.cached("trained", options.hidden_size)
    return options


def main(argv: Sequence[str]) -> ExitCode:
    options = parse(argv)
    from pdkit.models.cuda import fit  # imports torch and transformers, which takes seconds

    try:
        fit.run(options)
    except KeyboardInterrupt:
        print("train_kernel_nano.py: interrupted; the last checkpoint stays, without training.json", file=sys.stderr)
        raise
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("train_kernel_nano.py", main, sys.argv[1:]))
