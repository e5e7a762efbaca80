#!/usr/bin/env python3
"""How often two sound servers differ in being right: the flip rate that the paired gate must be told.

Results: docs/decisions/paired-gate.md.

Scores the same questions on both, and prints how many are right on one of them only. From the repository root:

    scripts/env.sh python3 studies/flip_rate.py http://127.0.0.1:8000 http://127.0.0.1:8001 --data questions.jsonl
"""

import argparse
import sys
from collections.abc import Sequence

from pdkit.checks.accuracy import client
from pdkit.checks.accuracy.gsm8k import gsm8k_args
from pdkit.core.errors import ExitCode
from pdkit.core.gsm8k import read_dataset
from pdkit.core.stats import exact_interval, mcnemar
from pdkit.deployment.external import ask


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("urls", nargs=2, metavar="URL", help="a server, and another one of the same model")
    parser.add_argument("--data", required=True, help="GSM8K questions, lines of JSON")
    parser.add_argument("--examples", type=int, help="how many (default: all)")
    parser.add_argument("--in-flight", type=int, default=32, help="questions at a time (%(default)s)")
    args = parser.parse_args(argv)
    count = min(args.examples or 10**9, len(read_dataset(args.data).rows))
    outcomes = []
    for url in args.urls:
        asked = gsm8k_args(url, ask(url).names[0], args.data, count, num_shots=5, timeout=300)
        asked.num_threads = args.in_flight
        outcomes.append(client.run(asked)["outcomes"])
        print(f"{url}: {sum(outcomes[-1])} of {count} right", flush=True)
    pairs = mcnemar(*outcomes)
    flips = pairs.lost + pairs.gained
    _, largest = exact_interval(flips, count, 0.90)  # its upper limit is one-sided 95 %
    print(f"flips: {flips} of {count} ({pairs.lost} and {pairs.gained}), a rate of at most {largest:.3%} (95 %)")
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(main())
