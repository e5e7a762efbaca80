"""The residual streams of DeepSeek-V4: kernels/ops/layernorm/{mhc,mhc_head}.py."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from pdkit.deployment.cpu.registry import remakes, replaces

MHC = "sglang.kernels.ops.layernorm.mhc"


@replaces(f"{MHC}:hc_split_sinkhorn", imitates=("kernels/ops/layernorm/mhc.py",))
def hc_split_sinkhorn(
    mixes: Tensor, hc_scale: Tensor, hc_base: Tensor, hc_mult: int = 4, sinkhorn_iters: int = 20, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """how streams are mixed: weights before, after, and among each other

    mixes [..., (2 + hc) * hc] float32, hc_scale [3], hc_base [(2 + hc) * hc] -> pre [..., hc], post [..., hc] and
    comb [..., hc, hc], whose rows and columns are normalised in turn
    """
    hc = hc_mult
    pre = torch.sigmoid(mixes[..., :hc] * hc_scale[0] + hc_base[:hc]) + eps
    post = 2 * torch.sigmoid(mixes[..., hc : 2 * hc] * hc_scale[1] + hc_base[hc : 2 * hc])
    comb = (mixes[..., 2 * hc :] * hc_scale[2] + hc_base[2 * hc :]).unflatten(-1, (hc, hc)).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(sinkhorn_iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return pre, post, comb


@replaces(f"{MHC}:mhc_combine", imitates=("kernels/ops/layernorm/mhc.py",))
def mhc_combine(x_flat: Tensor, pre: Tensor, hc: int, out_dtype: torch.dtype) -> Tensor:
    """streams `x_flat` [n, hc * d] summed with weights `pre` [n, hc]: [n, d]"""
    return (pre[..., None].float() * x_flat.unflatten(-1, (hc, -1)).float()).sum(1).to(out_dtype)


@remakes("sglang.kernels.ops.layernorm.mhc_head:fused_hc_head")
def hc_head(_: Any) -> Any:
    """SGLang's own hc_head_torch"""
    return importlib.import_module("sglang.srt.models.deepseek_v4").hc_head_torch
