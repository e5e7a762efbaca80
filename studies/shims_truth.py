#!/usr/bin/env python3
"""Whether the CPU shims of target sglang-cpu compute what SGLang's kernels do on a GPU: same seeded inputs, one record.

    PYTHONPATH=python python3 studies/shims_truth.py --out shims-truth.json               # SGLang 0.5.23 on one Hopper GPU
    scripts/env.sh python3 studies/shims_truth.py --rehearse --out shims-truth.json       # without a GPU

Each case calls a shim as a plain function on CPU tensors and SGLang's own wrapper on the GPU. For each result the record
has shapes, dtypes, whether the bytes are equal, how many differ, and largest and root mean square difference, absolute
and over the root mean square of SGLang's. A case that fails is recorded, the next one runs. `--rehearse` calls SGLang's
wrappers with the shims installed in them and Triton's kernels in its interpreter: that the calls fit is tried so.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib
import inspect
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from pdkit.core.command import Parser, positive, run_command
from pdkit.core.errors import ExitCode, NotReady
from pdkit.deployment.cpu.shims import (
    arithmetic,
    attention,
    checksum,
    compression,
    experts,
    hyper_connections,
    indexer,
    metadata,
    norm_rope,
    pages,
    speculative,
)

OPS = "sglang.kernels.ops."
PAGE, HEADS = 256, 64  # tokens of a page; of queries and of the indexer, as FlashMLA and DeepGEMM demand
BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
Results = dict[str, torch.Tensor]
CASES: list[Callable[[], Iterator[Results]]] = []
device = torch.device("cpu")


def case(function: Callable[[], Iterator[Results]]) -> Callable[[], Iterator[Results]]:
    """Yields the shim's results, then SGLang's under the same names; what the second part raises is recorded."""
    CASES.append(function)
    return function


def op(name: str) -> Any:
    """The attribute `name` ("package.module:attribute") of SGLang's kernels."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(OPS + module), attribute)


def there(*tensors: torch.Tensor) -> Any:
    """Copies on the device."""
    moved = [each.detach().clone().to(device) for each in tensors]
    return moved[0] if len(moved) == 1 else moved


def pool_bytes(page_size: int) -> int:
    """Of a page of the FlashMLA pool, padded as SGLang pads it."""
    return -(-page_size * (pages.TOKEN + pages.SCALES) // pages.TOKEN) * pages.TOKEN


def attention_view(cache: torch.Tensor, page_size: int) -> torch.Tensor:
    """A pool [pages, bytes] as attention gets it."""
    size = pages.TOKEN + pages.SCALES
    cache = cache.view(arithmetic.FP8)  # as the pool is kept
    return cache[:, : page_size * size].view(cache.shape[0], page_size, 1, size)


def read(cache: torch.Tensor, where: torch.Tensor, page_size: int) -> torch.Tensor:
    """float32 [n, 512] or, of an indexer's pool, [n, 128]: what slots `where` [n] of a pool hold."""
    cache, where = cache.cpu(), where.long()
    if cache.shape[1] != page_size * 132:
        return pages.load_flashmla(attention_view(cache, page_size), where)
    page, at = where // page_size, where % page_size
    values = cache[:, : page_size * 128].view(-1, page_size, 128)[page, at].view(arithmetic.FP8).float()
    return values * cache[:, page_size * 128 :].contiguous().view(F32)[page, at][:, None]


def freqs(length: int) -> torch.Tensor:
    """complex64 [length, 32]"""
    steps = torch.arange(length).float()[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    return torch.polar(torch.ones_like(steps), steps)


def real(table: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(table).flatten(-2)


def rows(n: int, width: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Of sizes from 0.01 to 400: [n, width]."""
    sizes = torch.tensor([0.01, 0.1, 1, 3, 10, 100, 400])
    return (torch.randn(n, width) * sizes[torch.arange(n) % len(sizes), None]).to(dtype)


@case
def rotary_embedding() -> Iterator[Results]:
    table, positions = freqs(3000), torch.tensor([0, 1, 7, 128, 2999])
    q, k = torch.randn(5, HEADS, 64).to(BF16), torch.randn(5, 1, 64).to(BF16)
    ours = {}
    for inverse in (False, True):
        a, b = q.clone(), k.clone()
        norm_rope.fused_rope(a, b, real(table), positions, inverse)
        ours |= {f"q, inverse {inverse}": a, f"k, inverse {inverse}": b}
    yield ours
    theirs = {}
    for inverse in (False, True):
        a, b = there(q, k)
        op("attention.dsv4.norm_rope:fused_rope_inplace")(a, b, there(table), there(positions), inverse)
        theirs |= {f"q, inverse {inverse}": a, f"k, inverse {inverse}": b}
    yield theirs


@case
def queries_norm_rope() -> Iterator[Results]:
    q, table, positions = torch.randn(9, HEADS, 512).to(BF16), freqs(3000), torch.randint(0, 3000, (9,))
    out = torch.empty_like(q)
    norm_rope.q_norm_rope(q, out, real(table), positions, 1e-6, True)
    yield {"q": out}
    out = torch.empty_like(q, device=device)
    op("attention.dsv4.norm_rope:fused_q_norm_rope")(there(q), out, 1e-6, there(table), there(positions))
    yield {"q": out}


@case
def keys_norm_rope_store() -> Iterator[Results]:
    kv, weight, table = rows(40, 512), (torch.rand(512) + 0.5).to(BF16), freqs(3000)
    positions, where = torch.randint(0, 3000, (40,)), torch.randperm(3 * PAGE)[:40]
    cache = torch.zeros(3, pool_bytes(PAGE), dtype=torch.uint8)
    mine = cache.clone()
    norm_rope.k_norm_rope_store(kv, weight, real(table), positions, where, mine, 1e-6, PAGE)
    yield {"pages": mine, "read": read(mine, where, PAGE)}
    other = there(cache)
    op("attention.dsv4.norm_rope:fused_k_norm_rope_flashmla")(
        there(kv), there(weight), 1e-6, there(table), there(positions), there(where.to(I32)), other, PAGE
    )
    yield {"pages": other, "read": read(other, where, PAGE)}


@case
def indexer_queries() -> Iterator[Results]:
    q, weight = torch.randn(7, HEADS, 128).to(BF16), torch.randn(7, HEADS).to(BF16)
    table, positions = freqs(3000), torch.randint(0, 3000, (7,))
    q_fp8, weights = torch.empty(7, HEADS, 128, dtype=arithmetic.FP8), torch.empty(7, HEADS, 1)
    norm_rope.q_indexer(q, q_fp8, weight, weights, 0.125, real(table), positions)
    yield {"q": q_fp8, "weights": weights}
    q_fp8, weights = op("attention.dsv4.norm_rope:fused_q_indexer_rope_hadamard_quant")(
        there(q), there(weight), 0.125, there(table), there(positions)
    )
    yield {"q": q_fp8, "weights": weights}


def stored(kind: str, width: int, page_size: int, size: int) -> Iterator[Results]:
    content, where = rows(70, width), torch.randperm(4 * page_size)[:70]
    cache = torch.zeros(4, size, dtype=torch.uint8)
    mine = cache.clone()
    {"flashmla": pages.store_flashmla, "indexer": pages.store_indexer}[kind](content.float(), mine, where, page_size)
    yield {"pages": mine, "read": read(mine, where, page_size)}
    other = there(cache)
    store = op("attention.dsv4.attn:fused_store_cache")
    store(there(content), other, there(where.to(I32)), page_size=page_size, type=kind)
    yield {"pages": other, "read": read(other, where, page_size)}


@case
def store_flashmla() -> Iterator[Results]:
    yield from stored("flashmla", 512, PAGE, pool_bytes(PAGE))


@case
def store_indexer() -> Iterator[Results]:
    yield from stored("indexer", 128, 64, 64 * 132)


def sequences(ratio: int, own_ring: bool) -> dict[str, Any]:
    """Two requests that grow by chunks in a pool of which each page of 256 tokens has a ring."""
    ring = 128 if ratio == 128 else 8
    full_to_state = (torch.randperm(4)[:, None] * PAGE + torch.arange(PAGE)).flatten()
    table = torch.stack((torch.arange(512), 512 + torch.arange(512))).to(I32)
    return {"ratio": ratio, "own": own_ring, "ring": ring, "full_to_state": full_to_state, "req_to_token": table}


def plan_of(tensor: torch.Tensor, pooled: bool) -> torch.Tensor:
    """A plan of either side as int64 [n, 5], [n, 2] or [n, 4], in the order of rows, without what is void."""
    plan = tensor.cpu()
    if plan.dtype == torch.uint8:
        words = plan.view(I32).long()
        if pooled and words.shape[1] == 4:
            packed = words[:, 1]
            words = torch.stack((words[:, 0], packed & 0xFFFF, packed >> 16 & 0xFFFF, words[:, 2], words[:, 3]), 1)
        words = words[words[:, 0] != -1]
    else:
        words = plan.long()
    if pooled:
        words[words[:, 2] == 0, 3:] = -1
    return words


def in_rows(plan: torch.Tensor, column: int) -> torch.Tensor:
    return plan[plan[:, column].argsort()]


def compressed(ratio: int, own_ring: bool, width: int) -> Iterator[Results]:
    """A prefill of two chunks and six decode steps: plans, entries, rings and pages after norm, rotation and store."""
    given = sequences(ratio, own_ring)
    slots = compression.Slots(ratio, given["req_to_token"], given["full_to_state"], PAGE, given["ring"], own_ring)
    elements = width * (4 if ratio == 4 else 2)
    ape = torch.randn(2 * ratio if ratio == 4 else ratio, width)
    weight, table = torch.rand(width) + 0.5, freqs(600)
    page_size = PAGE // ratio
    size = page_size * 132 if width == 128 else pool_bytes(page_size)
    buffer = torch.zeros(4 * max(1, given["ring"] // ratio), ratio, elements)
    cache = torch.zeros(4, size, dtype=torch.uint8)
    steps: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    lengths = torch.zeros(2, dtype=I64)
    for name, grown in (
        ("first chunk", (131, 37)),
        ("second chunk", (125, 219)),
        *((f"step {i}", None) for i in range(6)),
    ):
        extend = torch.tensor(grown or (1, 1))
        lengths = lengths + extend
        kv = torch.randn(int(extend.sum()), elements)
        positions = torch.cat([torch.arange(int(n - e), int(n)) for n, e in zip(lengths, extend)])
        request = torch.repeat_interleave(torch.arange(2), extend)
        where = torch.where((positions + 1) % ratio == 0, given["req_to_token"][request, positions] // ratio, 0)
        steps.append((name, lengths.clone(), extend, kv))
        steps[-1] += (where.long(),)
    ours: Results = {}
    mine, ring, flat = cache.clone(), buffer.clone(), real(table)
    for name, lengths, extend, kv, where in steps:
        decode = name.startswith("step")
        if decode:
            plan = compression.plan_decode(slots, torch.arange(2), lengths)
            out = torch.zeros(2, width)
            compression.compress_decode(ring, kv, out, ape, plan, ratio)
            ours[f"{name}: plan"] = plan.long()
        else:
            plan, kept = compression.plan_prefill(slots, torch.arange(2), lengths, extend)
            out = torch.zeros(len(plan), width)
            compression.compress_prefill(ring, kv, out, ape, plan, kept, ratio)
            ours |= {f"{name}: plan": in_rows(plan_of(plan, True), 1), f"{name}: kept": in_rows(kept.long(), 0)}
        done = lengths % ratio == 0 if decode else slice(None)
        ours |= {f"{name}: entries": out[done].clone(), f"{name}: rings": ring.clone()}
        compression.norm_rope_store(out, plan, weight, 1e-6, flat, where, mine, decode, ratio, page_size)
        ours[f"{name}: pages"] = mine.clone()
    every = torch.cat([where[where > 0] for *_, where in steps])
    ours["all pages, read"] = read(mine, every, page_size)
    yield ours
    theirs: Results = {}
    other, ring = there(cache), there(buffer)
    common = [there(torch.arange(2)), there(given["req_to_token"]), there(given["full_to_state"])]
    for name, lengths, extend, kv, where in steps:
        decode = name.startswith("step")
        if decode:
            plans = op("attention.dsv4.compress:CompressorDecodePlan").generate(
                ratio, *common, there(lengths), PAGE, given["ring"], own_ring and ratio == 4
            )
            order = slice(None)
            theirs[f"{name}: plan"] = plan_of(plans[1], False)
        else:
            plans = op("attention.dsv4.compress:CompressorPrefillPlan").generate(
                ratio, common[0], there(lengths), there(extend), *common[1:], PAGE, given["ring"], len(kv),
                use_req_ring=own_ring and ratio == 4,
            )  # fmt: skip
            found = plan_of(plans[1], True)
            order = found[:, 1].argsort()
            theirs |= {f"{name}: plan": in_rows(found, 1), f"{name}: kept": in_rows(plan_of(plans[2], False), 0)}
        out = op("attention.dsv4.compress:compress_forward")(
            ring, there(kv), there(ape), plans, head_dim=width, compress_ratio=ratio,
            out=torch.zeros(len(plans[1]), width, device=device),
        )  # fmt: skip
        valid = out[: len(order)][order.to(device)] if not decode else out[there(lengths % ratio == 0)]
        theirs |= {f"{name}: entries": valid.clone(), f"{name}: rings": ring.clone()}
        op("attention.dsv4.compress:compress_norm_rope_store")(
            out, plans, norm_weight=there(weight), norm_eps=1e-6, freq_cis=there(table), out_loc=there(where),
            kvcache=other, page_size=page_size,
        )  # fmt: skip
        theirs[f"{name}: pages"] = other.clone()
    theirs["all pages, read"] = read(other, every, page_size)
    yield theirs


@case
def compressor_128() -> Iterator[Results]:
    yield from compressed(128, True, 512)


@case
def compressor_4() -> Iterator[Results]:
    yield from compressed(4, False, 512)


@case
def compressor_4_indexer() -> Iterator[Results]:
    yield from compressed(4, False, 128)


@case
def compressor_4_own_ring() -> Iterator[Results]:
    yield from compressed(4, True, 512)


@case
def clamped_activation() -> Iterator[Results]:
    x = (torch.randn(9, 512) * 8).to(BF16)
    out = torch.empty(9, 256, dtype=BF16)
    experts.silu_and_mul_clamp(x, out, 10.0)
    yield {"out": out}
    out = torch.empty(9, 256, dtype=BF16, device=device)
    op("activation.silu_and_mul_clamp:silu_and_mul_clamp")(there(x), out, 10.0)
    yield {"out": out}


@case
def hyper_connections_mix() -> Iterator[Results]:
    mixes, scale, base = torch.randn(33, 1, 24), torch.rand(3), torch.randn(24)
    yield dict(zip(("pre", "post", "comb"), hyper_connections.hc_split_sinkhorn(mixes, scale, base), strict=True))
    theirs = op("layernorm.mhc:_hc_split_sinkhorn_triton")(*there(mixes, scale, base), 4, 20, 1e-6)
    yield dict(zip(("pre", "post", "comb"), theirs, strict=True))


@case
def hyper_connections_mix_tilelang() -> Iterator[Results]:
    """What serves on CUDA: the same in TileLang."""
    mixes, scale, base = torch.randn(33, 1, 24), torch.rand(3), torch.randn(24)
    yield dict(zip(("pre", "post", "comb"), hyper_connections.hc_split_sinkhorn(mixes, scale, base), strict=True))
    theirs = op("layernorm.mhc:hc_split_sinkhorn")(*there(mixes, scale, base))
    yield dict(zip(("pre", "post", "comb"), theirs, strict=True))


@case
def hyper_connections_combine() -> Iterator[Results]:
    x, pre = torch.randn(33, 4 * 128).to(BF16), torch.rand(33, 4)
    yield {str(dtype): hyper_connections.mhc_combine(x, pre, 4, dtype) for dtype in (F32, BF16)}
    yield {str(dtype): op("layernorm.mhc:mhc_combine")(*there(x, pre), 4, dtype) for dtype in (F32, BF16)}


@case
def compression_metadata() -> Iterator[Results]:
    lengths = torch.tensor([4, 7, 128, 300, 512], dtype=I32)
    table = torch.randint(0, 9, (5, 3), dtype=I32)
    given = lengths, lengths - 1, torch.arange(5) * 300 + 255, table
    yield {str(i): each for i, each in enumerate(metadata.init_compression_metadata(*given, PAGE))}
    theirs = op("attention.dsv4.metadata_kernel:init_compression_metadata")(*there(*given), PAGE)
    yield {str(i): each for i, each in enumerate(theirs)}


@case
def cleared_drafts() -> Iterator[Results]:
    state = torch.ones(3 * 130, 1024)
    given = torch.tensor([0, 2]), torch.tensor([127, 300]), torch.tensor([1, 2])
    options = {"ring_size": 130, "num_draft_tokens": 3}
    mine = state.clone()
    speculative.clear_unaccepted_c128_draft_states(mine, *given, **options)
    yield {"state": mine}
    other = there(state)
    op("kvcache.dsv4_c128_cleanup:clear_unaccepted_c128_draft_states")(other, *there(*given), **options)
    yield {"state": other}


@case
def draft_tree() -> Iterator[Results]:
    """Two sequences, a chain and a tree of five tokens, then the greedy verification of what was drafted."""
    topk, depth, n = 2, 2, 5
    parents = torch.tensor([[-1, 0, 1], [-1, 0, 1]])
    chosen = torch.tensor([[0, 1, 2, 4], [0, 2, 3, 1]])
    lengths = torch.tensor([9, 14])
    candidates = torch.tensor([[3, 5, 7, 9, 11], [4, 6, 8, 10, 12]])
    target = torch.tensor([[5, 9, 7, 2, 2], [6, 8, 10, 2, 2]])

    def run(build: Callable, verify: Callable, put: Callable, integer: torch.dtype) -> Results:
        mask = put(torch.ones(int(lengths.sum()) * n + n * n * 2, dtype=torch.bool))
        positions = put(torch.zeros(2 * n, dtype=I64))
        found = [put(torch.full((2, n), fill, dtype=I64)) for fill in (0, -1, -1)]
        build(put(parents), put(chosen), put(lengths), mask, positions, *found, topk, depth, n, 0)
        predicts = put(torch.full((2 * n,), -1, dtype=integer))
        index = put(torch.full((2, depth + 1), -1, dtype=integer))
        count = put(torch.zeros(2, dtype=integer))
        verify(predicts, index, count, put(candidates), *found, put(target))
        names = "index", "next token", "next sibling"
        return {"mask": mask, "positions": positions, "predicts": predicts, "accepted": index, "count": count} | dict(
            zip(names, found, strict=True)
        )

    yield run(speculative.build_tree_kernel_efficient_cpu, speculative.verify_tree_greedy_cpu, torch.Tensor.clone, I32)
    if device.type == "cpu":
        raise NotReady("CUDA only")
    tree = OPS + "speculative.tree"
    module = importlib.import_module(tree)
    yield run(module.build_tree_kernel_efficient, module.verify_tree_greedy, there, I32)


@case
def cache_locations() -> Iterator[Results]:
    """Which slots drafts are stored in."""
    requests, table, lengths = torch.tensor([2, 0]), torch.arange(4 * 40, dtype=I32).view(4, 40), torch.tensor([7, 19])
    contiguous, extended = torch.empty(2 * 3, dtype=I64), torch.empty(2 * 2, dtype=I64)
    speculative.assign_draft_cache_locs_contiguous_cpu(requests, table, lengths, contiguous, 40, 1, 3)
    speculative.assign_extend_cache_locs_cpu(requests, table, lengths, lengths + 2, extended, 40)
    tokens, counts, bonus = torch.arange(100, 106), torch.tensor([1, 3]), torch.empty(2, dtype=I64)
    speculative.fill_bonus_tokens_cpu(tokens, counts, bonus, 3)
    yield {"contiguous": contiguous, "extended": extended, "bonus": bonus}
    module = importlib.import_module(OPS + "speculative.cache_locs")
    requests, table, lengths = there(requests, table, lengths)
    contiguous = torch.empty(2 * 3, dtype=I64, device=device)
    module.assign_draft_cache_locs_contiguous_func(requests, table, lengths, contiguous, 1, 3)
    extended = module.assign_extend_cache_locs_func(requests, table, lengths, lengths + 2, 2, 2, device)
    bonus = torch.empty(2, dtype=I64, device=device)
    op("speculative.eagle:fill_bonus_tokens_func")(there(tokens), there(counts), bonus, 3, 2)
    yield {"contiguous": contiguous, "extended": extended, "bonus": bonus}


@case
def page_checksum() -> Iterator[Results]:
    content = [torch.randint(0, 256, (9, size), dtype=torch.uint8) for size in (4096, 777, 1 << 16)]
    order = torch.tensor([7, 1, 3])

    class Computer:
        _kv_data_ptrs = [each.data_ptr() for each in content]
        _kv_item_lens = [each.shape[1] for each in content]
        _state_data_ptrs: list[int] = []
        _state_item_lens: list[int] = []

    yield {"sum": torch.tensor(checksum.compute(Computer(), order))}
    if device.type == "cpu":
        raise NotReady("CUDA only")
    moved = [there(each) for each in content]
    index = there(order)
    found = op("memory.adler32:adler32_strided_checksum")(
        [each.data_ptr() for each in moved], [each.shape[1] for each in moved], [index] * len(moved)
    )
    yield {"sum": torch.tensor(found)}


@case
def indexer_scores() -> Iterator[Results]:
    """Against DeepGEMM; only entries that count are compared."""
    n, width = 5, 6
    cache = torch.zeros(30, 64 * 132, dtype=torch.uint8)
    pages.store_indexer(torch.randn(30 * 64, 128), cache, torch.arange(30 * 64), 64)
    q = torch.randn(n, 1, HEADS, 128).to(arithmetic.FP8)
    weight, lengths = torch.rand(n, HEADS), torch.tensor([1, 64, 65, 200, 384], dtype=I32)
    table = torch.stack([torch.randperm(30)[:width] for _ in range(n)]).to(I32)
    counted = torch.arange(width * 64) < lengths[:, None]
    view = cache.view(30, 64, 1, 132)
    ours = indexer.fp8_paged_mqa_logits_torch(q, view, weight, lengths, table, None, width * 64, False)
    yield {"scores": torch.where(counted, ours, 0)}
    if device.type == "cpu":
        sglangs = importlib.import_module("sglang.srt.layers.attention.dsv4.indexer").fp8_paged_mqa_logits_torch
        yield {"scores": torch.where(counted, sglangs(q, view, weight, lengths, table, None, width * 64, False), 0)}
        return
    import deep_gemm

    lens = there(lengths)[:, None].contiguous()
    plan = deep_gemm.get_paged_mqa_logits_metadata(lens, 64, deep_gemm.get_num_sms())
    q, view, weight, table = there(q, view, weight, table)
    scores = deep_gemm.fp8_paged_mqa_logits(q, view, weight, lens, table, plan, width * 64, False)
    yield {"scores": torch.where(there(counted), scores.float(), 0)}


def attended(extra_page: int | None, width: int) -> Iterator[Results]:
    """Five queries over their windows and, if there is a second pool, over `width` slots of compressed entries."""
    n = 5
    cache = torch.zeros(4, pool_bytes(PAGE), dtype=torch.uint8)
    pages.store_flashmla(torch.randn(4 * PAGE, 512), cache, torch.arange(4 * PAGE), PAGE)
    q, sink = torch.randn(n, 1, HEADS, 512).to(BF16), torch.randn(HEADS)
    window = torch.stack([torch.randperm(4 * PAGE)[:128] for _ in range(n)]).to(I32)[:, None]
    lengths = torch.tensor([1, 17, 64, 127, 128], dtype=I32)
    window = torch.where(torch.arange(128) < lengths[:, None, None], window, -1).to(I32)
    extra, where, counts = None, None, None
    if extra_page:
        extra = torch.zeros(8, pool_bytes(extra_page), dtype=torch.uint8)
        pages.store_flashmla(torch.randn(8 * extra_page, 512), extra, torch.arange(8 * extra_page), extra_page)
        counts = torch.tensor([1, 2, 5, 16, min(width, 8 * extra_page)], dtype=I32)
        where = torch.randint(0, 8 * extra_page, (n, 1, width), dtype=I32)
        where = torch.where(torch.arange(width) < counts[:, None, None], where, -1).to(I32)
    options = {"head_dim_v": 512, "softmax_scale": 512**-0.5, "is_fp8_kvcache": True}

    def pools(put: Callable) -> dict[str, Any]:
        found = {"q": put(q), "k_cache": attention_view(put(cache), PAGE), "indices": put(window)}
        found |= {"topk_length": put(lengths), "attn_sink": put(sink)}
        if extra is not None:
            found["extra_k_cache"] = attention_view(put(extra), extra_page)
            found |= {"extra_indices_in_kvcache": put(where), "extra_topk_length": put(counts)}
        return found

    yield {"out": attention.flash_mla_with_kvcache(**pools(torch.Tensor.clone), **options)[0]}
    module = importlib.import_module(attention.INTERFACE)
    theirs = module.flash_mla_with_kvcache(
        block_table=None, cache_seqlens=None, tile_scheduler_metadata=module.get_mla_metadata()[0],
        **pools(there), **options,
    )  # fmt: skip
    yield {"out": theirs[0]}


@case
def attention_window() -> Iterator[Results]:
    yield from attended(None, 0)


@case
def attention_4() -> Iterator[Results]:
    yield from attended(64, 512)


@case
def attention_128() -> Iterator[Results]:
    yield from attended(2, 64)


@case
def head_combine() -> Iterator[Results]:
    """The shim is SGLang's own hc_head_torch."""
    from sglang.srt.models.deepseek_v4 import hc_head_torch

    given = torch.randn(9, 4, 128).to(BF16), torch.randn(4, 512), torch.rand(1), torch.randn(4)
    yield {"out": hc_head_torch(*given, norm_eps=1e-6, hc_eps=1e-6)}
    yield {"out": op("layernorm.mhc_head:fused_hc_head")(*there(*given), norm_eps=1e-6, hc_eps=1e-6)}


@case
def last_locations() -> Iterator[Results]:
    """The shim is SGLang's own get_last_loc_torch."""
    allocation = importlib.import_module("sglang.srt.mem_cache.allocation")
    given = torch.arange(4 * 40, dtype=I32).view(4, 40), torch.tensor([2, 0, 3]), torch.tensor([0, 5, 39])
    yield {"loc": allocation.get_last_loc_torch(*given)}
    yield {"loc": allocation.get_last_loc_triton(*there(*given))}


@case
def routed_experts() -> Iterator[Results]:
    """bfloat16 experts, four of width 128, two for each row."""
    x = torch.randn(20, 128).to(BF16)
    w13, w2 = (torch.randn(4, 256, 128) / 8).to(BF16), (torch.randn(4, 128, 128) / 8).to(BF16)
    weights, ids = torch.rand(20, 2), torch.stack([torch.randperm(4)[:2] for _ in range(20)]).to(I32)

    class Config:
        apply_router_weight_on_input, swiglu_limit = False, 10.0

    class Layer:
        w13_weight, w2_weight = w13, w2

    yield {"out": experts.moe_forward_native(Layer(), x, (weights, ids), Config())}
    module = importlib.import_module("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe")
    if device.type == "cpu":
        raise NotReady("CUDA only")
    flags = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
        moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=False),
    )
    configs = importlib.import_module("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config")
    with (
        mock.patch.object(module, "get_exec", lambda: flags),
        mock.patch.object(configs, "get_exec", lambda: flags),
        mock.patch.object(module, "get_parallel", lambda: SimpleNamespace(tp_group=None)),
        mock.patch.object(module, "is_allocation_symmetric", lambda: False),
    ):
        yield {"out": module.fused_experts_impl(*there(x, w13, w2, weights, ids), swiglu_limit=10.0)}


def compared(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, Any]:
    """What the record holds of one result."""
    theirs = theirs.detach().cpu()
    row: dict[str, Any] = {
        "shape": list(ours.shape),
        "dtype": str(ours.dtype).removeprefix("torch."),
        "ours_sha256": hashlib.sha256(bytes_of(ours)).hexdigest()[:16],
    }
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return row | {"theirs_shape": list(theirs.shape), "theirs_dtype": str(theirs.dtype), "bytes_equal": False}
    row["bytes_equal"] = bytes_of(ours) == bytes_of(theirs)
    a, b = ours.double(), theirs.double()
    same = (a == b) | (a.isnan() & b.isnan())
    row["unequal"] = int((~same).sum())
    if row["unequal"]:
        off = torch.where(same, 0, (a - b).abs())
        size = float(b[b.isfinite()].square().mean().sqrt()) or 1.0
        row |= {"max": float(off.max()), "rms": float(off.square().mean().sqrt())}
        row |= {"max_over_rms": row["max"] / size, "rms_over_rms": row["rms"] / size}
        row["where"] = [list(each) for each in (~same).nonzero()[:4].tolist()]
    return row


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def run_case(function: Callable[[], Iterator[Results]], seed: int) -> dict[str, Any]:
    """{"results": {name: comparison}} or {"error": traceback's end, "ours": names}."""
    began = time.monotonic()
    torch.manual_seed(seed)
    row: dict[str, Any] = {"about": inspect.getdoc(function) or ""}
    ours: Results = {}
    try:
        arms = function()
        ours = next(arms)
        theirs = next(arms)
        if device.type == "cuda":
            torch.cuda.synchronize()
        row["results"] = {name: compared(each, theirs[name]) for name, each in ours.items()}
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.format_exc().splitlines()[-6:]
        row |= {"error": f"{type(error).__name__}: {str(error)[:600]}", "where": where, "ours": list(ours)}
    row["seconds"] = round(time.monotonic() - began, 2)
    return row


def modules_to_compile() -> list[tuple[str, tuple]]:
    """SGLang's CUDA modules that the cases need, compiled side by side before the first."""
    layout = op("attention.dsv4.kv_layout:KVLayout").V4
    stores = [
        ("_jit_fused_store_module", (kind, BF16, I32, size, layout))
        for kind, size in (("flashmla", PAGE), ("indexer", 64))
    ]
    compress = [
        ("_jit_compress_module", (width, F32, F32, F32, ratio)) for width, ratio in ((512, 4), (128, 4), (512, 128))
    ]
    compress += [
        ("_jit_compress_norm_rope_module", (F32, width, 64, size, False, layout))
        for width, size in ((512, 64), (512, 2), (128, 64))
    ]
    compress.append(("_jit_compress_plan_module", ()))
    norm_ropes = [("_jit_fused_rope_module", ()), ("_jit_main_q_norm_rope_module", (BF16, 512, 64, True))]
    norm_ropes.append(("_jit_main_k_norm_rope_flashmla_module", (BF16, 512, 64, PAGE, layout)))
    norm_ropes.append(("_jit_main_q_indexer_rope_hadamard_quant_module", (BF16,)))
    found = [(f"attention.dsv4.attn:{name}", given) for name, given in stores]
    found += [(f"attention.dsv4.compress:{name}", given) for name, given in compress]
    found += [(f"attention.dsv4.norm_rope:{name}", given) for name, given in norm_ropes]
    found.append(("activation.silu_and_mul_clamp:_jit_silu_and_mul_clamp_module", (BF16,)))
    found += [("speculative.tree:_jit_tree_module", ()), ("memory.adler32:_jit_adler32_module", ())]
    return found


def compile_all(limit: float) -> dict[str, Any]:
    """Compile what the cases need in `limit` seconds at most; what was not finished or failed, by name."""
    began = time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 4)
    try:
        wanted = modules_to_compile()
        for name, _ in wanted:
            op(name)
        futures = {pool.submit(op(name), *given): f"{name}{given}" for name, given in wanted}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    concurrent.futures.wait(futures, timeout=limit)
    failed = {name: repr(each.exception())[:300] for each, name in futures.items() if each.done() and each.exception()}
    unfinished = [name for each, name in futures.items() if not each.done()]
    pool.shutdown(wait=False, cancel_futures=True)
    return {"seconds": round(time.monotonic() - began, 1), "failed": failed, "unfinished": unfinished}


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("sglang", "triton", "sgl-flash-mla", "sgl-deep-gemm", "tilelang"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def rehearse(argv: Sequence[str]) -> None:
    """Become a process in the environment of a server of this target, with the shims installed in SGLang."""
    from pdkit.deployment.cpu import plan, plugin

    if plugin.FAMILY_VARIABLE not in os.environ:
        environment = {**os.environ, **plan.environment(plan.DSV4), "TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, "-W", "ignore", __file__, *argv], environment)
    plugin.activate()


def main(argv: Sequence[str]) -> ExitCode:
    """Raises NotReady without a GPU."""
    global device
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("shims-truth.json"), help="default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: whether the calls fit")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds it")
    parser.add_argument(
        "--limit", type=positive, default=55, metavar="S", help="begin no case later (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    began = time.monotonic()
    if args.rehearse:
        rehearse(argv)
    elif not torch.cuda.is_available():
        raise NotReady("a comparison with SGLang's kernels needs a GPU; --rehearse tries the calls without one")
    else:
        device = torch.device("cuda", torch.cuda.current_device())
    record: dict[str, Any] = {"seed": args.seed, "rehearsal": args.rehearse, "versions": versions(), "cases": {}}
    record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    if device.type == "cuda":
        record["compiled"] = compile_all(0.7 * args.limit)
    for function in CASES:
        name = function.__name__
        if args.only not in name:
            continue
        late = time.monotonic() - began > args.limit
        row = {"error": f"not begun within {args.limit:g} s"} if late else run_case(function, args.seed)
        record["cases"][name] = row
        results = row.get("results", {})
        equal = sum(each["bytes_equal"] for each in results.values())
        far = max((each.get("rms_over_rms", 0) for each in results.values()), default=0)
        line = f"{equal} of {len(results)} equal to the byte, RMS difference at most {far:.2g} of the value's RMS"
        print(
            f"{name}: {row['error'].splitlines()[0] if 'error' in row else line} ({row.get('seconds', 0)} s)",
            flush=True,
        )
        record["seconds"] = round(time.monotonic() - began, 1)
        unfinished = args.out.with_suffix(".part")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(args.out)
    failed = [name for name, row in record["cases"].items() if "error" in row]
    print(
        f"wrote {args.out}: {len(record['cases'])} cases in {record.get('seconds', 0)} s, without a result: {failed or 'none'}",
        flush=True,
    )
    sys.stdout.flush()
    os._exit(ExitCode.FAILED if failed and not args.rehearse else ExitCode.PASSED)  # compilers may still run


if __name__ == "__main__":
    sys.exit(run_command("shims_truth.py", main, sys.argv[1:]))
