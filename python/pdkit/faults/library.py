"""The library: every fault that the detection matrix injects, by name."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from pdkit.engine.options import EngineOptions
from pdkit.engine.transfer import KVTransfer, TransferError
from pdkit.faults import pieces
from pdkit.faults.fault import (
    Change,
    Context,
    Fault,
    Where,
    at_random,
    from_same_beginning,
    left_over,
    missing,
    newest_tokens,
    on_counts,
    on_tensors,
)
from pdkit.faults.kinds import families
from pdkit.faults.pieces import COMPRESSED, COUNTS, TENSORS, Kind

EVERYTHING = frozenset(TENSORS)
SLOW_S = 0.02


def _slug(kind: Kind) -> str:
    return kind.value.replace(" ", "-")


def _of_each_kind() -> Iterator[Fault]:
    skipped = {
        Kind.WINDOW: "SGLang 24878: one backend skipped the window",
        Kind.C4_COMPRESSED: "SGLang 24878: one backend skipped the compressed state",
        Kind.C128_COMPRESSED: "SGLang 24878: one backend skipped the compressed state",
        Kind.INDEXER_COMPRESSED: "SGLang 24878: one backend skipped the indexer state",
    }
    for kind in TENSORS:
        name = _slug(kind)
        yield Fault(f"{name}-missing", f"{kind.value}: not in the message", Where.PREFILL, missing(kind))
        yield Fault(
            f"{name}-zeroed",
            f"{kind.value}: never written, decode reads a fresh buffer",
            Where.DECODE,
            on_tensors({kind}, pieces.zeroed),
            resembles=skipped.get(kind, ""),
        )
        yield Fault(
            f"{name}-shifted",
            f"{kind.value}: each row one slot late, the newest lost",
            Where.DECODE,
            on_tensors({kind}, pieces.shifted),
        )
    for kind, resembles in skipped.items():
        yield Fault(
            f"{_slug(kind)}-left-over",
            f"{kind.value}: never written, decode reads what the request before left there",
            Where.DECODE,
            left_over({kind}),
            resembles=resembles,
        )


def _behind_the_first_layer(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
    counts = {
        name: count + (name.endswith(".cumulative_length") and name != "layers.0.cumulative_length")
        for name, count in kv_transfer.counts.items()
    }
    return replace(kv_transfer, counts=counts)


def _of_each_count() -> Iterator[Fault]:
    for kind in COUNTS:
        name = _slug(kind)
        yield Fault(f"{name}-missing", f"{kind.value}: not in the message", Where.PREFILL, missing(kind))
        yield Fault(
            f"{name}-one-more",
            f"{kind.value}: off by one once decode has checked it",
            Where.RESTORE,
            on_counts({kind}, lambda count: count + 1),
        )
    yield Fault(
        "128x-count-zero",
        "128x count: zero once decode has checked it",
        Where.RESTORE,
        on_counts({Kind.C128_COUNT}, lambda count: 0),
    )
    yield Fault(
        "length-behind-first-layer-one-more",
        "length: off by one in every layer but the first, once decode has checked it",
        Where.RESTORE,
        _behind_the_first_layer,
        harmless="the model takes positions and mask of all layers from the length of the first one",
    )


def _of_the_newest_tokens() -> Iterator[Fault]:
    for tokens in (1, 4, 16):
        yield Fault(
            f"newest-{tokens}-lost",
            f"the last {tokens} token(s) of the prompt: zeros in all their state",
            Where.DECODE,
            newest_tokens(tokens, pieces.newest_lost),
        )
        yield Fault(
            f"newest-{tokens}-cut",
            f"the last {tokens} token(s) of the prompt: all tensors shorter",
            Where.PREFILL,
            newest_tokens(tokens, pieces.cut),
        )
        yield Fault(
            f"window-newest-{tokens}-lost",
            f"the last {tokens} token(s) of the prompt: zeros in the window",
            Where.DECODE,
            newest_tokens(tokens, pieces.newest_lost, {Kind.WINDOW}),
        )


def _of_bits() -> Iterator[Fault]:
    for name, rate in (("1e-5", 1e-5), ("1e-3", 1e-3), ("1e-2", 1e-2)):
        yield Fault(
            f"bits-flipped-{name}",
            f"each bit of the state flipped with probability {name}",
            Where.DECODE,
            at_random(lambda tensor, rng, rate=rate: pieces.bits_flipped(tensor, rate, rng)),
        )
    yield Fault(
        "mantissa-flipped-1e-3",
        "each mantissa bit of the state flipped with probability 1e-3",
        Where.DECODE,
        at_random(lambda tensor, rng: pieces.bits_flipped(tensor, 1e-3, rng, pieces.MANTISSA_BITS)),
    )
    for name, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        yield Fault(
            f"rounded-to-{name}",
            f"the state cast to {name} and back",
            Where.PREFILL,
            on_tensors(EVERYTHING, lambda tensor, dtype=dtype: pieces.rounded(tensor, dtype)),
        )
    for name, level in (("1e-3", 1e-3), ("1e-1", 1e-1)):
        yield Fault(
            f"noise-{name}",
            f"normal noise of {name} times the size of each tensor",
            Where.PREFILL,
            at_random(lambda tensor, rng, level=level: pieces.noisy(tensor, level, rng)),
        )


def _skipped(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
    kinds = {Kind.WINDOW, *COMPRESSED, Kind.INDEXER_BUFFERS, Kind.INDEXER_OVERLAP}
    return on_tensors(kinds, pieces.zeroed)(kv_transfer, context)


def _first_token_wrong(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
    return replace(kv_transfer, first_token=kv_transfer.first_token ^ 1)


def _first_token_left_over(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
    before = context.earlier[-1] if context.earlier else kv_transfer
    return replace(kv_transfer, first_token=before.first_token)


def _first_logprob_left_over(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
    if kv_transfer.first_logprob is None:
        return kv_transfer
    before = next((other for other in reversed(context.earlier) if other.first_logprob is not None), kv_transfer)
    return replace(kv_transfer, first_logprob=before.first_logprob, first_top_logprobs=before.first_top_logprobs)


def _of_the_previous_request(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
    return replace(context.earlier[-1], room=kv_transfer.room) if context.earlier else kv_transfer


def _fails(kv_transfer: KVTransfer, context: Context) -> None:
    raise TransferError(f"the transfer of bootstrap room {kv_transfer.room} failed")


def _never_sent(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
    return None


def _one_byte_changed(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _slowly(data: bytes) -> bytes:
    time.sleep(SLOW_S)
    return data


def _of_whole_requests() -> Iterator[Fault]:
    prefill, decode, wire = Where.PREFILL, Where.DECODE, Where.WIRE
    rows: list[tuple[str, str, Where, Change | None, dict[str, Any]]] = [
        ("backend-skips-state", "window, compressed and indexer state are never written, the rest is",
         decode, _skipped, {"resembles": "SGLang 24878"}),
        ("state-left-over", "no state is written: decode goes on from the one that the request before left there",
         decode, left_over(EVERYTHING), {}),
        ("room-of-previous-request", "the room delivers what the request before computed",
         prefill, _of_the_previous_request, {}),
        ("stale-prefix", "all state is that of an earlier request with the same beginning",
         prefill, from_same_beginning(EVERYTHING), {}),
        ("compressed-aliased", "requests that share a prefix share the slots of all their compressed entries",
         prefill, from_same_beginning(frozenset(COMPRESSED)), {"resembles": "SGLang 35494"}),
        ("first-token-wrong", "the first token is its neighbour in the vocabulary", prefill, _first_token_wrong, {}),
        ("first-token-left-over", "the first token is that of the request before", decode, _first_token_left_over, {}),
        ("first-logprob-left-over", "the logprob of the first token is that of the request before",
         decode, _first_logprob_left_over, {}),
        ("one-worker-in-four-bad", "one decode worker in four reads fresh buffers",
         decode, on_tensors(EVERYTHING, pieces.zeroed), {"every": 4}),
        *(
            (f"chunk-filed-under-its-first-{tokens}",
             f"a chunk of {EngineOptions.chunked_prefill_size} tokens is found again by the first {tokens} of them, and all before it",
             Where.SERVER, None,
             {"server": "chunk-filed-early", "size": tokens, "resembles": "Pegaflow 450, Mooncake 4153"})
            for tokens in (16, 48)
        ),
        ("transfer-fails-one-in-ten", "one transfer in ten fails; a retry succeeds", prefill, _fails, {"every": 10}),
        ("transfer-fails", "every transfer fails", prefill, _fails, {}),
        ("transfer-hangs-one-in-twenty", "one KV transfer in twenty is never sent", prefill, _never_sent, {"every": 20}),
        ("transfer-slow", f"each KV transfer takes {SLOW_S * 1000:.0f} ms longer", wire, None,
         {"wire": _slowly, "harmless": "what arrives late arrives whole, long before any timeout: time is lost"}),
        ("wire-corrupted-one-in-twenty", "a bit of one KV transfer in twenty flips on the wire", wire, None,
         {"wire": _one_byte_changed, "every": 20}),
        ("wire-corrupted", "a bit of each KV transfer flips on the wire", wire, None, {"wire": _one_byte_changed}),
    ]  # fmt: skip
    for name, what, where, change, more in rows:
        yield Fault(name, what, where, change, **more)


def _of_the_load_balancer() -> Iterator[Fault]:
    for name, what, every, harmless in (
        ("rooms-swapped", "two requests at a time get each other's rooms on decode", 1, ""),
        ("rooms-swapped-5-percent", "5 % of requests get each other's rooms on decode", 20, ""),
        ("answers-swapped", "two requests at a time get each other's answers", 1, ""),
        (
            "request-duplicated",
            "each request is also sent to both servers a second time, the answer thrown away",
            1,
            "",
        ),
        ("first-token-repeated", "the answer begins with its first token twice", 1, ""),
        ("sampling-lost", "decode gets no sampling parameters", 1, ""),
        ("temperature-lost", "decode gets no temperature", 1, ""),
        ("seed-lost", "decode gets no sampling seed", 1, ""),
        ("top-p-lost", "decode gets no top_p", 1, ""),
        ("stop-lost", "decode gets no stop strings", 1, ""),
        (
            "prefill-late",
            "prefill hears of each request 50 ms after decode",
            1,
            "decode waits for the room to open, for much longer than that: time is lost",
        ),
    ):
        trick = name.removesuffix("-5-percent")
        yield Fault(name, what, Where.LB, balancer=trick, every=every, harmless=harmless)


LIBRARY: dict[str, Fault] = {
    fault.name: fault
    for group in (
        _of_each_kind,
        _of_each_count,
        _of_the_newest_tokens,
        _of_bits,
        _of_whole_requests,
        _of_the_load_balancer,
        families,
    )
    for fault in group()
}
