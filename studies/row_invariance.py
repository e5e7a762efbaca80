#!/usr/bin/env python3
"""Whether the bits of a row of a matrix product depend on how many rows are multiplied, with MKL as torch calls it.

Result (torch 2.14.1 and, on Intel, 2.11.0; 2026-11-27): products of multiples of 8 rows that differ from those of 8 each.

    CPU                          MKL's default     its strict mode
    AMD EPYC, AVX-512               0 of 1584           0 of 1584
    Intel Xeon, AVX-512           368 of 1584           0 of 1584
    Intel Xeon, AVX2 alone       1104 of 1584           0 of 1584

In multiples of 16 by default 282 of 792 differ on AVX2 alone, elsewhere none. In strict mode none do in multiples of 4
either, but other operations of a forward pass then differ (`test_engine_model_runner.py` with 4 for ROWS fails). So the
embedded engine pads to 8 rows and asks MKL for its strict mode (`pdkit.engine.model_runner`).
Strict mode: Intel oneMKL Developer Guide, "Conditional Numerical Reproducibility". From the repository root, torch is all
it needs; MKL_ENABLE_INSTRUCTIONS=AVX2 makes an Intel CPU one without AVX-512:

    scripts/env.sh python3 studies/row_invariance.py
"""

import itertools
import os
import subprocess
import sys

import torch

MODES = "OFF", "AUTO,STRICT"
MULTIPLES = 4, 8, 16, 32
ROWS, IN, OUT = 192, (16, 24, 64, 128, 320, 512), (4, 24, 32, 97, 128, 200, 520, 644)
QUERIES, KEYS, WIDTHS = (1, 4), (5, 33, 64, 97, 160, 300), (16, 32, 64)  # of attention: a product for each of ROWS / 2


def differing(multiple: int) -> tuple[int, int]:
    """(how many products of several times as many rows differ from those of `multiple` rows each, of how many)."""
    torch.manual_seed(0)
    products = [
        (ROWS, lambda rows, x=torch.randn(ROWS, k), w=torch.randn(n, k): torch.nn.functional.linear(x[rows], w))
        for k, n in itertools.product(IN, OUT)
    ]
    products += [
        (
            ROWS // 2,
            lambda rows, q=torch.randn(ROWS // 2, m, d), k=torch.randn(ROWS // 2, d, t): torch.bmm(q[rows], k[rows]),
        )
        for m, t, d in itertools.product(QUERIES, KEYS, WIDTHS)
    ]
    wrong = count = 0
    for length, of in products:
        alone = torch.cat([of(slice(start, start + multiple)) for start in range(0, length, multiple)])
        for end in range(multiple, length + 1, multiple):
            count += 1
            wrong += not torch.equal(of(slice(end)), alone[:end])
    return wrong, count


def main() -> None:
    if mode := os.environ.get("MKL_CBWR"):
        torch.set_num_threads(1)
        with torch.inference_mode():
            for multiple in MULTIPLES:
                wrong, count = differing(multiple)
                print(f"MKL_CBWR={mode}, multiples of {multiple}: {wrong} of {count} products differ", flush=True)
        return
    for mode in MODES:
        subprocess.run([sys.executable, __file__], env=os.environ | {"MKL_CBWR": mode}, check=True)


if __name__ == "__main__":
    main()
