"""Sparse attention over FlashMLA pages: kernels/ops/attention/flash_mla_interface.py."""

from __future__ import annotations

from typing import Any

import torch

from pdkit.deployment.cpu.registry import remakes, replaces
from pdkit.deployment.cpu.shims.pages import load_flashmla

INTERFACE = "sglang.kernels.ops.attention.flash_mla_interface"
BACKEND = "sglang.srt.layers.attention.deepseek_v4_backend"
AT_ONCE = 256  # queries
SHARED = 4  # slots that are named so often each are read once for all queries

Keys = tuple[torch.Tensor, torch.Tensor]  # keys, and which of them each query attends to


def _valid(indices: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    valid = indices >= 0
    if lengths is not None:
        valid &= torch.arange(indices.shape[1]) < lengths.reshape(-1, 1)
    return valid


def _of_all(cache: torch.Tensor, indices: torch.Tensor, valid: torch.Tensor) -> Keys | None:
    """Keys [u, 512] float32 of all slots that are named, [n, u] for whom; None if few are named by several queries.

    In the order in which they are first named, so that sums do not depend on which slots a request happens to have.
    """
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
    return load_flashmla(cache, slots[order]), attends


def _of_each(cache: torch.Tensor, indices: torch.Tensor, valid: torch.Tensor) -> Keys:
    """Keys [n, k, 512] float32, and where there are any, [n, k]; k: as many as one query has.

    Where there is none stands another key of the same query, whose weight is 0: it is finite, as a free slot's need not be.
    """
    used = valid.any(0).nonzero()
    width = int(used[-1]) + 1 if len(used) else 0
    indices, valid = indices[:, :width], valid[:, :width]
    if not width:
        return load_flashmla(cache, indices), valid
    other = torch.where(valid, indices, -1).amax(1)
    keys = load_flashmla(cache, torch.where(valid, indices, other.clamp_min(0)[:, None]))
    if bool((other < 0).any()):
        keys[other < 0] = 0
    return keys, valid


def _attend(q: torch.Tensor, found: list[Keys], sink: torch.Tensor, scale: float, width: int) -> torch.Tensor:
    """Output [n, heads, width] float32 of `q` [n, heads, 512] over the keys of all pools together."""
    keys, valid = torch.cat([each for each, _ in found], -2), torch.cat([each for _, each in found], 1)
    scores = torch.matmul(q, keys.transpose(-1, -2)) * scale
    scores = scores.masked_fill_(~valid[:, None], float("-inf"))
    weights = torch.cat((scores, sink.expand(*scores.shape[:2], 1)), -1).softmax(-1)[..., :-1]
    return torch.matmul(weights, keys[..., :width])


@replaces(f"{INTERFACE}:flash_mla_with_kvcache", why="attention over selected slots of fp8 pages, with a sink")
def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    head_dim_v: int = 512,
    tile_scheduler_metadata: Any = None,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    *,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
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
        named = []
        for cache, where, length in pools:
            if cache is not None and where is not None:
                slots = where[part].reshape(part.stop - begin, -1)
                named.append((cache, slots, _valid(slots, None if length is None else length[part])))
        of_all = [_of_all(*each) for each in named]
        found = [each for each in of_all if each is not None]
        if len(found) < len(of_all):
            found = [_of_each(*each) for each in named]
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
