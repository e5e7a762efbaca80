"""The library: every fault that the detection matrix injects, by name."""

import time
from dataclasses import replace
from functools import partial

import torch

from pdkit.engine.options import EngineOptions
from pdkit.engine.transfer import KVTransfer, TransferError
from pdkit.faults import pieces
from pdkit.faults.fault import (
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

SLOW_S = 0.02


def _behind_the_first_layer(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
    counts = {
        name: count + (name.endswith(".cumulative_length") and name != "layers.0.cumulative_length")
        for name, count in kv_transfer.counts.items()
    }
    return replace(kv_transfer, counts=counts)


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


def _one_byte_changed(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _slowly(data: bytes) -> bytes:
    time.sleep(SLOW_S)
    return data


PREFILL, WIRE, DECODE, RESTORE, LB, SERVER = Where
SKIPPED = {
    Kind.WINDOW: "SGLang 24878: one backend skipped the window",
    Kind.C4_COMPRESSED: "SGLang 24878: one backend skipped the compressed state",
    Kind.C128_COMPRESSED: "SGLang 24878: one backend skipped the compressed state",
    Kind.INDEXER_COMPRESSED: "SGLang 24878: one backend skipped the indexer state",
}
OF_KINDS = (
    *(
        fault
        for kind in TENSORS
        for fault in (
            Fault(f"{kind.slug}-missing", f"{kind.value}: not in the message", PREFILL, missing(kind)),
            Fault(f"{kind.slug}-zeroed", f"{kind.value}: never written, decode reads a fresh buffer",
                  DECODE, on_tensors({kind}, pieces.zeroed), resembles=SKIPPED.get(kind, "")),
            Fault(f"{kind.slug}-shifted", f"{kind.value}: each row one slot late, the newest lost",
                  DECODE, on_tensors({kind}, pieces.shifted)),
        )
    ),
    *(
        Fault(f"{kind.slug}-left-over",
              f"{kind.value}: never written, decode reads what the request before left there",
              DECODE, left_over({kind}), resembles=resembles)
        for kind, resembles in SKIPPED.items()
    ),
    *(
        fault
        for kind in COUNTS
        for fault in (
            Fault(f"{kind.slug}-missing", f"{kind.value}: not in the message", PREFILL, missing(kind)),
            Fault(f"{kind.slug}-one-more", f"{kind.value}: off by one once decode has checked it",
                  RESTORE, on_counts({kind}, lambda count: count + 1)),
        )
    ),
    Fault("128x-count-zero", "128x count: zero once decode has checked it",
          RESTORE, on_counts({Kind.C128_COUNT}, lambda count: 0)),
    Fault("length-behind-first-layer-one-more",
          "length: off by one in every layer but the first, once decode has checked it",
          RESTORE, _behind_the_first_layer,
          harmless="the model takes positions and mask of all layers from the length of the first one"),
    *(
        fault
        for tokens in (1, 4, 16)
        for fault in (
            Fault(f"newest-{tokens}-lost", f"the last {tokens} token(s) of the prompt: zeros in all their state",
                  DECODE, newest_tokens(tokens, pieces.newest_lost)),
            Fault(f"newest-{tokens}-cut", f"the last {tokens} token(s) of the prompt: all tensors shorter",
                  PREFILL, newest_tokens(tokens, pieces.cut)),
            Fault(f"window-newest-{tokens}-lost", f"the last {tokens} token(s) of the prompt: zeros in the window",
                  DECODE, newest_tokens(tokens, pieces.newest_lost, {Kind.WINDOW})),
        )
    ),
)  # fmt: skip
OF_BITS = (
    *(
        Fault(f"bits-flipped-{rate}", f"each bit of the state flipped with probability {rate}",
              DECODE, at_random(partial(pieces.bits_flipped, rate=float(rate))))
        for rate in ("1e-5", "1e-3", "1e-2")
    ),
    Fault("mantissa-flipped-1e-3", "each mantissa bit of the state flipped with probability 1e-3",
          DECODE, at_random(partial(pieces.bits_flipped, rate=1e-3, bits=pieces.MANTISSA_BITS))),
    *(
        Fault(f"rounded-to-{name}", f"the state cast to {name} and back",
              PREFILL, on_tensors(TENSORS, partial(pieces.rounded, dtype=dtype)))
        for name, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn))
    ),
    *(
        Fault(f"noise-{level}", f"normal noise of {level} times the size of each tensor",
              PREFILL, at_random(partial(pieces.noisy, level=float(level))))
        for level in ("1e-3", "1e-1")
    ),
)  # fmt: skip
OF_WHOLE_REQUESTS = (
    Fault("backend-skips-state", "window, compressed and indexer state are never written, the rest is",
          DECODE, _skipped, resembles="SGLang 24878"),
    Fault("state-left-over", "no state is written: decode goes on from the one that the request before left there",
          DECODE, left_over(TENSORS)),
    Fault("room-of-previous-request", "the room delivers what the request before computed",
          PREFILL, _of_the_previous_request),
    Fault("stale-prefix", "all state is that of an earlier request with the same beginning",
          PREFILL, from_same_beginning(TENSORS)),
    Fault("compressed-aliased", "requests that share a prefix share the slots of all their compressed entries",
          PREFILL, from_same_beginning(COMPRESSED), resembles="SGLang 35494"),
    Fault("first-token-wrong", "the first token is its neighbour in the vocabulary", PREFILL, _first_token_wrong),
    Fault("first-token-left-over", "the first token is that of the request before", DECODE, _first_token_left_over),
    Fault("first-logprob-left-over", "the logprob of the first token is that of the request before",
          DECODE, _first_logprob_left_over),
    Fault("one-worker-in-four-bad", "one decode worker in four reads fresh buffers",
          DECODE, on_tensors(TENSORS, pieces.zeroed), every=4),
    *(
        Fault(f"chunk-filed-under-its-first-{tokens}",
              f"a chunk of {EngineOptions.chunked_prefill_size} tokens is found again by the first {tokens} of them, and all before it",
              SERVER, trick="chunk-filed-early", size=tokens, resembles="Pegaflow 450, Mooncake 4153")
        for tokens in (16, 48)
    ),
    Fault("transfer-fails-one-in-ten", "one transfer in ten fails; a retry succeeds", PREFILL, _fails, every=10),
    Fault("transfer-fails", "every transfer fails", PREFILL, _fails),
    Fault("transfer-hangs-one-in-twenty", "one KV transfer in twenty is never sent",
          PREFILL, lambda kv_transfer, context: None, every=20),
    Fault("transfer-slow", f"each KV transfer takes {SLOW_S * 1000:.0f} ms longer", WIRE, wire=_slowly,
          harmless="what arrives late arrives whole, long before any timeout: time is lost"),
    Fault("wire-corrupted-one-in-twenty", "a bit of one KV transfer in twenty flips on the wire",
          WIRE, wire=_one_byte_changed, every=20),
    Fault("wire-corrupted", "a bit of each KV transfer flips on the wire", WIRE, wire=_one_byte_changed),
)  # fmt: skip
OF_THE_LOAD_BALANCER = (
    Fault("rooms-swapped", "two requests at a time get each other's rooms on decode", LB, trick="rooms-swapped"),
    Fault("rooms-swapped-5-percent", "5 % of requests get each other's rooms on decode",
          LB, trick="rooms-swapped", every=20),
    *(
        Fault(trick, what, LB, trick=trick)
        for trick, what in (
            ("answers-swapped", "two requests at a time get each other's answers"),
            ("request-duplicated",
             "each request is also sent to both servers a second time, the answer thrown away"),
            ("first-token-repeated", "the answer begins with its first token twice"),
            ("sampling-lost", "decode gets no sampling parameters"),
            ("temperature-lost", "decode gets no temperature"),
            ("seed-lost", "decode gets no sampling seed"),
            ("top-p-lost", "decode gets no top_p"),
            ("stop-lost", "decode gets no stop strings"),
        )
    ),
    Fault("prefill-late", "prefill hears of each request 50 ms after decode", LB, trick="prefill-late",
          harmless="decode waits for the room to open, for much longer than that: time is lost"),
)  # fmt: skip

LIBRARY: dict[str, Fault] = {
    fault.name: fault for fault in (*OF_KINDS, *OF_BITS, *OF_WHOLE_REQUESTS, *OF_THE_LOAD_BALANCER, *families())
}
