"""The compressors: which slots of their rings a batch reads and writes, and what they pool: dsv4/compress.py.

A compressed entry stands for `ratio` tokens: 128 that follow each other, or 4 that share a window of 8 with the four
before. Tokens of an unfinished entry wait in a ring of a request's own (c128) or of its page of the window pool (c4).
"""

from __future__ import annotations

import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from pdkit.deployment.cpu.registry import replaces
from pdkit.deployment.cpu.shims.arithmetic import hadamard, rms_norm, rope_tail
from pdkit.deployment.cpu.shims.norm_rope import CSRC, require_layout
from pdkit.deployment.cpu.shims.pages import INDEXER, store_flashmla, store_indexer

COMPRESS = "sglang.kernels.ops.attention.dsv4.compress"
PLAN = (f"{CSRC}/c_plan.cuh", "kernels/jit/include/sgl_kernel/deepseek_v4/compress_v2.cuh")
Ratio = Literal[4, 128]


class Slots:
    """Where in the state pool the token of a request at a position is kept.

    req_to_token   [requests, positions] int32, slots of the whole pool
    full_to_state  [slots] int64, slots of the window pool, of which each page of `swa_page` tokens has a ring
    ring           tokens of a ring; one for each request if `use_req_ring` or for 128 tokens an entry
    """

    def __init__(
        self, ratio: Ratio, req_to_token: Tensor, full_to_state: Tensor, swa_page: int, ring: int, use_req_ring: bool
    ) -> None:
        self.ratio, self.swa_page, self.ring = ratio, swa_page, ring
        self.own = ratio == 128 or use_req_ring
        self.req_to_token, self.full_to_state = req_to_token, full_to_state

    def at(self, requests: Tensor, positions: Tensor) -> Tensor:
        """int64 [n]; `requests`, `positions` [n] int64."""
        if self.own:
            return requests * self.ring + positions % self.ring
        where = self.full_to_state[self.req_to_token[requests, positions].long()]
        return where // self.swa_page * self.ring + where % self.ring

    def pages(self, requests: Tensor, positions: Tensor) -> Tensor:
        """[n, 2] pages of `ratio` slots: of the token `ratio` before, and of this one."""
        before = (positions - self.ratio).clamp_min(0)
        return torch.stack((self.at(requests, before), self.at(requests, positions)), 1) // self.ratio


def plan_prefill(slots: Slots, requests: Tensor, seq_lens: Tensor, extend_lens: Tensor) -> tuple[Tensor, Tensor]:
    """(what is pooled, what is kept) of a batch whose sequences grow by `extend_lens` to `seq_lens`, each [batch].

    Pooled: int32 [n, 5], for each finished entry its end, the row of its last token in the batch, how many tokens of
    its window are in the ring, and the ring's two pages (-1: nothing to read). Kept: int32 [m, 2], row and slot. The
    same numbers as plan_compress_prefill_kernel of c_plan.cuh, there packed into 16 and 8 bytes, in the order of rows.
    """
    ratio, overlap = slots.ratio, slots.ratio == 4
    window = 2 * ratio if overlap else ratio
    padding = slots.ring - window + 2 if slots.ring > window else 0
    seq_lens, extend_lens = seq_lens.long(), extend_lens.long()
    row = torch.arange(int(extend_lens.sum()))
    sequence = torch.repeat_interleave(torch.arange(len(extend_lens)), extend_lens)
    step = row - (torch.cumsum(extend_lens, 0) - extend_lens)[sequence]
    position = (seq_lens - extend_lens)[sequence] + step
    request = requests.long()[sequence]

    done = (position + 1) % ratio == 0
    buffered = (window - (step[done] + 1)).clamp_min(0)
    pages = torch.full((len(buffered), 2), -1)
    some = buffered > 0
    pages[some] = slots.pages(request[done][some], position[done][some])
    pooled = torch.cat((torch.stack((position[done] + 1, row[done], buffered), 1), pages), 1)

    first = torch.minimum(seq_lens // ratio * ratio - (ratio if overlap else 0), seq_lens - padding)[sequence]
    keep = position >= first
    if overlap and not slots.own:
        keep |= position % slots.swa_page >= slots.swa_page - ratio
    kept = torch.stack((row[keep], slots.at(request[keep], position[keep])), 1)
    return pooled.int(), kept.int()


def plan_decode(slots: Slots, requests: Tensor, seq_lens: Tensor) -> Tensor:
    """int32 [batch, 4]: length, slot of the last token, the ring's two pages; plan_compress_decode_kernel."""
    requests, position = requests.long(), (seq_lens.long() - 1).clamp_min(0)
    here = slots.at(requests, position)
    here = torch.where(seq_lens > 0, here, 0)  # padded rows
    before = slots.pages(requests, position)[:, 0]
    return torch.stack((seq_lens.long(), here, before, here // slots.ratio), 1).int()


def pool(rows: Tensor, ape: Tensor, ends: Tensor, ratio: Ratio) -> Tensor:
    """Entries [n, d] float32 of the tokens in their windows: a softmax over the window in each dimension.

    rows  [n, 128, 2d] (key and score) or [n, 8, 4d] (key and score as one of the first four, then as one of the last)
    ape   [window, d], added to the scores. ends: [n], lengths at which the entries end; the first has no four before it
    """
    if ratio == 128:
        kv, score = rows.chunk(2, -1)
    else:
        d = rows.shape[-1] // 4
        old, new = rows[:, :4], rows[:, 4:]
        kv = torch.cat((old[..., :d], new[..., d : 2 * d]), 1)
        score = torch.cat((old[..., 2 * d : 3 * d], new[..., 3 * d :]), 1)
        absent = (ends <= 4)[:, None, None] & (torch.arange(8) < 4)[None, :, None]
        kv, score = kv.masked_fill(absent, 0), score.masked_fill(absent, -3.4e38)
    return (kv * torch.softmax(score + ape.float(), 1)).sum(1)


def compress_prefill(
    buffer: Tensor, kv_in: Tensor, out: Tensor, ape: Tensor, pooled: Tensor, kept: Tensor, ratio: Ratio
) -> None:
    """`out`[i] = entry i of the plan; then the rows of `kv_in` that the plan keeps go into the ring.

    buffer [pages, ratio, elements]; kv_in [tokens, elements]; out [n, d]; see `pool` and `plan_prefill`
    """
    if len(pooled):
        window = 2 * ratio if ratio == 4 else ratio
        end, last, buffered, page0, page1 = pooled.long().unbind(1)
        at = torch.arange(window)
        rows = kv_in[(last[:, None] + 1 - window + at).clamp_min(0)].float()
        pages = torch.stack((page0, page1), 1) if ratio == 4 else page1[:, None]
        some = buffered > 0
        if bool(some.any()):
            ring = buffer[pages[some]].flatten(1, 2).float()
            rows[some] = torch.where((at < buffered[some][:, None])[..., None], ring, rows[some])
        out.copy_(pool(rows, ape, end, ratio))
    buffer.view(-1, buffer.shape[-1])[kept[:, 1].long()] = kv_in[kept[:, 0].long()].to(buffer.dtype)


def compress_decode(buffer: Tensor, kv_in: Tensor, out: Tensor, ape: Tensor, plan: Tensor, ratio: Ratio) -> None:
    """The rows of `kv_in` [batch, elements] go into the ring; `out`[i] = the entry, where sequence i finished one."""
    length, here, page0, page1 = plan.long().unbind(1)
    buffer.view(-1, buffer.shape[-1])[here] = kv_in.to(buffer.dtype)
    done = ((length > 0) & (length % ratio == 0)).nonzero().flatten()
    if len(done):
        pages = torch.stack((page0[done], page1[done]), 1) if ratio == 4 else page1[done][:, None]
        out[done] = pool(buffer[pages].flatten(1, 2).float(), ape, length[done], ratio).to(out.dtype)


def norm_rope_store(
    kv: Tensor,
    plan: Tensor,
    weight: Tensor,
    eps: float,
    freqs: Tensor,
    out_loc: Tensor,
    cache: Tensor,
    is_decode: bool,
    ratio: Ratio,
    page_size: int,
) -> None:
    """Entries `kv` [n, 512] (FlashMLA pool) or [n, 128] (indexer's), normed, rotated by their first token's position.

    out_loc: slot of the compressed pool for each row of the batch; for decode an entry is stored where one was finished
    """
    rows = (plan[:, 0] % ratio == 0).nonzero().flatten() if is_decode else torch.arange(plan.shape[0])
    if not len(rows):
        return
    loc = out_loc[rows] if is_decode else out_loc[plan[:, 1].long()]
    x = rope_tail(rms_norm(kv[rows], weight, eps), freqs, plan[rows, 0] - ratio)
    if kv.shape[-1] == INDEXER:
        store_indexer(hadamard(x), cache, loc, page_size)
    else:
        store_flashmla(x.bfloat16(), cache, loc, page_size)  # rounded twice, as fused_norm_rope_v2.cuh does


@replaces(f"{COMPRESS}:_jit_compress_module", imitates=(f"{CSRC}/c4_v2.cuh", f"{CSRC}/c128_v2.cuh"))
def compress_module(head_dim: int, buffer: torch.dtype, kv: torch.dtype, out: torch.dtype, ratio: Ratio) -> Any:
    """pooling of 4 or 128 tokens"""
    return SimpleNamespace(
        decode=partial(compress_decode, ratio=ratio),
        prefill=partial(compress_prefill, ratio=ratio),
    )


@replaces(f"{COMPRESS}:_jit_compress_norm_rope_module", imitates=(f"{CSRC}/fused_norm_rope_v2.cuh",))
def compress_norm_rope_module(
    dtype: torch.dtype, head_dim: int, rope_dim: int, page_size: int, bf16_store: bool, layout: Any, two: bool = False
) -> SimpleNamespace:
    """norm and rotary embedding of compressed entries, written as fp8 pages"""
    require_layout(layout)
    if bf16_store or two:
        raise NotImplementedError("compressed entries as bf16 or in two pools: the CPU shims have fp8 in one pool only")
    return SimpleNamespace(forward=partial(norm_rope_store, page_size=page_size))


@replaces(f"{COMPRESS}:CompressorPrefillPlan.generate", imitates=PLAN)
def generate_prefill(
    compress_ratio: Ratio,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    extend_lens: Tensor,
    req_to_token: Tensor,
    full_to_state: Tensor,
    swa_page_size: int,
    ring_size: int,
    num_q_tokens: int,
    use_cuda_graph: bool = False,
    use_req_ring: bool = False,
) -> Any:
    """which slots of the rings a prefill reads and writes"""
    slots = Slots(compress_ratio, req_to_token, full_to_state, swa_page_size, ring_size, use_req_ring)
    plans = plan_prefill(slots, req_pool_indices, seq_lens, extend_lens)
    return importlib.import_module(COMPRESS).CompressorPrefillPlan(compress_ratio, *plans)


@replaces(f"{COMPRESS}:CompressorDecodePlan.generate", imitates=PLAN)
def generate_decode(
    compress_ratio: Ratio,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    full_to_state: Tensor,
    seq_lens: Tensor,
    swa_page_size: int,
    ring_size: int,
    use_req_ring: bool = False,
) -> Any:
    """which slots of the rings a decode step reads and writes"""
    slots = Slots(compress_ratio, req_to_token, full_to_state, swa_page_size, ring_size, use_req_ring)
    plan = plan_decode(slots, req_pool_indices, seq_lens)
    return importlib.import_module(COMPRESS).CompressorDecodePlan(compress_ratio, plan)
