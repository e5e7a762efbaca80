"""Whether the shims compute what SGLang's own kernels do: `python3 -m pdkit.deployment.cpu.truth`, one JSON line a result.

Each case calls shims as plain functions on CPU tensors, and what they are compared with: an `Arm`. On a GPU that is SGLang's
own wrapper (studies/shims_truth.py). Without one it is SGLang's Triton kernel, which runs on CPU under TRITON_INTERPRET=1,
or its plain torch; of what SGLang has in CUDA only, such as what a compressor plans and pools, a plain statement of what it
is for. Run it in the environment of a server (`plan.environment`): SGLang's Python modules import there.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import torch
from torch import Tensor

from pdkit.core.errors import NotReady
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
PAGE = 256  # tokens
BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
TOLERANCES = {F32: 1e-5, BF16: 2**-7}  # relative to the largest value, a few roundings; nothing of other types
FP8_TOLERANCE = 2**-4  # of what was rounded to e4m3 by one of the two only
Result: TypeAlias = Tensor | tuple[Tensor, float]
Results = dict[str, Result]


@dataclass(frozen=True)
class Arm:
    """What the shims are compared with.

    device        where SGLang's side computes
    is_reference  not SGLang's wrappers, but what says the same on CPU
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_reference: bool = False

    @property
    def heads(self) -> int:
        """Of queries and of the indexer: as FlashMLA and DeepGEMM demand, fewer for Triton's interpreter."""
        return 4 if self.is_reference else 64

    @property
    def real(self) -> torch.dtype:
        """Of activations: as served, or as precise as the reference."""
        return F32 if self.is_reference else BF16

    def there(self, *tensors: Tensor) -> Any:
        """Copies on the device."""
        moved = [each.detach().clone().to(self.device) for each in tensors]
        return moved[0] if len(moved) == 1 else moved

    def require_gpu(self) -> None:
        """Raises NotReady without one."""
        if self.device.type == "cpu":
            raise NotReady("CUDA only")


@dataclass(frozen=True)
class Case:
    """A comparison. `compute` yields the shims' results, then those of the arm, under the same names.

    The second may be fewer, each with a tolerance if not that of its type. on: arms that it is for.
    """

    name: str
    about: str
    compute: Callable[[Arm], Iterator[Results]]
    on: str


CASES: list[Case] = []


def case(on: str = "gpu, reference", **named: tuple[Any, ...]) -> Callable[[Callable[..., Iterator[Results]]], Any]:
    """Registers a function as a case, or one for each of `named` with these arguments before the arm."""

    def register(function: Callable[..., Iterator[Results]]) -> Callable[..., Iterator[Results]]:
        for name, given in (named or {function.__name__: ()}).items():
            about = inspect.getdoc(function) or ""
            CASES.append(Case(name, about, partial(function, *given), on))
        return function

    return register


def value_of(result: Result) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def tolerance_of(result: Result) -> float:
    """How far the shims' result may be from this one."""
    return result[1] if isinstance(result, tuple) else TOLERANCES.get(result.dtype, 0.0)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value; infinite if shape or dtype differ."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return math.inf
    ours, theirs = ours.double(), theirs.double()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    if bool(same.all()):
        return 0.0
    return float(((ours - theirs).abs() / theirs[theirs.isfinite()].abs().max().clamp_min(1e-30))[~same].max())


def op(name: str) -> Any:
    """A module of SGLang's kernels ("package.module"), or its attribute ("package.module:attribute")."""
    module, _, attribute = name.partition(":")
    found = importlib.import_module(OPS + module)
    return getattr(found, attribute) if attribute else found


def pool_bytes(page_size: int) -> int:
    """Of a page of the FlashMLA pool, padded as SGLang pads it."""
    return -(-page_size * (pages.TOKEN + pages.SCALES) // pages.TOKEN) * pages.TOKEN


def attention_view(cache: Tensor, page_size: int) -> Tensor:
    """A pool [pages, bytes] as attention gets it."""
    size = pages.TOKEN + pages.SCALES
    cache = cache.view(arithmetic.FP8)  # as the pool is kept
    return cache[:, : page_size * size].view(cache.shape[0], page_size, 1, size)


def read(cache: Tensor, where: Tensor, page_size: int) -> Tensor:
    """float32 [n, 512] or, of an indexer's pool, [n, 128]: what slots `where` [n] of a pool hold."""
    cache, where = cache.cpu(), where.long()
    if cache.shape[1] != page_size * 132:
        return pages.load_flashmla(attention_view(cache, page_size), where)
    page, at = where // page_size, where % page_size
    values = cache[:, : page_size * 128].view(-1, page_size, 128)[page, at].view(arithmetic.FP8).float()
    return values * cache[:, page_size * 128 :].contiguous().view(F32)[page, at][:, None]


def freqs(length: int) -> Tensor:
    """complex64 [length, 32]"""
    steps = torch.arange(length).float()[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    return torch.polar(torch.ones_like(steps), steps)


def flat(table: Tensor) -> Tensor:
    return torch.view_as_real(table).flatten(-2)


def rows(n: int, width: int, dtype: torch.dtype = BF16) -> Tensor:
    """Of sizes from 0.01 to 400: [n, width]."""
    sizes = torch.tensor([0.01, 0.1, 1, 3, 10, 100, 400])
    return (torch.randn(n, width) * sizes[torch.arange(n) % len(sizes), None]).to(dtype)


@case()
def rotary_embedding(arm: Arm) -> Iterator[Results]:
    table, positions = freqs(3000), torch.tensor([0, 1, 7, 128, 2999])
    q, k = torch.randn(5, arm.heads, 64).to(arm.real), torch.randn(5, 1, 64).to(arm.real)

    def rotated(rotate: Callable[..., Any], put: Callable[[Tensor], Tensor]) -> Results:
        found: Results = {}
        for inverse in (False, True):
            a, b = put(q), put(k)
            rotate(a, b, inverse)
            found |= {f"q, inverse {inverse}": a, f"k, inverse {inverse}": b}
        return found

    yield rotated(lambda a, b, inverse: norm_rope.fused_rope(a, b, flat(table), positions, inverse), torch.clone)
    if arm.is_reference:
        by_triton = partial(op("attention.dsv4.rope:apply_rotary_emb_triton"), freqs_cis=table, positions=positions)
        yield rotated(
            lambda a, b, inverse: [x.copy_(by_triton(x.clone(), inverse=inverse)) for x in (a, b)], torch.clone
        )
        return
    rotate, on_device = op("attention.dsv4.norm_rope:fused_rope_inplace"), arm.there(table, positions)
    yield rotated(lambda a, b, inverse: rotate(a, b, *on_device, inverse), arm.there)


@case()
def queries_norm_rope(arm: Arm) -> Iterator[Results]:
    q, table, positions = torch.randn(9, arm.heads, 512).to(arm.real), freqs(3000), torch.randint(0, 3000, (9,))
    out = torch.empty_like(q)
    norm_rope.q_norm_rope(q, out, flat(table), positions, 1e-6, True)
    yield {"q": out}
    if arm.is_reference:
        out = q.clone().flatten(0, 1)
        by_triton = op("attention.dsv4.rope:fused_norm_rope_inplace_triton")
        by_triton(out, None, 1e-6, table, positions.repeat_interleave(arm.heads))
        yield {"q": out.view_as(q)}
        return
    out = torch.empty_like(q, device=arm.device)
    op("attention.dsv4.norm_rope:fused_q_norm_rope")(arm.there(q), out, 1e-6, arm.there(table), arm.there(positions))
    yield {"q": out}


@case()
def keys_norm_rope_store(arm: Arm) -> Iterator[Results]:
    kv, weight, table = rows(40, 512, arm.real), (torch.rand(512) + 0.5).to(arm.real), freqs(3000)
    positions, where = torch.randint(0, 3000, (40,)), torch.randperm(3 * PAGE)[:40]
    cache = torch.zeros(3, pool_bytes(PAGE), dtype=torch.uint8)
    mine = cache.clone()
    norm_rope.k_norm_rope_store(kv, weight, flat(table), positions, where, mine, 1e-6, PAGE)
    keys = arithmetic.rope_tail(arithmetic.rms_norm(kv.float(), weight.float(), 1e-6), flat(table), positions)
    yield {"pages": mine, "read": read(mine, where, PAGE), "keys": keys}
    if arm.is_reference:
        by_triton = kv.clone()
        op("attention.dsv4.rope:fused_norm_rope_inplace_triton")(by_triton, weight, 1e-6, table, positions)
        yield {"keys": by_triton, "read": (by_triton, FP8_TOLERANCE)}
        return
    other = arm.there(cache)
    op("attention.dsv4.norm_rope:fused_k_norm_rope_flashmla")(
        *arm.there(kv, weight), 1e-6, *arm.there(table, positions, where.to(I32)), other, PAGE
    )
    yield {"pages": other, "read": read(other, where, PAGE)}


def hadamard(x: Tensor) -> Tensor:
    """The transform of the last 128 values, by its matrix."""
    from scipy.linalg import hadamard as sylvester

    return x @ torch.from_numpy(sylvester(128)).float() * 128**-0.5


@case()
def indexer_queries(arm: Arm) -> Iterator[Results]:
    """The scales of what is in fp8 go into the heads' weights."""
    q, weight = torch.randn(7, arm.heads, 128).to(arm.real), torch.randn(7, arm.heads).to(arm.real)
    table, positions = freqs(3000), torch.randint(0, 3000, (7,))
    q_fp8, weights = torch.empty(7, arm.heads, 128, dtype=arithmetic.FP8), torch.empty(7, arm.heads, 1)
    factor = weight[..., None] * 0.125
    norm_rope.q_indexer(q, q_fp8, weight, weights, 0.125, flat(table), positions)
    yield {"q": q_fp8, "weights": weights, "dequantized": q_fp8.float() * weights / factor.float()}
    if arm.is_reference:
        by_triton = op("attention.dsv4.rope:apply_rotary_emb_triton")
        q[..., 64:] = by_triton(q[..., 64:].contiguous(), table, positions=positions)
        wanted = hadamard(q)
        scale = wanted.abs().amax(-1, keepdim=True) / 448
        yield {"weights": factor * scale, "dequantized": (wanted, FP8_TOLERANCE)}
        return
    q_fp8, weights = op("attention.dsv4.norm_rope:fused_q_indexer_rope_hadamard_quant")(
        *arm.there(q, weight), 0.125, *arm.there(table, positions)
    )
    yield {"q": q_fp8, "weights": weights}


def misrounded(scaled: Tensor) -> Tensor:
    """Where Triton's interpreter does not round `scaled` to e4m3 as a GPU does: it loses the carry into the exponent

    (124.2 becomes 64, not 128), and rounds ties away from zero. Asserts that at most 15 % are: bfloat16 values are often ties.
    """
    rounded = arithmetic.to_fp8(scaled).float()
    carried = (torch.frexp(rounded).mantissa.abs() == 0.5) & (scaled.abs() < rounded.abs())
    step = torch.exp2(torch.floor(torch.log2(scaled.abs().clamp_min(2**-6))) - 3)
    tied = (scaled / step).frac().abs() == 0.5
    wrong = carried | tied
    assert wrong.float().mean() < 0.15, f"{wrong.float().mean():.0%} of the values are not compared"
    return wrong


@case(
    store_flashmla=("flashmla", 512, PAGE, pool_bytes(PAGE), pages.TOKEN),
    store_indexer=("indexer", 128, 64, 64 * 132, 128),
)
def stored(kind: str, width: int, page_size: int, size: int, stride: int, arm: Arm) -> Iterator[Results]:
    content, where = rows(70, width), torch.randperm(4 * page_size)[:70]
    cache = torch.zeros(4, size, dtype=torch.uint8)
    mine = cache.clone()
    store = {"flashmla": pages.store_flashmla, "indexer": pages.store_indexer}[kind]
    store(content.float(), mine, where, page_size)
    yield {"pages": mine, "read": read(mine, where, page_size)}
    if arm.is_reference:
        other = cache.clone()
        getattr(op("kvcache.triton_store_cache"), f"triton_fused_store_{kind}")(content, other, where, page_size)
        groups = (content[:, :448].unflatten(1, (7, 64)) if kind == "flashmla" else content[:, None]).float()
        scale = groups.abs().amax(-1, keepdim=True) / 448
        scale = torch.exp2(torch.ceil(torch.log2(scale))) if kind == "flashmla" else scale
        skipped = misrounded(groups / scale).flatten(1)
        bytes_at = (where // page_size * size + where % page_size * stride)[:, None] + torch.arange(skipped.shape[1])
        other.view(-1)[bytes_at[skipped]] = mine.view(-1)[bytes_at[skipped]]
        dequantize = op("attention.dsv4.dequant_k_cache:dequantize_k_cache_paged_dsv4")
        found = dequantize(mine, where.int(), page_size=PAGE).float() if kind == "flashmla" else read(other, where, 64)
        yield {"pages": other, "read": (found.view(-1, width), 0.0)}
        return
    other = arm.there(cache)
    store = op("attention.dsv4.attn:fused_store_cache")
    store(arm.there(content), other, arm.there(where.to(I32)), page_size=page_size, type=kind)
    yield {"pages": other, "read": read(other, where, page_size)}


def two_requests(ratio: compression.Ratio, own_ring: bool) -> compression.Slots:
    """Two requests that grow by chunks in a pool of which each page of 256 tokens has a ring."""
    full_to_state = (torch.randperm(4)[:, None] * PAGE + torch.arange(PAGE)).flatten()
    table = torch.stack((torch.arange(512), 512 + torch.arange(512))).to(I32)
    return compression.Slots(ratio, table, full_to_state, PAGE, 128 if ratio == 128 else 8, own_ring)


def plan_of(tensor: Tensor, pooled: bool) -> Tensor:
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


def in_rows(plan: Tensor, column: int) -> Tensor:
    return plan[plan[:, column].argsort()]


class Grown(NamedTuple):
    """A step of two requests: their lengths after it, by how much they grew, their new keys and where entries go."""

    name: str
    lengths: Tensor
    extend: Tensor
    kv: Tensor
    where: Tensor

    @property
    def is_decode(self) -> bool:
        return self.name.startswith("step")


def grown(slots: compression.Slots, elements: int) -> Iterator[Grown]:
    """A prefill of two chunks and six decode steps."""
    lengths = torch.zeros(2, dtype=I64)
    chunks = {"first chunk": (131, 37), "second chunk": (125, 219), **{f"step {i}": (1, 1) for i in range(6)}}
    for name, extend in zip(chunks, map(torch.tensor, chunks.values()), strict=True):
        lengths = lengths + extend
        kv = torch.randn(int(extend.sum()), elements)
        positions = torch.cat([torch.arange(int(n - e), int(n)) for n, e in zip(lengths, extend)])
        request = torch.repeat_interleave(torch.arange(2), extend)
        ends = (positions + 1) % slots.ratio == 0
        yield Grown(
            name,
            lengths,
            extend,
            kv,
            torch.where(ends, slots.req_to_token[request, positions] // slots.ratio, 0).long(),
        )


@case(
    on="gpu",
    compressor_128=(128, True, 512),
    compressor_4=(4, False, 512),
    compressor_4_indexer=(4, False, 128),
    compressor_4_own_ring=(4, True, 512),
)
def compressed(ratio: compression.Ratio, own_ring: bool, width: int, arm: Arm) -> Iterator[Results]:
    """Plans, entries, rings and pages after norm, rotation and store."""
    slots = two_requests(ratio, own_ring)
    elements = width * (4 if ratio == 4 else 2)
    ape = torch.randn(2 * ratio if ratio == 4 else ratio, width)
    weight, table = torch.rand(width) + 0.5, freqs(600)
    page_size = PAGE // ratio
    buffer = torch.zeros(4 * max(1, slots.ring // ratio), ratio, elements)
    cache = torch.zeros(4, page_size * 132 if width == 128 else pool_bytes(page_size), dtype=torch.uint8)
    steps = list(grown(slots, elements))
    every = torch.cat([step.where[step.where > 0] for step in steps])
    ours: Results = {}
    mine, ring = cache.clone(), buffer.clone()
    for step in steps:
        name, lengths = step.name, step.lengths
        if step.is_decode:
            plan, out = compression.plan_decode(slots, torch.arange(2), lengths), torch.zeros(2, width)
            compression.compress_decode(ring, step.kv, out, ape, plan, ratio)
            ours |= {f"{name}: plan": plan.long(), f"{name}: entries": out[lengths % ratio == 0]}
        else:
            plan, kept = compression.plan_prefill(slots, torch.arange(2), lengths, step.extend)
            out = torch.zeros(len(plan), width)
            compression.compress_prefill(ring, step.kv, out, ape, plan, kept, ratio)
            ours |= {f"{name}: plan": in_rows(plan_of(plan, True), 1), f"{name}: kept": in_rows(kept.long(), 0)}
            ours[f"{name}: entries"] = out.clone()
        ours[f"{name}: rings"] = ring.clone()
        compression.norm_rope_store(
            out, plan, weight, 1e-6, flat(table), step.where, mine, step.is_decode, ratio, page_size
        )
        ours[f"{name}: pages"] = mine.clone()
    yield {**ours, "all pages, read": read(mine, every, page_size)}
    theirs: Results = {}
    other, ring, requests = arm.there(cache, buffer, torch.arange(2))
    tables, compress = arm.there(slots.req_to_token, slots.full_to_state), op("attention.dsv4.compress")
    of_request = own_ring and ratio == 4
    for step in steps:
        name, lengths = step.name, arm.there(step.lengths)
        if step.is_decode:
            plans = compress.CompressorDecodePlan.generate(
                ratio, requests, *tables, lengths, PAGE, slots.ring, of_request
            )
            entries_in_order = lengths % ratio == 0
            theirs[f"{name}: plan"] = plan_of(plans[1], False)
        else:
            plans = compress.CompressorPrefillPlan.generate(
                ratio, requests, lengths, arm.there(step.extend), *tables, PAGE, slots.ring, len(step.kv),
                use_req_ring=of_request,
            )  # fmt: skip
            found = plan_of(plans[1], True)
            entries_in_order = found[:, 1].argsort().to(arm.device)
            theirs |= {f"{name}: plan": in_rows(found, 1), f"{name}: kept": in_rows(plan_of(plans[2], False), 0)}
        out = compress.compress_forward(
            ring, *arm.there(step.kv, ape), plans, head_dim=width, compress_ratio=ratio,
            out=torch.zeros(len(plans[1]), width, device=arm.device),
        )  # fmt: skip
        theirs |= {f"{name}: entries": out[entries_in_order], f"{name}: rings": ring.clone()}
        compress.compress_norm_rope_store(
            out, plans, norm_weight=arm.there(weight), norm_eps=1e-6, freq_cis=arm.there(table),
            out_loc=arm.there(step.where), kvcache=other, page_size=page_size,
        )  # fmt: skip
        theirs[f"{name}: pages"] = other.clone()
    yield {**theirs, "all pages, read": read(other, every, page_size)}


@case()
def clamped_activation(arm: Arm) -> Iterator[Results]:
    x = (torch.randn(9, 512) * 8).to(arm.real)
    ours = {"out": torch.empty(9, 256, dtype=arm.real), "without a limit": torch.empty(9, 256, dtype=arm.real)}
    for out, limit in zip(ours.values(), (10.0, 1e9), strict=True):
        experts.silu_and_mul_clamp(x, out, limit)
    yield {**ours}
    if arm.is_reference:
        from sglang.srt.layers.activation import SiluAndMul

        gate, up = x.chunk(2, -1)
        gate, up = gate.clamp_max(10), up.clamp(-10, 10)
        yield {"out": gate / (1 + torch.exp(-gate)) * up, "without a limit": SiluAndMul().forward_native(x)}
        return
    out = torch.empty(9, 256, dtype=arm.real, device=arm.device)
    op("activation.silu_and_mul_clamp:silu_and_mul_clamp")(arm.there(x), out, 10.0)
    yield {"out": out}


def mixed(arm: Arm, theirs: str, *more: float) -> Iterator[Results]:
    given = torch.randn(33, 1, 24), torch.rand(3), torch.randn(24)
    for mix in (lambda: hyper_connections.hc_split_sinkhorn(*given), lambda: op(theirs)(*arm.there(*given), *more)):
        yield dict(zip(("pre", "post", "comb"), mix(), strict=True))


@case()
def hyper_connections_mix(arm: Arm) -> Iterator[Results]:
    yield from mixed(arm, "layernorm.mhc:_hc_split_sinkhorn_triton", 4, 20, 1e-6)


@case(on="gpu")
def hyper_connections_mix_tilelang(arm: Arm) -> Iterator[Results]:
    """What serves on CUDA: the same in TileLang."""
    yield from mixed(arm, "layernorm.mhc:hc_split_sinkhorn")


@case()
def hyper_connections_combine(arm: Arm) -> Iterator[Results]:
    x, pre = torch.randn(33, 4 * 128).to(BF16), torch.rand(33, 4)
    yield {str(dtype): hyper_connections.mhc_combine(x, pre, 4, dtype) for dtype in (F32, BF16)}
    yield {str(dtype): op("layernorm.mhc:mhc_combine")(*arm.there(x, pre), 4, dtype) for dtype in (F32, BF16)}


@case()
def compression_metadata(arm: Arm) -> Iterator[Results]:
    lengths = torch.tensor([4, 7, 128, 300, 512], dtype=I32)
    table = torch.randint(0, 9, (5, 3), dtype=I32)
    given = lengths, lengths - 1, torch.arange(5) * 300 + 255, table
    yield {str(i): each for i, each in enumerate(metadata.init_compression_metadata(*given, PAGE))}
    theirs = op("attention.dsv4.metadata_kernel:init_compression_metadata")(*arm.there(*given), PAGE)
    yield {str(i): each for i, each in enumerate(theirs)}


@case()
def cleared_drafts(arm: Arm) -> Iterator[Results]:
    state = torch.ones(3 * 130, 1024)
    given = torch.tensor([0, 2]), torch.tensor([127, 300]), torch.tensor([1, 2])
    options = {"ring_size": 130, "num_draft_tokens": 3}
    mine = state.clone()
    speculative.clear_unaccepted_c128_draft_states(mine, *given, **options)
    yield {"state": mine}
    other = arm.there(state)
    op("kvcache.dsv4_c128_cleanup:clear_unaccepted_c128_draft_states")(other, *arm.there(*given), **options)
    yield {"state": other}


@case()
def draft_tree(arm: Arm) -> Iterator[Results]:
    """Two sequences, a chain and a tree of five tokens, then the greedy verification of what was drafted."""
    topk, depth, n = 2, 2, 5
    parents = torch.tensor([[-1, 0, 1], [-1, 0, 1]])
    chosen = torch.tensor([[0, 1, 2, 4], [0, 2, 3, 1]])
    lengths = torch.tensor([9, 14])
    candidates = torch.tensor([[3, 5, 7, 9, 11], [4, 6, 8, 10, 12]])
    target = torch.tensor([[5, 9, 7, 2, 2], [6, 8, 10, 2, 2]])
    integer = I64 if arm.is_reference else I32

    def run(build: Callable[..., Any], verify: Callable[..., Any], put: Callable[[Tensor], Any]) -> Results:
        mask = put(torch.ones(int(lengths.sum()) * n + n * n * 2, dtype=torch.bool))
        positions = put(torch.zeros(2 * n, dtype=I64))
        found = [put(torch.full((2, n), fill, dtype=I64)) for fill in (0, -1, -1)]
        build(put(parents), put(chosen), put(lengths), mask, positions, *found, topk, depth, n, 0)
        predicts = put(torch.full((2 * n,), -1, dtype=integer))
        index = put(torch.full((2, depth + 1), -1, dtype=integer))
        count = put(torch.zeros(2, dtype=integer))
        verify(predicts, index, count, put(candidates), *found, put(target))
        names = "mask", "positions", "predicts", "accepted", "count", "index", "next token", "next sibling"
        return dict(zip(names, (mask, positions, predicts, index, count, *found), strict=True))

    yield run(speculative.build_tree_kernel_efficient_cpu, speculative.verify_tree_greedy_cpu, torch.clone)
    if arm.is_reference:
        by_triton = op("speculative.spec_tree")
        verify = by_triton.verify_tree_greedy_kernel_triton[(2,)]
        sizes = {"batch_size": 2, "num_speculative_tokens": depth + 1, "num_draft_tokens": n}
        yield run(by_triton.sgl_build_tree_kernel_triton, partial(verify, **sizes), torch.clone)
        return
    arm.require_gpu()
    tree = op("speculative.tree")
    yield run(tree.build_tree_kernel_efficient, tree.verify_tree_greedy, arm.there)


@case()
def cache_locations(arm: Arm) -> Iterator[Results]:
    """Which slots drafts are stored in: against SGLang's functions, or, as on CPU these call ours, their Triton kernels."""
    requests, table, lengths = torch.tensor([2, 0]), torch.arange(4 * 40, dtype=I32).view(4, 40), torch.tensor([7, 19])
    ends = lengths + (torch.tensor([2, 3]) if arm.is_reference else 2)
    tokens, counts = torch.arange(100, 106), torch.tensor([1, 3])
    accepted, stored_at, entered = torch.tensor([3, -1, 0, -1, 4, 5]), torch.arange(10, 16), torch.zeros_like(table)
    sizes = {"contiguous": 6, "extended": int((ends - lengths).sum()), "bonus": 2, "accepted": 6}

    def empty() -> dict[str, Tensor]:
        return {name: torch.zeros(size, dtype=I64, device=arm.device) for name, size in sizes.items()}

    ours = {name: each.cpu() for name, each in empty().items()}
    speculative.assign_draft_cache_locs_contiguous_cpu(requests, table, lengths, ours["contiguous"], 40, 1, 3)
    speculative.assign_extend_cache_locs_cpu(requests, table, lengths, ends, ours["extended"], 40)
    speculative.assign_req_to_token_pool_cpu(requests, entered, lengths, ends, ours["extended"], 40)
    speculative.fill_bonus_tokens_cpu(tokens, counts, ours["bonus"], 3)
    speculative.fill_accept_out_cache_loc_cpu(accepted, stored_at, ours["accepted"])
    yield {**ours, "entered": ours["extended"]}
    theirs, kernels, eagle = empty(), op("speculative.cache_locs"), op("speculative.eagle")
    if arm.is_reference:
        again = torch.zeros_like(theirs["extended"])
        kernels.assign_draft_cache_locs_contiguous[(2,)](requests, table, lengths, theirs["contiguous"], 40, 1, 3)
        for pool, out in ((table, theirs["extended"]), (entered, again)):
            kernels.assign_extend_cache_locs[(2,)](requests, pool, lengths, ends, out, 40, 2)
        eagle.fill_bonus_tokens[(2,)](tokens, counts, theirs["bonus"], 3)
        eagle.fill_accept_out_cache_loc[(6,)](accepted, stored_at, theirs["accepted"], 8)
        yield {**theirs, "entered": again}
        return
    requests, table, lengths = arm.there(requests, table, lengths)
    kernels.assign_draft_cache_locs_contiguous_func(requests, table, lengths, theirs["contiguous"], 1, 3)
    extended = kernels.assign_extend_cache_locs_func(requests, table, lengths, lengths + 2, 2, 2, arm.device)
    eagle.fill_bonus_tokens_func(*arm.there(tokens, counts), theirs["bonus"], 3, 2)
    yield {"contiguous": theirs["contiguous"], "extended": extended, "bonus": theirs["bonus"]}


@case(on="gpu")
def page_checksum(arm: Arm) -> Iterator[Results]:
    content = [torch.randint(0, 256, (9, size), dtype=torch.uint8) for size in (4096, 777, 1 << 16)]
    order = torch.tensor([7, 1, 3])
    computer = SimpleNamespace(
        _kv_data_ptrs=[each.data_ptr() for each in content],
        _kv_item_lens=[each.shape[1] for each in content],
        _state_data_ptrs=[],
        _state_item_lens=[],
    )
    yield {"sum": torch.tensor(checksum.compute(computer, order))}
    arm.require_gpu()
    moved, index = [arm.there(each) for each in content], arm.there(order)
    found = op("memory.adler32:adler32_strided_checksum")(
        [each.data_ptr() for each in moved], [each.shape[1] for each in moved], [index] * len(moved)
    )
    yield {"sum": torch.tensor(found)}


@case(on="reference", indexer_scores_of_one=(1, 3))
@case(indexer_scores=(5, 6))
def indexer_scores(n: int, width: int, arm: Arm) -> Iterator[Results]:
    """Against DeepGEMM, where only entries that count are compared; without a GPU against SGLang's torch version."""
    longest = width * 64
    cache = torch.zeros(30, 64 * 132, dtype=torch.uint8)
    pages.store_indexer(torch.randn(30 * 64, 128), cache, torch.arange(30 * 64), 64)
    q = torch.randn(n, 1, 64, 128).to(arithmetic.FP8)
    weight, lengths = torch.rand(n, 64), torch.tensor([1, 64, 65, 200, 384], dtype=I32)[:n]
    table = torch.stack([torch.randperm(30)[:width] for _ in range(n)]).to(I32)
    counted = torch.arange(longest) < lengths[:, None]
    view = cache.view(30, 64, 1, 132)
    wider = q, view, weight, lengths, table, None, longest + 32, False
    ours = indexer.fp8_paged_mqa_logits_torch(*wider)
    yield {"scores": torch.where(counted, ours[:, :longest], 0), "all": ours}
    if arm.device.type == "cpu":
        by_torch = importlib.import_module("sglang.srt.layers.attention.dsv4.indexer").fp8_paged_mqa_logits_torch(
            *wider
        )
        yield {"scores": (torch.where(counted, by_torch[:, :longest], 0), 0.0), "all": (by_torch, 0.0)}
        return
    import deep_gemm  # type: ignore[import-untyped]

    lens = arm.there(lengths)[:, None].contiguous()
    plan = deep_gemm.get_paged_mqa_logits_metadata(lens, 64, deep_gemm.get_num_sms())
    q, view, weight, table = arm.there(q, view, weight, table)
    scores = deep_gemm.fp8_paged_mqa_logits(q, view, weight, lens, table, plan, longest, False)
    yield {"scores": torch.where(arm.there(counted), scores.float(), 0)}


@case(on="gpu", attention_window=(0, 0), attention_4=(64, 512), attention_128=(2, 64))
def windowed(extra_page: int, width: int, arm: Arm) -> Iterator[Results]:
    """Five queries over their windows and, if there is a second pool, over `width` slots of compressed entries."""
    n = 5
    cache = torch.zeros(4, pool_bytes(PAGE), dtype=torch.uint8)
    pages.store_flashmla(torch.randn(4 * PAGE, 512), cache, torch.arange(4 * PAGE), PAGE)
    q, sink = torch.randn(n, 1, arm.heads, 512).to(BF16), torch.randn(arm.heads)
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

    def pools(put: Callable[[Tensor], Any]) -> dict[str, Any]:
        found = {"q": put(q), "k_cache": attention_view(put(cache), PAGE), "indices": put(window)}
        found |= {"topk_length": put(lengths), "attn_sink": put(sink)}
        if extra is not None:
            found["extra_k_cache"] = attention_view(put(extra), extra_page)
            found |= {"extra_indices_in_kvcache": put(where), "extra_topk_length": put(counts)}
        return found

    yield {"out": attention.flash_mla_with_kvcache(**pools(torch.clone), **options)[0]}
    module = importlib.import_module(attention.INTERFACE)
    theirs = module.flash_mla_with_kvcache(
        block_table=None, cache_seqlens=None, tile_scheduler_metadata=module.get_mla_metadata()[0],
        **pools(arm.there), **options,
    )  # fmt: skip
    yield {"out": theirs[0]}


@case()
def head_combine(arm: Arm) -> Iterator[Results]:
    """The shim is SGLang's own hc_head_torch."""
    from sglang.srt.models.deepseek_v4 import hc_head_torch

    given = torch.randn(9, 4, 128).to(BF16), torch.randn(4, 512), torch.rand(1), torch.randn(4)
    yield {"out": hc_head_torch(*given, norm_eps=1e-6, hc_eps=1e-6)}
    yield {"out": op("layernorm.mhc_head:fused_hc_head")(*arm.there(*given), norm_eps=1e-6, hc_eps=1e-6)}


@case()
def last_locations(arm: Arm) -> Iterator[Results]:
    """The shim is SGLang's own get_last_loc_torch."""
    allocation = importlib.import_module("sglang.srt.mem_cache.allocation")
    given = torch.arange(4 * 40, dtype=I32).view(4, 40), torch.tensor([2, 0, 3]), torch.tensor([0, 5, 39])
    yield {"loc": allocation.get_last_loc_torch(*given)}
    yield {"loc": allocation.get_last_loc_triton(*arm.there(*given))}


@case()
def routed_experts(arm: Arm) -> Iterator[Results]:
    """Four experts of width 128, two for each row; the reference takes each row by itself, expert by expert."""
    x = torch.randn(20, 128).to(arm.real)
    w13, w2 = (torch.randn(4, 256, 128) / 8).to(arm.real), (torch.randn(4, 128, 128) / 8).to(arm.real)
    weights, ids = torch.rand(20, 2), torch.stack([torch.randperm(4)[:2] for _ in range(20)]).to(I32)
    layer, limits = SimpleNamespace(w13_weight=w13, w2_weight=w2), {"out": 10.0, "low limit": 1.0, "no limit": None}
    ours: Results = {}
    for name, limit in limits.items():
        config = SimpleNamespace(apply_router_weight_on_input=False, swiglu_limit=limit)
        ours[name] = experts.moe_forward_native(layer, x, (weights, ids), config)
    yield ours
    if arm.is_reference:
        from sglang.srt.layers.activation import SiluAndMul

        theirs = {name: torch.zeros(20, 128) for name in limits}
        for name, row in itertools.product(limits, range(20)):
            limit = limits[name] or math.inf
            for weight, expert in zip(weights[row], ids[row].tolist(), strict=True):
                gate, up = (w13[expert] @ x[row]).chunk(2)
                hidden = SiluAndMul().forward_native(torch.cat((gate.clamp(max=limit), up.clamp(-limit, limit))))
                theirs[name][row] += weight * (w2[expert] @ hidden)
        yield {**theirs}
        return
    arm.require_gpu()
    module = importlib.import_module("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe")
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
        yield {"out": module.fused_experts_impl(*arm.there(x, w13, w2, weights, ids), swiglu_limit=10.0)}


@case(on="reference")
def fp8(arm: Arm) -> Iterator[Results]:
    """e4m3 by its bits."""
    every = torch.arange(256, dtype=torch.uint8)
    finite = every[(every != 127) & (every != 255)]
    ours, halves = arithmetic.from_fp8(finite).float() * 2.0**120, arithmetic.halves(finite).float() * 2.0**8
    yield {"floats": ours, "halves": halves}
    yield dict.fromkeys(("floats", "halves"), (finite.view(arithmetic.FP8).float(), 0.0))


@case(on="reference")
def hadamard_transform(arm: Arm) -> Iterator[Results]:
    x = torch.randn(3, 128)
    yield {"out": arithmetic.hadamard(x)}
    yield {"out": hadamard(x)}


@case(on="reference", stored_entries=(512, pool_bytes(64)), stored_indexer_entries=(128, 64 * 132))
def stored_entries(width: int, size: int, arm: Arm) -> Iterator[Results]:
    """Compressed entries, normed, rotated by their first token's position, in pages: against SGLang's Triton pieces."""
    table = freqs(600)
    plan = torch.tensor([[8, 3, 0, -1, -1], [300, 9, 0, -1, -1], [512, 4, 0, -1, -1]], dtype=I32)
    entries, weight, where = torch.randn(3, width), torch.rand(width) + 0.5, torch.arange(10) * 7
    mine, slots = torch.zeros(3, size, dtype=torch.uint8), where[plan[:, 1].long()]
    compression.norm_rope_store(entries, plan, weight, 1e-6, flat(table), where, mine, False, 4, 64)
    yield {"read": read(mine, slots, 64), "pages": mine}
    wanted = entries.clone()
    op("attention.dsv4.rope:fused_norm_rope_inplace_triton")(wanted, weight, 1e-6, table, plan[:, 0].long() - 4)
    theirs: Results = {"read": (wanted if width == 512 else hadamard(wanted), FP8_TOLERANCE)}
    if width == 512:  # the kernel rounds to bfloat16 before it rounds to fp8
        exact = arithmetic.rope_tail(arithmetic.rms_norm(entries, weight, 1e-6), flat(table), plan[:, 0] - 4)
        theirs["pages"] = torch.zeros_like(mine)
        pages.store_flashmla(exact.bfloat16(), theirs["pages"], slots, 64)
    yield theirs


@case(on="reference")
def output_projection(arm: Arm) -> Iterator[Results]:
    """What replaces SGLang's where activations are float32: its own for bfloat16 is called."""
    from sglang.srt.models import deepseek_v4

    def unused(*_: object, **__: object) -> None:
        raise AssertionError("SGLang's own was called for float32")

    o, weight = torch.randn(5, 2, 64), torch.randn(2, 16, 64).bfloat16()
    theirs = experts.wo_a_matmul(deepseek_v4._apply_wo_a_bf16_matmul)
    yield {
        "float32": experts.wo_a_matmul(unused)(o, weight),
        "bfloat16": theirs(o.bfloat16(), weight, is_decode=False).float(),
    }
    wanted = torch.stack([o[:, group] @ weight[group].float().T for group in range(2)], 1)
    yield {"float32": wanted, "bfloat16": (wanted, TOLERANCES[BF16])}


def attended(q: Tensor, keys: Tensor, sink: Tensor, scale: float) -> Tensor:
    """[heads, 512] of one query [heads, 512] over keys [k, 512], written down as it is defined."""
    scores = torch.cat((q.double() @ keys.double().T * scale, sink.double()[:, None]), 1)
    return torch.softmax(scores, 1)[:, :-1] @ keys.double()


@case(on="reference")
def sparse_attention(arm: Arm) -> Iterator[Results]:
    """Three queries each for itself, and forty that share slots."""
    cache = torch.zeros(4, pool_bytes(PAGE), dtype=torch.uint8)
    pages.store_flashmla(torch.randn(4 * PAGE, 512), cache, torch.arange(4 * PAGE), PAGE)
    view, sink = cache[:, : PAGE * 584].view(4, PAGE, 1, 584), torch.randn(4)
    apart, shared = torch.randint(0, 1000, (3, 1, 16), dtype=I32), torch.arange(300, 316).int().expand(40, 1, 16)
    found: list[Results] = [{}, {}]
    for name, extra in (("apart", apart), ("shared", shared)):
        n = len(extra)
        q = torch.randn(n, 1, 4, 512)
        window = (torch.arange(n)[:, None] + torch.arange(64)).int()
        window[0, 5:] = -1
        found[0][name] = attention.flash_mla_with_kvcache(
            q, view, softmax_scale=0.05, indices=window[:, None], topk_length=torch.full((n,), 60), attn_sink=sink,
            extra_k_cache=view, extra_indices_in_kvcache=extra, extra_topk_length=torch.full((n,), 12, dtype=I32),
        )[0][:, 0]  # fmt: skip
        theirs = []
        for i in range(n):
            slots = torch.cat((window[i, :60][window[i, :60] >= 0], extra[i, 0, :12]))
            theirs.append(attended(q[i, 0], pages.load_flashmla(view, slots), sink, 0.05))
        found[1][name] = torch.stack(theirs).float()
    yield from found


def entries(kv: Tensor, ape: Tensor, ratio: compression.Ratio) -> Tensor:
    """All finished entries of one sequence `kv` [tokens, elements], from the whole of it: what compression is for."""
    found = []
    for end in range(ratio, len(kv) + 1, ratio):
        if ratio == 128:
            rows = kv[end - 128 : end]
        else:
            rows = torch.cat((kv[end - 8 : end - 4] if end > 4 else torch.zeros_like(kv[:4]), kv[end - 4 : end]))
        found.append(compression.pool(rows[None], ape, torch.tensor([end]), ratio)[0])
    return torch.stack(found)


@case(
    on="reference",
    entries_of_128=(128, True, 64),
    entries_of_4_own_ring=(4, True, 128),
    entries_of_4=(4, False, 128),
)
def compressors(ratio: compression.Ratio, own_ring: bool, elements: int, arm: Arm) -> Iterator[Results]:
    """Chunks of any size, then single tokens, through the rings: the entries of the whole sequence, to the bit."""
    tokens = 300
    ape = torch.randn(2 * ratio if ratio == 4 else ratio, elements // (4 if ratio == 4 else 2))
    kv_of = [torch.randn(tokens, elements) for _ in range(2)]
    slots = two_requests(ratio, own_ring)
    buffer = torch.zeros(4 * max(1, slots.ring // ratio), ratio, elements)
    found: list[list[Tensor]] = [[], []]
    at = [0, 0]
    for chunk in ((37, 5), (91, 3), (1, 122), (64, 64), (3, 2)):
        kv = torch.cat([kv_of[i][at[i] : at[i] + n] for i, n in enumerate(chunk)])
        at = [a + n for a, n in zip(at, chunk)]
        plan, kept = compression.plan_prefill(slots, torch.arange(2), torch.tensor(at), torch.tensor(chunk))
        out = torch.empty(len(plan), ape.shape[1])
        compression.compress_prefill(buffer, kv, out, ape, plan, kept, ratio)
        for row, entry in zip(plan[:, 1].tolist(), out):
            found[int(row >= chunk[0])].append(entry)
    while min(at) < tokens:
        live = [i for i in (0, 1) if at[i] < tokens]
        kv = torch.stack([kv_of[i][at[i]] for i in live])
        for i in live:
            at[i] += 1
        plan = compression.plan_decode(slots, torch.tensor(live), torch.tensor([at[i] for i in live]))
        out = torch.empty(len(live), ape.shape[1])
        compression.compress_decode(buffer, kv, out, ape, plan, ratio)
        for i, entry in zip(live, out):
            if at[i] % ratio == 0:
                found[i].append(entry)
    yield {f"sequence {i}": torch.stack(found[i]) for i in (0, 1)}
    yield {f"sequence {i}": (entries(kv_of[i], ape, ratio), 0.0) for i in (0, 1)}


def main() -> None:
    arm = Arm(is_reference=True)
    for each in CASES:
        if "reference" not in each.on:
            continue
        torch.manual_seed(0)
        ours, theirs = each.compute(arm)
        for name, given in theirs.items():
            far, tolerance = difference(value_of(ours[name]), value_of(given)), tolerance_of(given)
            row = {"check": f"{each.name}: {name}", "difference": far, "tolerance": tolerance, "ok": far <= tolerance}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
