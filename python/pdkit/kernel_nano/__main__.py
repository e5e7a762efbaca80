"""Write a random DeepSeek-V4 of the size that SGLang's kernels demand: 28.5 M parameters and an MTP layer of 8.9 M.

    scripts/env.sh python3 -m pdkit.kernel_nano [--out DIR] [--seed S] [--hidden-size 2048, the least that DeepEP moves]

takes seconds. It solves nothing; what it is for is parity, integrity and the acceptance of drafts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from pdkit.kernel_nano.cache import WEIGHTS, add_hidden_size, cached, digest
from pdkit.kernel_nano.checkpoint import save
from pdkit.kernel_nano.model import KernelNano, randomize


def main() -> None:
    parser = argparse.ArgumentParser(prog="pdkit.kernel_nano", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, help=f"directory (default: {cached('random')}, or the like)")
    add_hidden_size(parser)
    parser.add_argument("--seed", type=int, default=1, help="of the weights (default: %(default)s)")
    options = parser.parse_args()
    out = options.out or cached("random", options.hidden_size)
    began = time.monotonic()
    model = KernelNano(hidden_size=options.hidden_size)
    randomize(model, options.seed)
    path = save(model, out)
    size = (path / WEIGHTS).stat().st_size / 1e6
    print(f"wrote {path} ({size:.1f} MB, hash {digest(path)}) in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
