#!/usr/bin/env python3
"""How often two sound servers differ in being right: the flip rate that the paired gate must be told.

Results: docs/decisions/paired-gate.md.

Scores the same questions on a pair and on a monolithic server, and prints how many are right on one of them only; then on the
monolithic server once more, for how often it differs from itself. From the repository root:

    scripts/env.sh python3 studies/flip_rate.py --target embedded                       # it starts the servers
    scripts/env.sh python3 studies/flip_rate.py http://127.0.0.1:8000 http://127.0.0.1:8001 --data questions.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import served as servers
from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode


@contextmanager
def served(target: str) -> Iterator[tuple[str, str, str]]:
    """(load balancer, monolithic server, data set) of servers with a trained model."""
    with servers.served(servers.three(target)) as pair:
        yield pair.lb_url, pair.monolithic_url, pair.gsm8k_data_path


def outcomes(url: str, data: str, count: int, in_flight: int) -> tuple[bool, ...]:
    """Which of the first `count` questions the server gets right. Raises RequestFailed."""
    from pdkit.checks.accuracy import client
    from pdkit.checks.accuracy.gsm8k import gsm8k_args
    from pdkit.deployment.external import ask

    asked = gsm8k_args(url, ask(url).names[0], data, count, num_shots=5, timeout=300)
    asked.num_threads = in_flight
    return client.run(asked)["outcomes"]


def compared(urls: Sequence[str], data: str, examples: int | None, in_flight: int) -> None:
    """Asks all, and prints lost and gained pairs of the first server with each of the others. Raises RequestFailed."""
    from pdkit.core.gsm8k import read_dataset
    from pdkit.core.stats import exact_interval, sign_test

    count = min(examples or 10**9, len(read_dataset(data).rows))
    found = []
    for url in urls:
        found.append(outcomes(url, data, count, in_flight))
        print(f"{url}: {sum(found[-1])} of {count} right", flush=True)
    for what, first, second in (("pair and monolithic", 0, 1), ("monolithic, asked twice", 1, 2)):
        pairs = sign_test(found[first], found[second])
        flips = pairs.larger + pairs.smaller
        _, largest = exact_interval(flips, count, 0.90)  # its upper limit is one-sided 95 %
        print(
            f"{what}: {flips} flips of {count} ({pairs.larger} and {pairs.smaller}), at most {largest:.3%} (95 %)",
            flush=True,
        )


def main(argv: Sequence[str]) -> ExitCode:
    """Raises RequestFailed where a question got no answer."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("urls", nargs="*", metavar="URL", help="a server, and another one of the same model")
    parser.add_argument("--target", choices=servers.TARGETS, help="start servers of this target, and ask those")
    parser.add_argument("--data", help="GSM8K questions, lines of JSON; a target has its own")
    parser.add_argument("--examples", type=int, help="how many (default: all)")
    parser.add_argument("--in-flight", type=int, default=32, help="questions at a time (%(default)s)")
    args = parser.parse_args(argv)
    if args.target and not args.urls and not args.data:
        with served(args.target) as (pair, monolithic, data):
            compared((pair, monolithic, monolithic), data, args.examples, args.in_flight)
    elif len(args.urls) == 2 and args.data and not args.target:
        compared((*args.urls, args.urls[1]), args.data, args.examples, args.in_flight)
    else:
        parser.error("give --target, or two URLs and --data")
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("flip_rate.py", main, sys.argv[1:]))
