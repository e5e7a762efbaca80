"""Densely evaluated routed experts for transformers' DeepSeek-V4.

The eager implementation loops over the experts that were hit and gathers their
rows: about ten small ops an expert, and shapes that depend on the data. A nano
model has so few and so small experts that it is faster to evaluate all of them
for every row and to mix with a dense weight matrix; shapes are then static,
which `torch.compile` needs too.

Importing this module registers the implementation under :data:`NAME`; select it
with ``experts_implementation="pdkit_dense"``.
"""

from __future__ import annotations

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "pdkit_dense"


def dense_experts_forward(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Mixture of experts ``y_t = sum_k w_tk * FFN_{i_tk}(x_t)``, evaluated densely.

    `module` is transformers' ``DeepseekV4Experts``: ``gate_up_proj [E, 2I, H]``,
    ``down_proj [E, H, I]`` and ``_apply_gate`` (clamped SwiGLU). `hidden_states`
    is ``[T, H]``, `top_k_index` and `top_k_weights` are ``[T, k]``; an expert
    named twice in a row counts twice. Returns ``[T, H]``.
    """
    experts = module.num_experts
    mix = top_k_weights.new_zeros(len(hidden_states), experts).scatter_add(1, top_k_index, top_k_weights)
    gate_up = torch.bmm(hidden_states.expand(experts, -1, -1), module.gate_up_proj.transpose(1, 2))
    inner = module._apply_gate(gate_up) * mix.t().unsqueeze(-1)
    return torch.bmm(inner, module.down_proj.transpose(1, 2)).sum(0)


ALL_EXPERTS_FUNCTIONS.register(NAME, dense_experts_forward)
