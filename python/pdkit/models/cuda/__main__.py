"""Write a random DeepSeek-V4 of the size that SGLang's kernels demand: 28.5 M parameters and an MTP layer of 8.9 M.

    scripts/env.sh python3 scripts/make_kernel_nano.py [--out DIR] [--seed S] [--hidden-size 2048, the least for DeepEP]

takes seconds. It solves nothing; what it is for is parity, integrity and the acceptance of drafts.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pdkit.core.command import Parser, natural, run_command
from pdkit.core.errors import ExitCode
from pdkit.models.cuda.store import WEIGHTS, add_hidden_size, cached, digest

NAME = "make_kernel_nano.py"


def main(argv: Sequence[str]) -> ExitCode:
    parser = Parser(prog=NAME, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, help=f"directory (default: {cached('random')}, or the like)")
    add_hidden_size(parser)
    parser.add_argument("--seed", type=natural, default=1, help="of the weights (default: %(default)s)")
    options = parser.parse_args(argv)
    from pdkit.models.cuda.checkpoint import save  # imports torch and transformers, which takes seconds
    from pdkit.models.cuda.model import KernelNano, randomize

    began = time.monotonic()
    model = KernelNano(hidden_size=options.hidden_size)
    randomize(model, options.seed)
    path = save(model, options.out or cached("random", options.hidden_size))
    size = (path / WEIGHTS).stat().st_size / 1e6
    print(f"wrote {path} ({size:.1f} MB, hash {digest(path)}) in {time.monotonic() - began:.0f} s")
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command(NAME, main, sys.argv[1:]))
