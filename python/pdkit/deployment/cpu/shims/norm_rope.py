"""Norm, rotary embedding, quantisation and store of queries and keys: kernels/ops/attention/dsv4/{norm_rope,attn}.py.

SGLang compiles CUDA modules behind `_jit_*_module` getters; what stands in their place has the same entry points.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from pdkit.deployment.cpu.registry import replaces
from pdkit.deployment.cpu.shims.arithmetic import amax_scale, hadamard, rms_norm, rope, rope_tail, to_fp8
from pdkit.deployment.cpu.shims.pages import store_flashmla, store_indexer

NORM_ROPE = "sglang.kernels.ops.attention.dsv4.norm_rope"
CSRC = "kernels/jit/csrc/deepseek_v4"
MAIN, STORE = (f"{CSRC}/main_norm_rope.cuh",), (f"{CSRC}/store.cuh",)


def fused_rope(q: Tensor, k: Tensor | None, freqs: Tensor, positions: Tensor, inverse: bool) -> None:
    """In place: `q` [n, heads, rope] and, if given, `k` [n, heads, rope], both of one dtype."""
    for x in (q, k):
        if x is not None:
            x.copy_(rope(x, freqs, positions, inverse))


def q_norm_rope(q_in: Tensor, q_out: Tensor, freqs: Tensor, positions: Tensor, eps: float, norm: bool) -> None:
    """`q_out` = `q_in` [n, heads, 512], normed without a weight if `norm`, its last dimensions rotated."""
    x = rms_norm(q_in, None, eps).to(q_in.dtype) if norm else q_in
    q_out.copy_(rope_tail(x.float(), freqs, positions))


def k_norm_rope_store(
    kv: Tensor, weight: Tensor, freqs: Tensor, positions: Tensor, loc: Tensor, cache: Tensor, eps: float, page_size: int
) -> None:
    """`kv` [n, 512], normed with `weight` [512], its last dimensions rotated, to slots `loc` [n] of the FlashMLA pool."""
    store_flashmla(rope_tail(rms_norm(kv, weight, eps), freqs, positions), cache, loc, page_size)


def q_indexer(
    q_in: Tensor,
    q_fp8: Tensor,
    weight: Tensor,
    weights_out: Tensor,
    weight_scale: float,
    freqs: Tensor,
    positions: Tensor,
) -> None:
    """The indexer's queries [n, heads, 128]: rotated, Hadamard transformed, in `q_fp8`; their scales go into weights.

    weight [n, heads] -> weights_out [n, heads, 1] float32 = weight * weight_scale * the query's scale
    """
    x = hadamard(rope_tail(q_in.float(), freqs, positions))
    scale = amax_scale(x)
    q_fp8.copy_(to_fp8(x / scale[..., None]))
    weights_out.copy_((weight.float().view(scale.shape) * weight_scale * scale).view(weights_out.shape))


def require_layout(layout: Any) -> None:
    """Raises NotImplementedError for a layout other than KVLayout.V4."""
    if getattr(layout, "name", layout) != "V4":
        raise NotImplementedError(f"KV layout {layout}: the CPU shims have V4 only")


@replaces(f"{NORM_ROPE}:_jit_fused_rope_module", imitates=(f"{CSRC}/rope.cuh",))
def fused_rope_module() -> SimpleNamespace:
    """rotary embedding, in place"""
    return SimpleNamespace(forward=fused_rope)


@replaces(f"{NORM_ROPE}:_jit_main_q_norm_rope_module", imitates=MAIN)
def q_norm_rope_module(dtype: torch.dtype, head_dim: int, rope_dim: int, apply_norm: bool) -> SimpleNamespace:
    """norm and rotary embedding of queries"""
    return SimpleNamespace(forward=partial(q_norm_rope, norm=apply_norm))


@replaces(f"{NORM_ROPE}:_jit_main_k_norm_rope_flashmla_module", imitates=MAIN)
def k_norm_rope_flashmla_module(
    dtype: torch.dtype, head_dim: int, rope_dim: int, page_size: int, layout: Any
) -> SimpleNamespace:
    """norm and rotary embedding of keys, written as fp8 pages"""
    require_layout(layout)
    return SimpleNamespace(forward=partial(k_norm_rope_store, page_size=page_size))


@replaces(f"{NORM_ROPE}:_jit_main_q_indexer_rope_hadamard_quant_module", imitates=MAIN)
def q_indexer_module(dtype: torch.dtype) -> SimpleNamespace:
    """the indexer's queries in fp8"""
    return SimpleNamespace(forward=q_indexer)


@replaces("sglang.kernels.ops.attention.dsv4.attn:_jit_fused_store_module", imitates=STORE)
def fused_store_module(
    name: Literal["flashmla", "indexer"],
    input_dtype: torch.dtype,
    index_dtype: torch.dtype,
    page_size: int,
    layout: Any,
) -> SimpleNamespace:
    """rows that are normed and rotated already, written as fp8 pages"""
    require_layout(layout)
    store = {"flashmla": store_flashmla, "indexer": store_indexer}[name]
    return SimpleNamespace(run=lambda rows, cache, loc: store(rows.float(), cache, loc, page_size))
