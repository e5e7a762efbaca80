"""Request parameters in pairs: what is lost only where two of them meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

from pdkit.checks.parity.checks import ParityArms
from pdkit.checks.parity.plan import Probe, Round, generate_probe

Row = tuple[int, ...]


def covering_rows(sizes: Sequence[int]) -> list[Row]:
    """Rows of one level per factor in which each pair of levels of two factors occurs; greedy, so nearly the fewest.

    sizes: how many levels each factor has. The first row is all zeros.
    """
    missing = {
        (one, a, other, b)
        for one, other in combinations(range(len(sizes)), 2)
        for a, b in product(range(sizes[one]), range(sizes[other]))
    }

    def news(row: Row) -> set[tuple[int, int, int, int]]:
        return {(one, row[one], other, row[other]) for one, other in combinations(range(len(row)), 2)} & missing

    rows: list[Row] = []
    candidates = list(product(*map(range, sizes)))
    while missing:
        best = candidates[0] if not rows else max(candidates, key=lambda row: len(news(row)))
        missing -= news(best)
        rows.append(best)
    return rows


_HOT = {"temperature": 1.0, "sampling_seed": 1}
SAMPLING: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "sampling": (  # one factor: top_p and top_k do nothing where the most likely token is taken
        {"temperature": 0},
        _HOT,
        {"temperature": 0.7, "sampling_seed": 2},
        {**_HOT, "top_p": 0.5},
        {**_HOT, "top_k": 5},
        {**_HOT, "top_p": 0.8, "top_k": 20},
    ),
    "stop": ({}, {"stop": list("eaxi")}, {"stop_token_ids": [300], "ignore_eos": False}),
    "limit": ({}, {"max_new_tokens": 2}),
}  # fmt: skip
BODY: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "logprobs": ({"return_logprob": False, "top_logprobs_num": 0}, {}),
    "stream": ({}, {"stream": True}),
}
"""Levels of each factor: sampling parameters, and what stands beside them in the body of /generate."""


def crossed_probes(ids: Sequence[int], tokens: int) -> tuple[Probe, ...]:
    """One probe per covering row, but for streams with logprobs, of which `Answer` compares the text alone."""
    factors = {**SAMPLING, **BODY}
    probes: list[Probe] = []
    for row in covering_rows([len(levels) for levels in factors.values()]):
        sampling: dict[str, Any] = {}
        body: dict[str, Any] = {}
        for (name, levels), level in zip(factors.items(), row):
            (body if name in BODY else sampling).update(levels[level])
        label = " ".join(f"{name}={level}" for name, level in zip(factors, row) if level)
        probes.append(generate_probe(f"crossed {label or 'plain'}", ids, tokens, body, **sampling))
    return tuple(probes)


class CrossedParameterChecks(ParityArms):
    """Put it before the servers; for engines that repeat themselves to the bit and take seeds."""

    crossed_length = 40
    crossed_tokens = 10

    def test_parity_crossed_parameters(self) -> None:
        ids = [17 + (index * 13) % 220 for index in range(self.crossed_length)]
        probes = crossed_probes(ids, self.crossed_tokens)
        self.check_parity([Round(f"request parameters in pairs, {len(probes)} requests", probes)])
