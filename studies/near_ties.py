#!/usr/bin/env python3
"""How many requests each fault needs until it is seen, with ordinary prompts and with near ties.

Result: docs/decisions/requests-needed.md.

Faults of the transfer are tried in this process, on the embedded engine (some minutes on one core): each prompt with and
without the fault, decode forced along the tokens of the sound run. Orders of the same kind of prompts:

  ordinary   random prompts of today's lengths (parity alone), each length in turn, shortest first
  near ties  of four times as many, those whose two likeliest tokens after the KV transfer are closest; longest first

Of each, several draws: median / worst; "-" stands for a fault that none of them shows. From the repository root:

    scripts/env.sh python3 studies/near_ties.py
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from pdkit.core.console import columns
from pdkit.core.errors import ExitCode
from pdkit.core.paths import ASSETS
from pdkit.engine import state
from pdkit.engine.model_runner import ModelRunner
from pdkit.faults import ground_truth
from pdkit.faults.fault import Fault
from pdkit.faults.ground_truth import Effect, Sound
from pdkit.faults.library import LIBRARY
from pdkit.models.cpu.model import load_model
from requests_needed import NEVER, shown

LENGTHS = (1, 3, 5, 33, 64, 96, 127, 129, 142, 200, 255, 257, 301, 391)
POOL = 4  # near ties are chosen among so many times the prompts


@dataclass(frozen=True)
class Draw:
    """Requests until a fault is seen; NEVER where no request of the draw shows it."""

    tokens: int
    logprobs: int


def first(effects: Sequence[Effect], by_logprobs: bool) -> int:
    for number, effect in enumerate(effects, start=1):
        seen = effect.status or effect.reported and by_logprobs or effect.token is not None
        if seen or by_logprobs and effect.logits is not None:
            return number
    return NEVER


def margin(runner: ModelRunner, ids: Sequence[int]) -> float:
    """Distance of the two likeliest tokens after `ids` and one more, in nats; prefill's, which repeats decode's."""

    def prefilled(tokens: Sequence[int]) -> torch.Tensor:
        cache = state.new_cache(runner.config)
        while cache.get_seq_length() < len(tokens):
            logits = runner.prefill_step(tokens, cache, len(tokens) - 1)
        return logits[-1]

    top = prefilled([*ids, int(prefilled(ids).argmax())]).log_softmax(-1).topk(2).values
    return float(top[0] - top[1])


def prompts_of(runner: ModelRunner, seed: int) -> list[list[int]]:
    return ground_truth.prompt_family(LENGTHS, runner.config.vocab_size, seed)


def ordinary(runner: ModelRunner, seed: int) -> list[Sound]:
    return ground_truth.sound_runs(runner, prompts_of(runner, seed))


def near_ties(runner: ModelRunner, seed: int) -> list[Sound]:
    """As many prompts of the same lengths; chosen without a look at any fault."""
    pools = [prompts_of(runner, 1000 + POOL * seed + turn) for turn in range(POOL)]
    chosen = [min(same, key=lambda ids: margin(runner, ids)) for same in zip(*pools, strict=True)]
    return ground_truth.sound_runs(runner, chosen[::-1])


def draws_of(runner: ModelRunner, faults: Sequence[Fault], runs: Sequence[Sound]) -> dict[str, Draw]:
    found = ground_truth.effects(runner, faults, runs)
    return {name: Draw(first(each, False), first(each, True)) for name, each in found.items()}


def cell(numbers: Sequence[int]) -> str:
    """Median and worst."""
    return shown((median(numbers), max(numbers)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=3, help="orders of each kind (%(default)s)")
    parser.add_argument("--faults", help="names, separated by commas (default: all of the transfer that do harm)")
    args = parser.parse_args(argv)
    names = args.faults.split(",") if args.faults else [
        name for name, fault in LIBRARY.items() if fault.is_of_the_transfer and not fault.asks and not fault.harmless
    ]  # fmt: skip
    torch.set_num_threads(1)
    faults = [replace(LIBRARY[name], after=0) for name in names]
    models = {
        "trained": load_model(ASSETS / "nano-dsv4", load_format="auto", seed=0),
        "random": load_model(ASSETS / "random-dsv4", load_format="dummy", seed=1),
    }
    found: dict[str, dict[str, list[int]]] = {name: {} for name in names}
    for label, model in models.items():
        runner = ModelRunner(model)
        for kind, prompts in (("ordinary", ordinary), ("near ties", near_ties)):
            for seed in range(args.draws):
                for name, draw in draws_of(runner, faults, prompts(runner, seed)).items():
                    found[name].setdefault(f"{label}, tokens, {kind}", []).append(draw.tokens)
                    found[name].setdefault(f"{label}, logprobs, {kind}", []).append(draw.logprobs)
            print(f"{label}, {kind}: done", file=sys.stderr, flush=True)
    kinds = sorted(next(iter(found.values())))
    rows = [["fault", *kinds], *([name, *(cell(each[kind]) for kind in kinds)] for name, each in found.items())]
    every = {kind: [number for each in found.values() for number in each[kind]] for kind in kinds}
    seen = {kind: [number for number in numbers if number < NEVER] for kind, numbers in every.items()}
    rows.append(["all: median / worst of those seen", *(cell(seen[kind]) for kind in kinds)])
    rows.append(["all: not seen", *(f"{len(every[kind]) - len(seen[kind])} of {len(every[kind])}" for kind in kinds)])
    print(columns(rows))
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(main())
