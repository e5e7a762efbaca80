"""Families of faults that a library of single cases misses: each a kind, with a parameter that says from where on."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from pdkit.engine.transfer import KVTransfer
from pdkit.faults import pieces
from pdkit.faults.fault import (
    Change,
    Context,
    Fault,
    Where,
    changed,
    from_same_beginning,
    newest_tokens,
    on_tensors,
)
from pdkit.faults.pieces import COMPRESSED, Kind


def without_newest_beyond(tokens: int) -> Change:
    """Compressed entries of all tokens behind the first `tokens` are zeros."""
    return lambda kv_transfer, context: changed(
        kv_transfer,
        COMPRESSED,
        lambda name, kind, tensor: pieces.newest_lost(tensor, tensor.shape[-2] - tokens // kind.ratio),
    )


def passed_within(seconds: float) -> Callable[[KVTransfer, Context], Sequence[KVTransfer]]:
    """Of the KV transfers before one those that passed here up to `seconds` before it."""

    def recent(kv_transfer: KVTransfer, context: Context) -> Sequence[KVTransfer]:
        vars(kv_transfer)["passed"] = now = time.monotonic()
        return [each for each in context.earlier if now - vars(each)["passed"] < seconds]

    return recent


Family = tuple[tuple[Fault, ...], tuple[str, ...]]
FAMILIES: Mapping[str, Family] = {
    "age": (tuple(
        Fault(f"newest-1-lost-after-{after}",
              f"the last token of the prompt: zeros in all its state, from the request after number {after} on",
              Where.DECODE, newest_tokens(1, pieces.newest_lost), after=after,
              says=r"equal to the monolithic server's until request \d+",
              resembles="a counter or a pool that wraps around")
        for after in (20, 150, 400)
    ), ("test_answers_stay_equal",)),
    "silence": (tuple(
        Fault(f"{side}-silent-after-{after}",
              f"{side} computes nothing any more after {after} requests, and is healthy",
              Where.SERVER, trick=f"{side}-silent", after=after, says=f"{side} ({says})",
              resembles="a scheduler whose loop waits for ever beside a live HTTP process")
        for side, says in (("decode", "answers no request|fetches nothing"), ("prefill", "answers no request"))
        for after in (5, 60)
    ), ("test_answers_stay_equal",)),
    "memory": ((
        *(Fault(f"memory-kept-{kib}-kib", f"decode keeps {kib} KiB of each request",
                Where.SERVER, trick="memory-kept", size=kib << 10, says=r"memory of decode grows by \d+ KiB a request")
          for kib in (64, 1024)),
        *(Fault(f"aborted-kept-{kib}-kib", f"decode keeps {kib} KiB of each request that is aborted while it answers it",
                Where.SERVER, trick="aborted-kept", size=kib << 10, says=r"memory of decode grows by \d+ KiB a request",
                resembles="SGLang 18701, 21652")
          for kib in (256, 1024)),  # one request in eight is aborted while it decodes
        Fault("state-of-failed-rooms-kept", "prefill keeps the state of each room that failed",
              Where.SERVER, trick="failed-rooms-kept", says=r"memory of prefill grows by \d+ KiB a request"),
    ), ("test_memory_does_not_grow",)),
    "length": (tuple(
        Fault(f"beyond-{tokens}-lost",
              f"compressed entries of what stands behind the first {tokens} tokens are never written",
              Where.DECODE, without_newest_beyond(tokens), only_served=True,
              says=r"length: prompts up to \d+ of \d+ tokens",
              resembles="a transfer in chunks whose last ones are forgotten")
        for tokens in (1500, 3000)
    ), ("test_parity_up_to_the_context_limit",)),
    "answers": (tuple(
        Fault(name + ("" if every == 1 else "-5-percent"), f"{what}, in one answer of {every}",
              Where.LB, trick=name, every=every,
              says=f"contradict themselves.*{says}" if says else "contradict themselves|finish")
        for name, what, says in (
            ("usage-one-more", "the count of output tokens is one too high", "completion_tokens is"),
            ("cached-beyond-prompt", "more prompt tokens are said to be cached than the prompt has", "cached_tokens is"),
            ("reason-exchanged", "the finish reasons length and stop change places", ""),
            ("token-after-the-end", "one more token comes after the last one", "output_ids"),
            ("logprobs-one-less", "the last token has no logprob", "logprobs"),
        )
        for every in (1, 20)
    ), ("test_ends_at_every_token", "test_parity_crossed_parameters")),
    "seam": (tuple(
        Fault(f"stop-ignored-at-{place}", f"decode does not look whether output token {place} ends the answer",
              Where.SERVER, trick="stop-ignored", size=place, says="the seam.*at token")
        for place in (1, 2, 3)
    ), ("test_ends_at_every_token",)),
    "streams": (tuple(
        Fault(f"stream-piece-lost-one-in-{every}", f"one stream of {every} lacks a piece",
              Where.LB, trick="stream-piece-lost", every=every, says=r"streams: FAIL, \d+ of \d+ do not equal")
        for every in (20, 100)
    ), ("test_short_streams_equal_whole_answers",)),
    "latency": (tuple(
        Fault(f"retried-one-in-{every}",
              f"one request of {every} is served twice, one after the other, and the second answer is given",
              Where.LB, trick="request-retried", every=every,
              says="latency has a second mode|served more than once in secret")
        for every in (10, 33)
    ), ("test_no_second_mode_of_latency",)),
    "load_balancer": (tuple(
        Fault("failed-retried" + ("" if every == 1 else f"-one-in-{every}"),
              f"one request of {every} that failed is sent to both servers once more",
              Where.LB, trick="failed-retried", every=every, says="started again in secret")
        for every in (1, 3)
    ), ("test_corrupted_handover_is_rejected",)),
    "races": (tuple(
        Fault(f"aliased-within-{ms}-ms",
              f"requests that share a prefix and pass within {ms / 1000:g} s share the slots of compressed entries",
              Where.PREFILL, from_same_beginning({Kind.C4_COMPRESSED, Kind.C128_COMPRESSED}, passed_within(ms / 1000)),
              only_served=True, says="races: shared prefixes in flight", resembles="SGLang 35494")
        for ms in (50, 500)
    ), ("test_shared_prefix_in_flight",)),
    "aborts": (tuple(
        Fault(f"entries-shifted-after-{aborts}-aborts",
              f"after {aborts} aborted transfer(s) the 4x compressed entries of others are read one slot late",
              Where.SERVER, on_tensors({Kind.C4_COMPRESSED}, pieces.shifted), trick="entries-shifted", after=aborts - 1,
              says="races: pages of aborted requests", resembles="SGLang 24527, 31471")
        for aborts in (1, 40)
    ), ("test_pages_of_aborted_requests",)),
    "samples": (tuple(
        Fault(f"samples-late-at-{transfers}",
              f"with n > 1 the later samples never start where {transfers} transfers are awaited",
              Where.SERVER, trick="samples-late", size=transfers,
              says="races: parallel samples in flight|answers no request|fetches nothing",
              resembles="SGLang 26486, Dynamo 14098")
        for transfers in (4, 16)
    ), ("test_parallel_samples_in_flight",)),
    "crossed_parameters": (tuple(
        Fault(f"{lost}-lost-with-{beside}",
              f"decode gets no {lost.replace('-', '_')} where {beside.replace('-', '_')} is asked for, too",
              Where.LB, trick=f"{lost}-lost-with-{beside}", says="request parameters in pairs")
        for lost, beside in (("top-p", "logprobs"), ("stop", "seed"), ("temperature", "stop"), ("seed", "top-k"))
    ), ("test_parity_crossed_parameters",)),
    "work": ((
        *(Fault(f"decode-computes-from-{tokens}",
                f"decode computes prompts of {tokens} tokens and more itself, and does not count it",
                Where.SERVER, trick="decode-computes", size=tokens,
                says=r"decode did the work itself: prompts of [\d, ]+ tokens")
          for tokens in (1, 120, 500)),
        Fault("failed-receive-answered", "decode answers a request whose transfer failed with 200 and an empty text",
              Where.SERVER, trick="failed-receive-answered", says="a failed receive is answered"),
    ), ("test_answers_need_their_transfer", "test_decode_answers_no_failed_receive")),
}  # fmt: skip
"""The families by name, and the tests that are about each."""


def families(*names: str) -> Iterator[Fault]:
    """The faults of those that are named, of all unless some are."""
    for name in names or FAMILIES:
        family, tests = FAMILIES[name]
        yield from (replace(fault, asks=tests) for fault in family)
