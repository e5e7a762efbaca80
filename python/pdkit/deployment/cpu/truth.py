"""Whether the shims compute what SGLang's own kernels do: `python3 -m pdkit.deployment.cpu.truth`, one JSON line a check.

SGLang has many of its kernels in Triton, too, which runs on CPU under TRITON_INTERPRET=1, or in plain torch. Others it
has in CUDA only; of those, what a compressor plans and pools is held against a plain statement of what it is for.
Run it in the environment of a server (`plan.environment`) with TRITON_INTERPRET=1: SGLang's Python modules import there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

import torch

from pdkit.deployment.cpu.shims import (
    arithmetic,
    attention,
    compression,
    experts,
    hyper_connections,
    indexer,
    metadata,
    norm_rope,
    pages,
    speculative,
)

FLOAT32, BFLOAT16 = 1e-5, 2**-7  # tolerated: relative to the largest value, a few roundings
Compared = Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]
CHECKS: list[Callable[[], Compared]] = []
PAGE = 256
PAGE_BYTES = -(-PAGE * (pages.TOKEN + pages.SCALES) // pages.TOKEN) * pages.TOKEN


def check(function: Callable[[], Compared]) -> Callable[[], Compared]:
    """Each yields (name, the shim's, SGLang's, tolerance)."""
    CHECKS.append(function)
    return function


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest value; infinite if shape or dtype differ."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return math.inf
    ours, theirs = ours.double(), theirs.double()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    if bool(same.all()):
        return 0.0
    return float(((ours - theirs).abs() / theirs[theirs.isfinite()].abs().max().clamp_min(1e-30))[~same].max())


def freqs(length: int, size: int = 64) -> torch.Tensor:
    """complex64 [length, size / 2] as SGLang's tables are."""
    steps = torch.arange(length).float()[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    return torch.polar(torch.ones_like(steps), steps)


def flat(table: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(table).flatten(-2)


@check
def hyper() -> Compared:
    from sglang.kernels.ops.layernorm import mhc, mhc_head
    from sglang.srt.models.deepseek_v4 import hc_head_torch

    x, pre = torch.randn(5, 4 * 128).bfloat16(), torch.rand(5, 4)
    yield (
        "mhc_combine",
        hyper_connections.mhc_combine(x, pre, 4, torch.float32),
        mhc.mhc_combine(x, pre, 4, torch.float32),
        FLOAT32,
    )
    mixes, scale, base = torch.randn(5, 1, 24), torch.rand(3), torch.randn(24)
    theirs = mhc._hc_split_sinkhorn_triton(mixes, scale, base, 4, 20, 1e-6)
    for name, ours, each in zip(
        ("pre", "post", "comb"), hyper_connections.hc_split_sinkhorn(mixes, scale, base), theirs
    ):
        yield f"hc_split_sinkhorn {name}", ours, each, FLOAT32
    streams, fn = torch.randn(6, 4, 128).bfloat16(), torch.randn(4, 512)
    given = streams, fn, torch.rand(1), torch.randn(4)
    ours = hc_head_torch(*given, norm_eps=1e-6, hc_eps=1e-6)
    yield "fused_hc_head", ours, mhc_head.fused_hc_head(*given, norm_eps=1e-6, hc_eps=1e-6), BFLOAT16


@check
def rotation() -> Compared:
    from sglang.kernels.ops.attention.dsv4 import rope

    table, positions = freqs(300), torch.tensor([0, 1, 7, 128, 299])
    for inverse in (False, True):
        x = torch.randn(5, 4, 64)
        ours = x.clone()
        norm_rope.fused_rope(ours, None, flat(table), positions, inverse)
        theirs = rope.apply_rotary_emb_triton(x.clone(), table, positions=positions, inverse=inverse)
        yield f"fused_rope, inverse {inverse}", ours, theirs, FLOAT32
    kv, weight = torch.randn(5, 512), torch.rand(512) + 0.5
    ours = arithmetic.rope_tail(arithmetic.rms_norm(kv, weight, 1e-6), flat(table), positions)
    theirs = kv.clone()
    rope.fused_norm_rope_inplace_triton(theirs, weight, 1e-6, table, positions)
    yield "norm and rope of keys", ours, theirs, FLOAT32
    queries = torch.randn(5, 4, 512)
    ours, theirs = torch.empty_like(queries), queries.clone().flatten(0, 1)
    norm_rope.q_norm_rope(queries, ours, flat(table), positions, 1e-6, True)
    rope.fused_norm_rope_inplace_triton(theirs, None, 1e-6, table, positions.repeat_interleave(4))
    yield "norm and rope of queries", ours, theirs.view_as(queries), FLOAT32


def misrounded(scaled: torch.Tensor) -> torch.Tensor:
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


@check
def stored() -> Compared:
    from sglang.kernels.ops.attention.dsv4.dequant_k_cache import dequantize_k_cache_paged_dsv4
    from sglang.kernels.ops.kvcache import triton_store_cache

    rows, where = (
        torch.randn(7, 512) * torch.tensor([0.01, 0.1, 1, 3, 10, 100, 400])[:, None],
        [0, 1, 255, 256, 300, 511, 767],
    )
    rows, where = rows.bfloat16(), torch.tensor(where)
    ours, theirs = (torch.zeros(3, PAGE_BYTES, dtype=torch.uint8) for _ in range(2))
    pages.store_flashmla(rows.float(), ours, where, PAGE)
    triton_store_cache.triton_fused_store_flashmla(rows, theirs, where, PAGE)
    groups = rows[:, :448].float().unflatten(1, (7, 64))
    scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 448)))
    bytes_at = (where // PAGE * PAGE_BYTES + where % PAGE * 576)[:, None] + torch.arange(448)
    skipped = bytes_at[misrounded(groups / scale).flatten(1)]
    theirs.view(-1)[skipped] = ours.view(-1)[skipped]
    yield "FlashMLA pages, bytes", ours, theirs, 0
    view = ours[:, : PAGE * 584].view(3, PAGE, 1, 584)
    read = dequantize_k_cache_paged_dsv4(ours, where.int(), page_size=PAGE)
    yield "FlashMLA pages, read", pages.load_flashmla(view, where).bfloat16(), read.view(7, 512), 0
    rows = (torch.randn(6, 128) * torch.tensor([0.1, 1, 3, 10, 100, 400])[:, None]).bfloat16()
    ours, theirs = (torch.zeros(3, 64 * 132, dtype=torch.uint8) for _ in range(2))
    where = torch.tensor([0, 1, 63, 64, 100, 191])
    pages.store_indexer(rows.float(), ours, where, 64)
    triton_store_cache.triton_fused_store_indexer(rows, theirs, where, 64)
    skipped = (where // 64 * 64 * 132 + where % 64 * 128)[:, None] + torch.arange(128)
    skipped = skipped[misrounded(rows.float() / (rows.float().abs().amax(-1, keepdim=True) / 448))]
    theirs.view(-1)[skipped] = ours.view(-1)[skipped]
    scales = [each[:, 64 * 128 :].contiguous().view(torch.float32) for each in (ours, theirs)]
    yield "indexer pages, bytes", ours[:, : 64 * 128], theirs[:, : 64 * 128], 0
    yield "indexer pages, scales", *scales, FLOAT32


@check
def fp8() -> Compared:
    every = torch.arange(256, dtype=torch.uint8)
    finite = every[(every != 127) & (every != 255)]
    ours = arithmetic.from_fp8(finite).float() * 2.0**120
    theirs = finite.view(torch.float8_e4m3fn).float()
    yield "e4m3 by its bits", ours, theirs, 0
    yield "e4m3 by its bits, as halves", arithmetic.halves(finite).float() * 2.0**8, theirs, 0


@check
def hadamard() -> Compared:
    from scipy.linalg import hadamard as sylvester

    x = torch.randn(3, 128)
    matrix = torch.from_numpy(sylvester(128)).float() * 128**-0.5
    yield "Hadamard transform", arithmetic.hadamard(x), x @ matrix, FLOAT32


@check
def compression_metadata() -> Compared:
    from sglang.kernels.ops.attention.dsv4 import metadata_kernel

    lengths = torch.tensor([4, 7, 128, 300, 512], dtype=torch.int32)
    table = torch.randint(0, 9, (5, 3), dtype=torch.int32)
    given = lengths, lengths - 1, torch.arange(5) * 300 + 255, table, 256
    theirs = metadata_kernel.init_compression_metadata(*given)
    for index, (mine, each) in enumerate(zip(metadata.init_compression_metadata(*given), theirs, strict=True)):
        yield f"compression metadata {index}", mine, each, 0


@check
def drafts() -> Compared:
    from sglang.kernels.ops.kvcache.dsv4_c128_cleanup import clear_unaccepted_c128_draft_states

    ours, theirs = (torch.ones(3 * 130, 1024) for _ in range(2))
    given = torch.tensor([0, 2]), torch.tensor([127, 300]), torch.tensor([1, 2])
    options = {"ring_size": 130, "num_draft_tokens": 3}
    speculative.clear_unaccepted_c128_draft_states(ours, *given, **options)
    clear_unaccepted_c128_draft_states(theirs, *given, **options)
    yield "cleared states of drafts", ours, theirs, 0


@check
def draft_trees() -> Compared:
    """A tree of five drafts, and a chain, built and verified, against SGLang's Triton versions."""
    from sglang.kernels.ops.speculative import spec_tree

    topk, depth, n = 2, 2, 5
    lengths = torch.tensor([9, 14])
    chosen = torch.tensor([[0, 1, 2, 4], [0, 2, 3, 1]])
    given = torch.tensor([[-1, 0, 1], [-1, 0, 1]]), chosen, lengths
    candidates = torch.tensor([[3, 5, 7, 9, 11], [4, 6, 8, 10, 12]])
    target = torch.tensor([[5, 9, 7, 2, 2], [6, 8, 10, 2, 2]])
    found = []
    for ours in (True, False):
        mask = torch.ones(int(lengths.sum()) * n + n * n * 2, dtype=torch.bool)
        positions = torch.zeros(2 * n, dtype=torch.int64)
        tree = [torch.full((2, n), fill) for fill in (0, -1, -1)]
        build: Callable[..., None] = spec_tree.sgl_build_tree_kernel_triton
        if ours:
            build = speculative.build_tree_kernel_efficient_cpu
        build(*given, mask, positions, *tree, topk, depth, n, spec_tree.TreeMaskMode.FULL_MASK)
        predicts, index = torch.full((2 * n,), -1), torch.full((2, depth + 1), -1)
        count = torch.zeros(2, dtype=torch.int64)
        verified = predicts, index, count, candidates, *tree, target
        if ours:
            speculative.verify_tree_greedy_cpu(*verified)
        else:
            spec_tree.verify_tree_greedy_kernel_triton[(2,)](
                *verified, batch_size=2, num_speculative_tokens=depth + 1, num_draft_tokens=n
            )
        found.append((mask, positions, *tree, predicts, index, count))
    names = "mask", "positions", "index", "next token", "next sibling", "predicts", "accepted", "count"
    for name, mine, theirs in zip(names, *found, strict=True):
        yield f"draft tree, {name}", mine, theirs, 0


@check
def draft_slots() -> Compared:
    """Against the Triton kernels behind SGLang's functions, which on CPU call ours."""
    from sglang.kernels.ops.speculative import cache_locs, eagle

    requests, table, lengths = torch.tensor([2, 0]), torch.arange(160).int().view(4, 40), torch.tensor([7, 19])
    ours, theirs = (torch.empty(6, dtype=torch.int64) for _ in range(2))
    speculative.assign_draft_cache_locs_contiguous_cpu(requests, table, lengths, ours, 40, 1, 3)
    cache_locs.assign_draft_cache_locs_contiguous[(2,)](requests, table, lengths, theirs, 40, 1, 3)
    yield "slots of drafts", ours, theirs, 0
    ends = lengths + torch.tensor([2, 3])
    ours, theirs = (torch.empty(5, dtype=torch.int64) for _ in range(2))
    speculative.assign_extend_cache_locs_cpu(requests, table, lengths, ends, ours, 40)
    cache_locs.assign_extend_cache_locs[(2,)](requests, table, lengths, ends, theirs, 40, 2)
    yield "slots of an extension", ours, theirs, 0
    entered = torch.zeros_like(table)
    speculative.assign_req_to_token_pool_cpu(requests, entered, lengths, ends, theirs, 40)
    again = torch.empty(5, dtype=torch.int64)
    cache_locs.assign_extend_cache_locs[(2,)](requests, entered, lengths, ends, again, 40, 2)
    yield "slots that were entered", again, theirs, 0
    tokens, counts = torch.arange(100, 106), torch.tensor([1, 3])
    ours, theirs = (torch.empty(2, dtype=torch.int64) for _ in range(2))
    speculative.fill_bonus_tokens_cpu(tokens, counts, ours, 3)
    eagle.fill_bonus_tokens[(2,)](tokens, counts, theirs, 3)
    yield "last accepted tokens", ours, theirs, 0
    accepted, where = torch.tensor([3, -1, 0, -1, 4, 5]), torch.arange(10, 16)
    ours, theirs = (torch.zeros(6, dtype=torch.int64) for _ in range(2))
    speculative.fill_accept_out_cache_loc_cpu(accepted, where, ours)
    eagle.fill_accept_out_cache_loc[(6,)](accepted, where, theirs, 8)
    yield "slots of accepted tokens", ours, theirs, 0


@check
def indexer_scores() -> Compared:
    from sglang.srt.layers.attention.dsv4.indexer import fp8_paged_mqa_logits_torch

    cache = torch.zeros(20, 64 * 132, dtype=torch.uint8)
    pages.store_indexer(torch.randn(20 * 64, 128), cache, torch.arange(20 * 64), 64)
    for n, width in ((1, 3), (7, 5)):
        queries = torch.randn(n, 1, 8, 128).to(torch.float8_e4m3fn)
        lengths = torch.randint(1, width * 64 - 70, (n,), dtype=torch.int32)
        table = torch.randint(0, 20, (n, width), dtype=torch.int32)
        given = queries, cache.view(20, 64, 1, 132), torch.rand(n, 8), lengths, table, None, width * 64 + 32, False
        yield f"scores of {n}", indexer.fp8_paged_mqa_logits_torch(*given), fp8_paged_mqa_logits_torch(*given), 0


@check
def clamped() -> Compared:
    from sglang.srt.layers.activation import SiluAndMul

    x, out = torch.randn(4, 256), torch.empty(4, 128)
    experts.silu_and_mul_clamp(x, out, 1e9)
    yield "silu, without a limit", out, SiluAndMul().forward_native(x), FLOAT32
    experts.silu_and_mul_clamp(x * 20, out, 10.0)
    gate, up = (x * 20).chunk(2, -1)
    gate, up = gate.clamp_max(10), up.clamp(-10, 10)
    yield "silu, with a limit", out, gate / (1 + torch.exp(-gate)) * up, FLOAT32


@check
def routed_experts() -> Compared:
    """Each row by itself, expert by expert, against SGLang's torch version without a limit and a plain statement with one."""
    from types import SimpleNamespace

    from sglang.srt.layers.activation import SiluAndMul

    layer = SimpleNamespace(w13_weight=torch.randn(4, 256, 96) / 8, w2_weight=torch.randn(4, 96, 128) / 8)
    x, weights = torch.randn(7, 96), torch.rand(7, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    for limit in (None, 1.0):
        config = SimpleNamespace(apply_router_weight_on_input=False, swiglu_limit=limit)
        ours = experts.moe_forward_native(layer, x, (weights, ids), config)
        theirs = torch.zeros(7, 96)
        for row in range(7):
            for weight, expert in zip(weights[row], ids[row].tolist()):
                hidden = layer.w13_weight[expert] @ x[row]
                if limit is not None:
                    hidden = torch.cat((hidden[:128].clamp(max=limit), hidden[128:].clamp(-limit, limit)))
                theirs[row] += weight * (layer.w2_weight[expert] @ SiluAndMul().forward_native(hidden))
        yield f"routed experts, limit {limit}", ours, theirs, FLOAT32


@check
def indexer_queries() -> Compared:
    """Rotated, transformed and in fp8, against the definition; the scales go into the heads' weights."""
    from scipy.linalg import hadamard as sylvester
    from sglang.kernels.ops.attention.dsv4 import rope

    table, positions = freqs(300), torch.tensor([0, 5, 299])
    q, weight = torch.randn(3, 8, 128), torch.randn(3, 8)
    q_fp8, weights = torch.empty(3, 8, 128, dtype=arithmetic.FP8), torch.empty(3, 8, 1)
    norm_rope.q_indexer(q, q_fp8, weight, weights, 0.125, flat(table), positions)
    rotated = q.clone()
    rotated[..., 64:] = rope.apply_rotary_emb_triton(q[..., 64:].contiguous(), table, positions=positions)
    wanted = rotated @ torch.from_numpy(sylvester(128)).float() * 128**-0.5
    scale = wanted.abs().amax(-1, keepdim=True) / 448
    yield "indexer's weights", weights, weight[..., None] * 0.125 * scale, FLOAT32
    yield "indexer's queries", q_fp8.float() * scale, wanted, 2**-4


@check
def stored_entries() -> Compared:
    """Compressed entries, normed, rotated by their first token's position, in pages: against SGLang's Triton pieces."""
    from sglang.kernels.ops.attention.dsv4 import rope

    table = freqs(600)
    plan = torch.tensor([[8, 3, 0, -1, -1], [300, 9, 0, -1, -1], [512, 4, 0, -1, -1]], dtype=torch.int32)
    for width in (512, 128):
        entries_, weight, where = torch.randn(3, width), torch.rand(width) + 0.5, torch.arange(10) * 7
        size = 64 * 132 if width == 128 else -(-64 * 584 // 576) * 576
        ours = torch.zeros(3, size, dtype=torch.uint8)
        compression.norm_rope_store(entries_, plan, weight, 1e-6, flat(table), where, ours, False, 4, 64)
        wanted = entries_.clone()
        rope.fused_norm_rope_inplace_triton(wanted, weight, 1e-6, table, plan[:, 0].long() - 4)
        slots = where[plan[:, 1].long()]
        if width == 512:
            read = pages.load_flashmla(ours[:, : 64 * 584].view(3, 64, 1, 584), slots)
        else:
            wanted = arithmetic.hadamard(wanted)
            values = ours[:, : 64 * 128].reshape(-1, 128)[slots].view(arithmetic.FP8).float()
            read = values * ours[:, 64 * 128 :].contiguous().view(torch.float32).view(-1)[slots][:, None]
        yield f"stored entries of {width}", read, wanted, 2**-4
        if width == 512:  # the kernel rounds to bfloat16 before it rounds to fp8
            exact = arithmetic.rope_tail(arithmetic.rms_norm(entries_, weight, 1e-6), flat(table), plan[:, 0] - 4)
            twice = torch.zeros_like(ours)
            pages.store_flashmla(exact.bfloat16(), twice, slots, 64)
            yield "stored entries of 512, bytes", ours, twice, 0


@check
def output_projection() -> Compared:
    """What replaces SGLang's where activations are float32: its own for bfloat16 is called."""
    from sglang.srt.models import deepseek_v4

    def unused(*_: object, **__: object) -> None:
        raise AssertionError("SGLang's own was called for float32")

    o, weight = torch.randn(5, 2, 64), torch.randn(2, 16, 64).bfloat16()
    wanted = torch.stack([o[:, group] @ weight[group].float().T for group in range(2)], 1)
    yield "grouped projection, float32", experts.wo_a_matmul(unused)(o, weight), wanted, FLOAT32
    same = experts.wo_a_matmul(deepseek_v4._apply_wo_a_bf16_matmul)(o.bfloat16(), weight, is_decode=False)
    yield "grouped projection, bfloat16", same.float(), wanted, BFLOAT16


def attended(q: torch.Tensor, keys: torch.Tensor, sink: torch.Tensor, scale: float) -> torch.Tensor:
    """[heads, 512] of one query [heads, 512] over keys [k, 512], written down as it is defined."""
    scores = torch.cat((q.double() @ keys.double().T * scale, sink.double()[:, None]), 1)
    return torch.softmax(scores, 1)[:, :-1] @ keys.double()


@check
def sparse_attention() -> Compared:
    cache = torch.zeros(4, PAGE_BYTES, dtype=torch.uint8)
    pages.store_flashmla(torch.randn(4 * PAGE, 512), cache, torch.arange(4 * PAGE), PAGE)
    view, sink = cache[:, : PAGE * 584].view(4, PAGE, 1, 584), torch.randn(4)
    for name, n in (("each for itself", 3), ("slots that queries share", 40)):
        q = torch.randn(n, 1, 4, 512)
        window = (torch.arange(n)[:, None] + torch.arange(64)).int()
        window[0, 5:] = -1
        extra = (
            torch.randint(0, 1000, (n, 1, 16), dtype=torch.int32)
            if n == 3
            else torch.arange(300, 316).int().expand(n, 1, 16)
        )
        count = torch.full((n,), 12, dtype=torch.int32)
        ours, _ = attention.flash_mla_with_kvcache(
            q, view, softmax_scale=0.05, indices=window[:, None], topk_length=torch.full((n,), 60), attn_sink=sink,
            extra_k_cache=view, extra_indices_in_kvcache=extra, extra_topk_length=count,
        )  # fmt: skip
        theirs = []
        for i in range(n):
            slots = torch.cat((window[i, :60][window[i, :60] >= 0], extra[i, 0, :12]))
            theirs.append(attended(q[i, 0], pages.load_flashmla(view, slots), sink, 0.05))
        yield f"sparse attention, {name}", ours[:, 0], torch.stack(theirs).float(), FLOAT32


def entries(kv: torch.Tensor, ape: torch.Tensor, ratio: compression.Ratio) -> torch.Tensor:
    """All finished entries of one sequence `kv` [tokens, elements], from the whole of it: what compression is for."""
    found = []
    for end in range(ratio, len(kv) + 1, ratio):
        if ratio == 128:
            rows = kv[end - 128 : end]
        else:
            rows = torch.cat((kv[end - 8 : end - 4] if end > 4 else torch.zeros_like(kv[:4]), kv[end - 4 : end]))
        found.append(compression.pool(rows[None], ape, torch.tensor([end]), ratio)[0])
    return torch.stack(found)


@check
def compressors() -> Compared:
    """Chunks of any size, then single tokens, through the rings: the entries of the whole sequence, to the bit."""
    kinds: list[tuple[compression.Ratio, bool, int, int]] = [
        (128, True, 64, 128),
        (4, True, 128, 8),
        (4, False, 128, 8),
    ]
    for ratio, own_ring, elements, ring in kinds:
        tokens = 300
        ape = torch.randn(2 * ratio if ratio == 4 else ratio, elements // (4 if ratio == 4 else 2))
        sequences = [torch.randn(tokens, elements) for _ in range(2)]
        req_to_token = torch.stack((torch.arange(512), 512 + torch.arange(512))).int()
        full_to_state = torch.randperm(4)[:, None] * 256 + torch.arange(256)  # pages of 256, in another order
        slots = compression.Slots(ratio, req_to_token, full_to_state.flatten(), 256, ring, own_ring)
        buffer = torch.zeros(4 * max(1, ring // ratio), ratio, elements)
        found: list[list[torch.Tensor]] = [[], []]
        at = [0, 0]
        for chunk in ((37, 5), (91, 3), (1, 122), (64, 64), (3, 2)):
            kv = torch.cat([sequences[i][at[i] : at[i] + n] for i, n in enumerate(chunk)])
            at = [a + n for a, n in zip(at, chunk)]
            plan, kept = compression.plan_prefill(slots, torch.arange(2), torch.tensor(at), torch.tensor(chunk))
            out = torch.empty(len(plan), ape.shape[1])
            compression.compress_prefill(buffer, kv, out, ape, plan, kept, ratio)
            for row, entry in zip(plan[:, 1].tolist(), out):
                found[int(row >= chunk[0])].append(entry)
        while min(at) < tokens:
            live = [i for i in (0, 1) if at[i] < tokens]
            kv = torch.stack([sequences[i][at[i]] for i in live])
            for i in live:
                at[i] += 1
            plan = compression.plan_decode(slots, torch.tensor(live), torch.tensor([at[i] for i in live]))
            out = torch.empty(len(live), ape.shape[1])
            compression.compress_decode(buffer, kv, out, ape, plan, ratio)
            for i, entry in zip(live, out):
                if at[i] % ratio == 0:
                    found[i].append(entry)
        for i in (0, 1):
            name = f"entries of {ratio} tokens, a ring of {'its own' if own_ring else 'its pages'}, sequence {i}"
            yield name, torch.stack(found[i]), entries(sequences[i], ape, ratio), 0


def main() -> None:
    torch.manual_seed(0)
    for function in CHECKS:
        for name, ours, theirs, tolerance in function():
            far = difference(ours, theirs)
            print(
                json.dumps({"check": name, "difference": far, "tolerance": tolerance, "ok": far <= tolerance}),
                flush=True,
            )


if __name__ == "__main__":
    main()
