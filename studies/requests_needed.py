#!/usr/bin/env python3
"""How many requests each fault of the library needs until it is seen, by what is compared.

Result: docs/decisions/requests-needed.md.

It reads docs/detection-matrix.md, which holds for each fault of the transfer whether the accuracy gate saw it and in how many
of 12 prompts a status, a token or a logit changed, on the trained and on the random model. From so many of 12 the median and
the worst number of requests follow, if the prompts come in any order; "-" stands for a fault that none of them shows. From
the repository root:

    scripts/env.sh python3 studies/requests_needed.py
"""

import argparse
import re
import sys
from collections.abc import Sequence
from math import comb
from pathlib import Path
from statistics import median

from pdkit.core.console import columns
from pdkit.core.errors import ExitCode
from pdkit.faults.library import LIBRARY
from pdkit.faults.matrix.truth import PROMPTS_PER_FAULT

MATRIX = Path(__file__).resolve().parents[1] / "docs" / "detection-matrix.md"
FIRST_LOOK = 200  # examples of the accuracy gate's first look, the fewest that it fails on
NEVER = 10**6


def until_first(seen: int, prompts: int) -> tuple[int, int]:
    """(median, worst) place of the first of `seen` among `prompts` in any order; NEVER where there is none."""
    if not seen:
        return NEVER, NEVER
    later = (comb(prompts - place, seen) / comb(prompts, seen) for place in range(1, prompts + 1))
    return next(place for place, share in enumerate(later, start=1) if share <= 0.5), prompts - seen + 1


def recorded_table(text: str) -> list[list[str]]:
    """Of each fault of the transfer in a detection matrix: requests until seen, median / worst."""
    gate = dict(re.findall(r"(?m)^\| ([\w-]+) \| (\S) \|", text))
    models = ("trained", "random")
    kinds = ["GSM8K gate", *(f"{model}, {what}" for model in models for what in ("tokens", "logprobs"))]
    rows, numbers = [], {column: [] for column in kinds}
    for name, effect in re.findall(r"(?m)^- \*\*([\w-]+)\*\*: .*effect: (trained, .*)$", text):
        cells = {"GSM8K gate": (FIRST_LOOK,) * 2 if gate.get(name) == "●" else (NEVER,) * 2}
        for model in models:
            found = re.search(rf"{model}, (\d+) prompts: ([^;]*)", effect)
            counts = {what: int(count) for what, count in re.findall(r"([a-z][a-z ]*?) of (\d+)", found[2])}
            prompts, status = int(found[1]), counts.get("status", 0)
            seen = {"tokens": max(status, counts.get("tokens", 0))}
            seen["logprobs"] = max(seen["tokens"], counts.get("logits", 0), counts.get("first token or logprob", 0))
            cells |= {f"{model}, {what}": until_first(seen[what], prompts) for what in seen}
        fault = LIBRARY[name]
        if cells["random, logprobs"][0] >= NEVER or fault.every > PROMPTS_PER_FAULT or fault.after:
            continue  # it changes nothing, was tried more often than it is met, or begins later
        rows.append([name, *(shown(*cells[column]) for column in kinds)])
        for column in kinds:
            numbers[column].append(cells[column])
    seen = {column: [each for each in pairs if each[0] < NEVER] for column, pairs in numbers.items()}
    middle = [f"{median(m for m, _ in seen[c]):g} / {max(w for _, w in seen[c])}" for c in kinds]
    return [
        ["fault", *kinds],
        *rows,
        ["**all that are seen**", *middle],
        ["**not seen**", *(f"{len(rows) - len(seen[column])} of {len(rows)}" for column in kinds)],
    ]


def shown(middle: float, worst: float) -> str:
    return " / ".join("-" if number >= NEVER else f"{number:g}" for number in (middle, worst))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args(argv)
    rows = recorded_table(MATRIX.read_text(encoding="utf-8"))
    if args.markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        print("\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]))
    else:
        print(columns(rows))
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(main())
