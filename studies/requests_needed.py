#!/usr/bin/env python3
"""How many requests each fault of the library needs until it is seen, by what is compared.

Result: docs/decisions/requests-needed.md.

It reads docs/detection-matrix.md, which holds for each fault of the transfer whether the accuracy gate saw it and in how many
of 12 prompts a status, a token or a logit changed, on the trained and on the random model. From so many of 12 the median and
the worst number of requests follow, if the prompts come in any order; "-" stands for a fault that none of them shows. Of
SGLang's own engine on CPU the same counts are in docs/results, as studies/sglang_cpu_faults.py took them. From the repository
root:

    scripts/env.sh python3 studies/requests_needed.py
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

from pdkit.core.console import columns
from pdkit.core.errors import ExitCode
from pdkit.faults.library import LIBRARY
from pdkit.faults.matrix.truth import PROMPTS_PER_FAULT

MATRIX = Path(__file__).resolve().parents[1] / "docs" / "detection-matrix.md"
SGLANG_CPU = MATRIX.with_name("results") / "sglang-cpu-faults-0.5.23.json"
FIRST_LOOK = 200  # examples of the accuracy gate's first look, the fewest that it fails on
NEVER = 10**6


def until_first(seen: int, prompts: int) -> tuple[int, int]:
    """(median, worst) place of the first of `seen` among `prompts` in any order; NEVER where there is none."""
    if not seen:
        return NEVER, NEVER
    later = (comb(prompts - place, seen) / comb(prompts, seen) for place in range(1, prompts + 1))
    return next(place for place, share in enumerate(later, start=1) if share <= 0.5), prompts - seen + 1


MODELS = ("trained", "random")
KINDS = ("GSM8K gate", *(f"{model}, {what}" for model in MODELS for what in ("tokens", "logprobs")))

Cells = dict[str, tuple[int, int]]  # by kind: (median, worst)


def gate_cell(sees: bool) -> tuple[int, int]:
    return (FIRST_LOOK,) * 2 if sees else (NEVER,) * 2


def table(found: Mapping[str, Cells]) -> list[list[str]]:
    """A row for each fault, with the median and the worst of all that are seen below; kinds that nothing was asked of are left out."""
    kinds = [kind for kind in KINDS if any(kind in cells for cells in found.values())]
    rows = [[name, *(shown(cells.get(kind)) for kind in kinds)] for name, cells in found.items()]
    numbers = {kind: [cells[kind] for cells in found.values() if kind in cells] for kind in kinds}
    seen = {kind: [each for each in pairs if each[0] < NEVER] for kind, pairs in numbers.items()}
    middle = [shown((median(m for m, _ in each), max(w for _, w in each)) if each else (NEVER,) * 2)
              for each in seen.values()]  # fmt: skip
    return [
        ["fault", *kinds],
        *rows,
        ["**all that are seen**", *middle],
        ["**not seen**", *(f"{len(numbers[kind]) - len(each)} of {len(numbers[kind])}" for kind, each in seen.items())],
    ]


def recorded_table(text: str) -> list[list[str]]:
    """Of each fault of the transfer in a detection matrix: requests until seen, median / worst."""
    gate = dict(re.findall(r"(?m)^\| ([\w-]+) \| (\S) \|", text))
    found: dict[str, Cells] = {}
    for name, effect in re.findall(r"(?m)^- \*\*([\w-]+)\*\*: .*effect: (trained, .*)$", text):
        cells = {KINDS[0]: gate_cell(gate.get(name) == "●")}
        for model in MODELS:
            match = re.search(rf"{model}, (\d+) prompts: ([^;]*)", effect)
            counts = {what: int(count) for what, count in re.findall(r"([a-z][a-z ]*?) of (\d+)", match[2])}
            prompts, status = int(match[1]), counts.get("status", 0)
            seen = {"tokens": max(status, counts.get("tokens", 0))}
            seen["logprobs"] = max(seen["tokens"], counts.get("logits", 0), counts.get("first token or logprob", 0))
            cells |= {f"{model}, {what}": until_first(seen[what], prompts) for what in seen}
        fault = LIBRARY[name]
        if cells["random, logprobs"][0] >= NEVER or fault.every > PROMPTS_PER_FAULT or fault.after:
            continue  # it changes nothing, was tried more often than it is met, or begins later
        found[name] = cells
    return table(found)


def sglang_cpu_table(recorded: Mapping[str, Any]) -> list[list[str]]:
    """The same of what studies/sglang_cpu_faults.py counted. ValueError where answers differed without a fault."""
    if any(recorded["none"][model]["logprobs"] for model in MODELS) or recorded["none"]["gate"]["sees"]:
        raise ValueError(f"seen without a fault: {recorded['none']}")
    found: dict[str, Cells] = {}
    for name, each in recorded.items():
        if name == "none":
            continue
        met = [model for model in MODELS if each[model]["met"]]
        cells = {KINDS[0]: gate_cell(each["gate"]["sees"])} if "trained" in met else {}
        for model in met:
            for what in ("tokens", "logprobs"):
                cells[f"{model}, {what}"] = until_first(each[model][what], each[model]["prompts"])
        found[name] = cells
    return table(found)


def shown(cell: tuple[float, float] | None) -> str:
    """Median and worst; "not met" of None."""
    return "not met" if cell is None else " / ".join("-" if number >= NEVER else f"{number:g}" for number in cell)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args(argv)
    recorded = json.loads(SGLANG_CPU.read_text(encoding="utf-8"))
    embedded = recorded_table(MATRIX.read_text(encoding="utf-8"))
    for target, rows in (("embedded", embedded), ("sglang-cpu", sglang_cpu_table(recorded))):
        if args.markdown:
            lines = [f"| {' | '.join(row)} |" for row in rows]
            print(f"{target}\n", lines[0], "|" + " --- |" * len(rows[0]), *lines[1:], "", sep="\n")
        else:
            print(f"{target}\n{columns(rows)}\n")
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(main())
