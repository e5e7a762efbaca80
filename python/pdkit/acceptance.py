"""Acceptance length of speculative decoding: measured, compared with a reference, asserted.

The acceptance length is the number of tokens that one verification step of the target model yields, the bonus token
included: between 1 (no draft token is ever accepted) and `speculative_num_draft_tokens`. Draft state that is lost on
the way to decode leaves every answer right and only lowers this number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import requests


class AcceptanceError(RuntimeError):
    """An engine that speculates gave no acceptance length, or a server could not be asked; one line says which."""


@dataclass(frozen=True)
class NotApplicable:
    """Nothing was checked, because there is nothing to check; a test reports this as skipped, never as passed."""

    reason: str

    def report(self) -> str:
        return f"acceptance length not checked: {self.reason}"


@dataclass(frozen=True)
class Acceptance:
    """Tokens per verification step, of each data-parallel rank or of all requests together."""

    algorithm: str
    source: str
    lengths: tuple[float, ...]

    def __post_init__(self):
        assert self.lengths, self

    @property
    def lowest(self) -> float:
        return min(self.lengths)


def _decode_servers(info: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    # The mini LB nests what its workers say; prefill never verifies a draft.
    return info.get("decode") or [info]


def speculative_algorithm(info: Mapping[str, Any]) -> str | None:
    """Name of the speculative algorithm, or None, in what a server or the mini LB answers to `/server_info`."""
    names = {server.get("speculative_algorithm") for server in _decode_servers(info)}
    return "+".join(sorted(name for name in names if name)) or None


def from_server_info(info: Mapping[str, Any]) -> Acceptance | NotApplicable:
    """`avg_spec_accept_length` of each rank that has one, since the server started or its cache was flushed.

    SGLang adds to this average when it logs a decode batch, every 40 steps by default, so that a rank may have none
    yet. Raises AcceptanceError if no rank of an engine that speculates has one.
    """
    algorithm = speculative_algorithm(info)
    if algorithm is None:
        return NotApplicable("the decode server does not speculate (speculative_algorithm is not set)")
    states = [state for server in _decode_servers(info) for state in server.get("internal_states", ())]
    lengths = tuple(state["avg_spec_accept_length"] for state in states if state.get("avg_spec_accept_length"))
    if not lengths:
        raise AcceptanceError(
            f"the engine speculates ({algorithm}), but none of its {len(states)} ranks reports avg_spec_accept_length; "
            "send it more requests first"
        )
    return Acceptance(algorithm, "/server_info, per rank", lengths)


def from_meta_info(algorithm: str | None, metas: Sequence[Mapping[str, Any]]) -> Acceptance | NotApplicable:
    """Tokens per verification step over all requests, from `completion_tokens` and `spec_verify_ct` of their meta_info.

    Pooled, so that long answers count for more; a mean of `spec_accept_length` would not. Raises AcceptanceError if
    `algorithm` speculates, but no request shows a verification step.
    """
    if algorithm is None:
        return NotApplicable("the decode server does not speculate (speculative_algorithm is not set)")
    verified = [meta for meta in metas if meta.get("spec_verify_ct")]
    if not verified:
        raise AcceptanceError(
            f"the engine speculates ({algorithm}), but none of {len(metas)} requests reports a verification step"
        )
    tokens = sum(meta["completion_tokens"] for meta in verified)
    steps = sum(meta["spec_verify_ct"] for meta in verified)
    return Acceptance(algorithm, f"meta_info of {len(verified)} requests, {steps} steps", (tokens / steps,))


def read_server_info(url: str, timeout: float = 30) -> Mapping[str, Any]:
    """`/server_info` of a server, or `/get_server_info` where that is the only name (the mini LB). AcceptanceError."""
    try:
        answer = requests.get(f"{url}/server_info", timeout=timeout)
        if answer.status_code == 404:
            answer = requests.get(f"{url}/get_server_info", timeout=timeout)
        answer.raise_for_status()
        return answer.json()
    except requests.RequestException as error:
        raise AcceptanceError(f"{url} does not say whether it speculates: {error}") from None


def generate(url: str, prompts: Sequence[str], max_new_tokens: int, timeout: float = 600) -> list[Mapping[str, Any]]:
    """meta_info of greedy answers to `prompts`, sent as one batch. Raises AcceptanceError."""
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens}
    try:
        answer = requests.post(
            f"{url}/generate", json={"text": list(prompts), "sampling_params": sampling}, timeout=timeout
        )
        answer.raise_for_status()
        return [one["meta_info"] for one in answer.json()]
    except (requests.RequestException, KeyError, TypeError) as error:
        raise AcceptanceError(f"{url} did not answer {len(prompts)} prompts: {error!r}") from None


def measure(url: str, decode_url: str, prompts: Sequence[str], max_new_tokens: int = 256) -> Acceptance | NotApplicable:
    """Acceptance length of `prompts` sent to `url` (the LB), if the server at `decode_url` speculates."""
    algorithm = speculative_algorithm(read_server_info(decode_url))
    return from_meta_info(algorithm, generate(url, prompts, max_new_tokens) if algorithm else ())


@dataclass(frozen=True)
class AcceptanceGate:
    """The lowest measured length must reach `minimum_ratio` of `reference`."""

    measured: Acceptance
    reference: float | None
    minimum_ratio: float = 0.95

    def __post_init__(self):
        if self.reference is None:
            raise ValueError(
                f"the engine speculates ({self.measured.algorithm}) with acceptance length {self.measured.lowest:.4f}, "
                "but there is no reference to compare with; set one"
            )
        if not self.reference >= 1 or not 0 < self.minimum_ratio <= 1:
            raise ValueError(
                f"need a reference of at least 1 and a ratio in (0, 1], got {self.reference} and {self.minimum_ratio}"
            )

    @property
    def minimum(self) -> float:
        return self.reference * self.minimum_ratio

    @property
    def passed(self) -> bool:
        return self.measured.lowest >= self.minimum

    def report(self) -> str:
        """Measured, reference and threshold in one line."""
        lengths = ", ".join(f"{length:.4f}" for length in self.measured.lengths)
        return (
            f"acceptance length: {'PASS' if self.passed else 'FAIL'}, {lengths} ({self.measured.source}; "
            f"{self.measured.algorithm}), needs {self.minimum:.4f} = {self.minimum_ratio:g} x {self.reference:g}; "
            f"ratio {self.measured.lowest / self.reference:.4f}"
        )

    def assert_passed(self) -> None:
        """Raises AssertionError, whose message is the report, unless the lowest length reaches the minimum."""
        if not self.passed:
            raise AssertionError(self.report())
