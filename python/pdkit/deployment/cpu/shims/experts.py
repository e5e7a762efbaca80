"""Experts with DeepSeek-V4's clamped activation, and the low-rank output projection."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pdkit.deployment.cpu.registry import remakes, replaces


def silu_and_mul_clamp(x: Tensor, out: Tensor, limit: float) -> None:
    """`out` [n, d] = silu(min(gate, limit)) * clamp(up, -limit, limit) of `x` [n, 2d], gate first."""
    gate, up = x.float().chunk(2, -1)
    out.copy_(F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit))


@replaces(
    "sglang.kernels.ops.activation.silu_and_mul_clamp:_jit_silu_and_mul_clamp_module",
    imitates=("kernels/ops/activation/silu_and_mul_clamp.py",),
)
def silu_and_mul_clamp_module(dtype: torch.dtype) -> SimpleNamespace:
    """the activation of the shared expert"""
    return SimpleNamespace(run=silu_and_mul_clamp)


@replaces("sglang.srt.layers.moe.fused_moe_native:moe_forward_native")
def moe_forward_native(layer: Any, x: Tensor, topk_output: Any, moe_runner_config: Any) -> Tensor:
    """routed experts; SGLang's torch version ignores swiglu_limit

    layer.w13_weight [experts, 2 * width, hidden], layer.w2_weight [experts, hidden, width]; x [n, hidden];
    topk_output: weights [n, k] and ids [n, k] of experts first
    """
    if moe_runner_config.apply_router_weight_on_input:
        raise NotImplementedError(
            "apply_router_weight_on_input: neither SGLang's torch version nor the CPU shims have it"
        )
    weights, ids, *_ = topk_output
    limit = moe_runner_config.swiglu_limit
    limit = float("inf") if limit is None else limit
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in range(layer.w13_weight.shape[0]):
        row, slot = (ids == expert).nonzero(as_tuple=True)
        if len(row):
            gate_up = F.linear(x[row], layer.w13_weight[expert])
            hidden = gate_up.new_empty(len(row), gate_up.shape[1] // 2)
            silu_and_mul_clamp(gate_up, hidden, limit)
            down = F.linear(hidden, layer.w2_weight[expert]).float()
            out.index_add_(0, row, down * weights[row, slot, None].float())
    return out.to(x.dtype)


@remakes("sglang.srt.models.deepseek_v4:_apply_wo_a_bf16_matmul", wraps=True)
def wo_a_matmul(original: Any) -> Any:
    """the grouped projection, where activations are float32 and the weight is not"""

    def apply(o: Tensor, wo_a: Tensor, **options: Any) -> Tensor:
        if o.dtype == wo_a.dtype == torch.bfloat16:
            return original(o, wo_a, **options)
        return torch.einsum("tgd,grd->tgr", o.float(), wo_a.float()).to(o.dtype)

    return apply
