"""Sparse attention over FlashMLA pages: kernels/ops/attention/flash_mla_interface.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pdkit.deployment.cpu.registry import remakes, replaces
from pdkit.deployment.cpu.shims.pages import NOPE, ROPE, load_flashmla

INTERFACE = "sglang.kernels.ops.attention.flash_mla_interface"
BACKEND = "sglang.srt.layers.attention.deepseek_v4_backend"
AT_ONCE = 256  # queries
SHARED = 4  # slots that are named so often each are read once for all queries

Keys = tuple[Tensor, Tensor]  # keys, and which of them each query attends to
Named = tuple[Tensor, Tensor, Tensor]  # a pool, the slots that each query names, which of them count


def _valid(indices: Tensor, lengths: Tensor | None) -> Tensor:
    valid = indices >= 0
    if lengths is not None:
        valid &= torch.arange(indices.shape[1]) < lengths.reshape(-1, 1)
    return valid


def _of_all(pools: Sequence[Named]) -> Keys | None:
    """Keys [u, 512] float32 of all slots that are named, [n, u] for whom; None if few of a pool are named by several queries.

    In the order in which they are first named, so that sums do not depend on which slots a request happens to have.
    """
    if len(pools[0][1]) < SHARED:
        return None
    found = []
    for cache, indices, valid in pools:
        row, _ = valid.nonzero(as_tuple=True)
        slots, which = torch.unique(indices[valid], return_inverse=True)
        if SHARED * len(slots) > len(which):
            return None
        first = torch.full((len(slots),), len(which)).scatter_reduce_(0, which, torch.arange(len(which)), "amin")
        order = first.argsort()
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        attends = torch.zeros(len(indices), len(slots), dtype=torch.bool)
        attends[row, rank[which]] = True
        found.append((load_flashmla(cache, slots[order]), attends))
    return torch.cat([keys for keys, _ in found]), torch.cat([attends for _, attends in found], 1)


def _of_each(pools: Sequence[Named]) -> Keys:
    """Keys [n, k, 512] float32 of all pools, and where there are any, [n, k]; k: as many as one query has.

    Where there is none stands another key of the same query, whose weight is 0: it is finite, as a free slot's need not be.
    """
    cut = []
    for cache, indices, valid in pools:
        used = valid.any(0).nonzero()
        width = int(used[-1]) + 1 if len(used) else 0
        cut.append((cache, indices[:, :width], valid[:, :width], width))
    keys = torch.empty(len(pools[0][1]), sum(width for *_, width in cut), NOPE + ROPE)
    begin = 0
    for cache, indices, valid, width in cut:
        if not width:
            continue
        part = keys[:, begin : begin + width]
        begin += width
        other = torch.where(valid, indices, -1).amax(1)
        load_flashmla(cache, torch.where(valid, indices, other.clamp_min(0)[:, None]), part)
        if bool((other < 0).any()):
            part[other < 0] = 0
    return keys, torch.cat([valid for _, _, valid, _ in cut], 1)


def _attend(q: Tensor, found: Keys, sink: Tensor, scale: float, width: int) -> Tensor:
    """Output [n, heads, width] float32 of `q` [n, heads, 512] over keys of all pools together."""
    keys, valid = found
    scores = torch.matmul(q, keys.transpose(-1, -2)) * scale
    scores = scores.masked_fill_(~valid[:, None], float("-inf"))
    weights = torch.cat((scores, sink.expand(*scores.shape[:2], 1)), -1).softmax(-1)[..., :-1]
    return torch.matmul(weights, keys[..., :width])


@replaces(f"{INTERFACE}:flash_mla_with_kvcache", why="attention over selected slots of fp8 pages, with a sink")
def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    head_dim_v: int = 512,
    tile_scheduler_metadata: Any = None,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    *,
    indices: Tensor,
    topk_length: Tensor | None = None,
    attn_sink: Tensor,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """(output [n, 1, heads, head_dim_v] in the dtype of `q`, None): each query attends to the slots that it names.

    q                 [n, 1, heads, 512]
    k_cache, extra_*  the window's pool and that of compressed entries: [pages, page_size, 1, 584] bytes, the slots of
                      each query [n, 1, k] int32 (-1: none) and how many of them count, [n]
    attn_sink         [heads], a score that takes part in the softmax and has no value
    """
    n, _one, heads, dim = q.shape
    softmax_scale = dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.empty(n, 1, heads, head_dim_v, dtype=q.dtype)
    sink = attn_sink.float().view(1, -1, 1)
    pools = ((k_cache, indices, topk_length), (extra_k_cache, extra_indices_in_kvcache, extra_topk_length))
    for begin in range(0, n, AT_ONCE):
        part = slice(begin, min(begin + AT_ONCE, n))
        named: list[Named] = []
        for cache, where, length in pools:
            if cache is not None and where is not None:
                slots = where[part].reshape(part.stop - begin, -1)
                named.append((cache, slots, _valid(slots, None if length is None else length[part])))
        found = _of_all(named) or _of_each(named)
        out[part, 0] = _attend(q[part, 0].float(), found, sink, softmax_scale, head_dim_v).to(q.dtype)
    return out, None


@replaces(f"{INTERFACE}:get_mla_metadata")
def get_mla_metadata(*_: Any, **__: Any) -> tuple[None, None]:
    """a schedule of GPU blocks"""
    return None, None


@remakes(f"{BACKEND}:DeepseekV4AttnBackend._flash_mla_with_kvcache", adds=True)
def backend_attention(_: None) -> Any:
    """set by the backend's __init__ on CUDA only"""
    return staticmethod(flash_mla_with_kvcache)
