"""Families of faults that a library of single cases misses: each a kind, with a parameter that says from where on."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from pdkit.engine.transfer import KVTransfer
from pdkit.faults import pieces
from pdkit.faults.fault import (
    Change,
    Context,
    Fault,
    Where,
    newest_tokens,
    on_tensors,
    overlaid_kinds,
    same_beginning,
)
from pdkit.faults.pieces import COMPRESSED, Kind

AGES = (20, 150, 400)  # requests
SILENT_AFTER = (5, 60)  # requests
KEPT = (64 << 10, 1 << 20)  # bytes of each request
KEPT_OF_ABORTED = 256 << 10, 1 << 20  # one request in eight is aborted while it decodes
TRUNCATED_FROM = (1500, 3000)  # tokens
OWN_WORK_FROM = (1, 120, 500)  # tokens
SEAM = (1, 2, 3)  # output tokens
STREAMS = (20, 100)  # one in so many
RETRIED = (10, 33)  # one request in so many
RACES_S = (0.05, 0.5)
SAMPLES_LATE_AT = (4, 16)  # transfers in flight
ABORTED = (1, 40)  # transfers


def _of_age() -> Iterator[Fault]:
    for after in AGES:
        yield Fault(
            f"newest-1-lost-after-{after}",
            f"the last token of the prompt: zeros in all its state, from the request after number {after} on",
            Where.DECODE,
            newest_tokens(1, pieces.newest_lost),
            after=after,
            says=r"equal to the monolithic server's until request \d+",
            resembles="a counter or a pool that wraps around",
        )


def _of_silence() -> Iterator[Fault]:
    for side, says in (("decode", "answers no request|fetches nothing"), ("prefill", "answers no request")):
        for after in SILENT_AFTER:
            yield Fault(
                f"{side}-silent-after-{after}",
                f"{side} computes nothing any more after {after} requests, and is healthy",
                Where.SERVER,
                server=f"{side}-silent",
                after=after,
                says=f"{side} ({says})",
                resembles="a scheduler whose loop waits for ever beside a live HTTP process",
            )


def _of_memory() -> Iterator[Fault]:
    for size in KEPT:
        yield Fault(
            f"memory-kept-{size >> 10}-kib",
            f"decode keeps {size >> 10} KiB of each request",
            Where.SERVER,
            server="memory-kept",
            size=size,
            says=r"memory of decode grows by \d+ KiB a request",
        )
    for size in KEPT_OF_ABORTED:
        yield Fault(
            f"aborted-kept-{size >> 10}-kib",
            f"decode keeps {size >> 10} KiB of each request that is aborted while it answers it",
            Where.SERVER,
            server="aborted-kept",
            size=size,
            says=r"memory of decode grows by \d+ KiB a request",
            resembles="SGLang 18701, 21652",
        )
    yield Fault(
        "state-of-failed-rooms-kept",
        "prefill keeps the state of each room that failed",
        Where.SERVER,
        server="failed-rooms-kept",
        says=r"memory of prefill grows by \d+ KiB a request",
    )


def without_newest_beyond(tokens: int) -> Change:
    """Compressed entries of all tokens behind the first `tokens` are zeros."""

    def change(kv_transfer: KVTransfer, context: Context) -> KVTransfer:
        names = kv_transfer.tensors

        def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
            kind = pieces.kind_of(name, names)
            kept = tokens // kind.ratio
            if kind not in COMPRESSED or tensor.shape[-2] <= kept:
                return tensor
            return pieces.newest_lost(tensor, tensor.shape[-2] - kept)

        return replace(kv_transfer, tensors={name: changed(name, tensor) for name, tensor in names.items()})

    return change


def _of_length() -> Iterator[Fault]:
    for tokens in TRUNCATED_FROM:
        yield Fault(
            f"beyond-{tokens}-lost",
            f"compressed entries of what stands behind the first {tokens} tokens are never written",
            Where.DECODE,
            without_newest_beyond(tokens),
            only_served=True,
            says=r"length: prompts up to \d+ of \d+ tokens",
            resembles="a transfer in chunks whose last ones are forgotten",
        )


def _of_work() -> Iterator[Fault]:
    for tokens in OWN_WORK_FROM:
        yield Fault(
            f"decode-computes-from-{tokens}",
            f"decode computes prompts of {tokens} tokens and more itself, and does not count it",
            Where.SERVER,
            server="decode-computes",
            size=tokens,
            says=r"decode did the work itself: prompts of [\d, ]+ tokens",
        )
    yield Fault(
        "failed-receive-answered",
        "decode answers a request whose transfer failed with 200 and an empty text",
        Where.SERVER,
        server="failed-receive-answered",
        says="a failed receive is answered",
    )


def _of_answers() -> Iterator[Fault]:
    for name, what, says in (
        ("usage-one-more", "the count of output tokens is one too high", "completion_tokens is"),
        ("cached-beyond-prompt", "more prompt tokens are said to be cached than the prompt has", "cached_tokens is"),
        ("reason-exchanged", "the finish reasons length and stop change places", ""),
        ("token-after-the-end", "one more token comes after the last one", "output_ids"),
        ("logprobs-one-less", "the last token has no logprob", "logprobs"),
    ):
        for every in (1, 20):
            suffix = "" if every == 1 else "-5-percent"
            yield Fault(
                f"{name}{suffix}",
                f"{what}, in one answer of {every}",
                Where.LB,
                balancer=name,
                every=every,
                says=f"contradict themselves.*{says}" if says else "contradict themselves|finish",
            )


def _of_the_seam() -> Iterator[Fault]:
    for place in SEAM:
        yield Fault(
            f"stop-ignored-at-{place}",
            f"decode does not look whether output token {place} ends the answer",
            Where.SERVER,
            server="stop-ignored",
            size=place,
            says="the seam.*at token",
        )


def _of_streams() -> Iterator[Fault]:
    for every in STREAMS:
        yield Fault(
            f"stream-piece-lost-one-in-{every}",
            f"one stream of {every} lacks a piece",
            Where.LB,
            balancer="stream-piece-lost",
            every=every,
            says=r"streams: FAIL, \d+ of \d+ do not equal",
        )


def _aliased_within(seconds: float) -> Change:
    """Compressed entries of another request with the same beginning that passed here up to `seconds` before."""

    def change(kv_transfer: KVTransfer, context: Context) -> KVTransfer:
        now = time.monotonic()
        vars(kv_transfer)["passed"] = now
        recent = [each for each in context.earlier if now - vars(each)["passed"] < seconds]
        other = same_beginning(kv_transfer, recent)
        if other is None:
            return kv_transfer
        changed = overlaid_kinds(frozenset({Kind.C4_COMPRESSED, Kind.C128_COMPRESSED}), other, kv_transfer)
        vars(changed)["passed"] = now
        return changed

    return change


def _of_races() -> Iterator[Fault]:
    for seconds in RACES_S:
        yield Fault(
            f"aliased-within-{seconds * 1000:.0f}-ms",
            f"requests that share a prefix and pass within {seconds:g} s share the slots of compressed entries",
            Where.PREFILL,
            _aliased_within(seconds),
            only_served=True,
            says="races: shared prefixes in flight",
            resembles="SGLang 35494",
        )


def _of_aborts() -> Iterator[Fault]:
    for aborts in ABORTED:
        yield Fault(
            f"entries-shifted-after-{aborts}-aborts",
            f"after {aborts} aborted transfer(s) the 4x compressed entries of others are read one slot late",
            Where.SERVER,
            on_tensors({Kind.C4_COMPRESSED}, pieces.shifted),
            server="entries-shifted",
            after=aborts - 1,
            says="races: pages of aborted requests",
            resembles="SGLang 24527, 31471",
        )


def _of_samples() -> Iterator[Fault]:
    for transfers in SAMPLES_LATE_AT:
        yield Fault(
            f"samples-late-at-{transfers}",
            f"with n > 1 the later samples never start where {transfers} transfers are awaited",
            Where.SERVER,
            server="samples-late",
            size=transfers,
            says="races: parallel samples in flight|answers no request|fetches nothing",
            resembles="SGLang 26486, Dynamo 14098",
        )


def _of_crossed_parameters() -> Iterator[Fault]:
    for lost, beside in (("top-p", "logprobs"), ("stop", "seed"), ("temperature", "stop"), ("seed", "top-k")):
        yield Fault(
            f"{lost}-lost-with-{beside}",
            f"decode gets no {lost.replace('-', '_')} where {beside.replace('-', '_')} is asked for, too",
            Where.LB,
            balancer=f"{lost}-lost-with-{beside}",
            says="request parameters in pairs",
        )


def _of_latency() -> Iterator[Fault]:
    for every in RETRIED:
        yield Fault(
            f"retried-one-in-{every}",
            f"one request of {every} is served twice, one after the other, and the second answer is given",
            Where.LB,
            balancer="request-retried",
            every=every,
            says="latency has a second mode|served more than once in secret",
        )


def _of_the_load_balancer() -> Iterator[Fault]:
    for every in (1, 3):
        suffix = "" if every == 1 else f"-one-in-{every}"
        yield Fault(
            f"failed-retried{suffix}",
            f"one request of {every} that failed is sent to both servers once more",
            Where.LB,
            balancer="failed-retried",
            every=every,
            says="started again in secret",
        )


FAMILIES: Mapping[str, tuple[Callable[[], Iterator[Fault]], tuple[str, ...]]] = {
    "age": (_of_age, ("test_answers_stay_equal",)),
    "silence": (_of_silence, ("test_answers_stay_equal",)),
    "memory": (_of_memory, ("test_memory_does_not_grow",)),
    "length": (_of_length, ("test_parity_up_to_the_context_limit",)),
    "answers": (_of_answers, ("test_ends_at_every_token", "test_parity_crossed_parameters")),
    "seam": (_of_the_seam, ("test_ends_at_every_token",)),
    "streams": (_of_streams, ("test_short_streams_equal_whole_answers",)),
    "latency": (_of_latency, ("test_no_second_mode_of_latency",)),
    "load_balancer": (_of_the_load_balancer, ("test_corrupted_handover_is_rejected",)),
    "races": (_of_races, ("test_shared_prefix_in_flight",)),
    "aborts": (_of_aborts, ("test_pages_of_aborted_requests",)),
    "samples": (_of_samples, ("test_parallel_samples_in_flight",)),
    "crossed_parameters": (_of_crossed_parameters, ("test_parity_crossed_parameters",)),
    "work": (_of_work, ("test_answers_need_their_transfer", "test_decode_answers_no_failed_receive")),
}
"""The families by name, and the tests that are about each."""


def families(*names: str) -> Iterator[Fault]:
    """The faults of those that are named, of all unless some are."""
    for name in names or FAMILIES:
        family, tests = FAMILIES[name]
        yield from (replace(fault, asks=tests) for fault in family())
