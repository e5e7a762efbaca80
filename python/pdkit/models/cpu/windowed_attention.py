"""DeepSeek-V4's attention for training: a sliding window in blocks, then compressed entries.

Eager attention compares every query with all `S` tokens and masks all but a window. Here a
block of `W` queries meets only its own block and the one before, so the cost of the sliding
part grows with ``S * 2W``; on CPU that is most of the time of a 1024-token step.

Importing this module registers the implementation under :data:`NAME`. It needs no cache, no
padding, and `S` a multiple of the window.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV4ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "pdkit_windowed"


def windowed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    sliding_window: int,
    s_aux: torch.Tensor,
    **_,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `query` ``[B, H, S, D]`` over ``S + T`` shared keys and values ``[B, 1, S + T, D]``.

    The first `S` are the tokens', seen causally within the window; the other `T` are
    compressed entries, whose visibility the last `T` columns of `attention_mask` say.
    `s_aux` ``[H]`` are the sinks. Returns the output ``[B, S, H, D]`` and the probabilities
    of the compressed entries ``[B, H, S, T]``.
    """
    assert value is key, "DeepSeek-V4 shares keys and values"
    batch, heads, length, dim = query.shape
    assert length % sliding_window == 0, f"{length} tokens do not fill windows of {sliding_window}"
    blocks = length // sliding_window
    tokens, entries = key[:, 0, :length], key[:, 0, length:]

    own = tokens.view(batch, 1, blocks, sliding_window, dim)
    before = torch.cat([torch.zeros_like(own[:, :, :1]), own[:, :, :-1]], dim=2)
    window = torch.cat([before, own], dim=3)
    blocked = query.reshape(batch, heads, blocks, sliding_window, dim)
    near = torch.matmul(blocked, window.transpose(-1, -2)) * scaling + _band(blocks, sliding_window, query)

    far = torch.matmul(query, entries.unsqueeze(1).transpose(-1, -2)) * scaling
    far = far + attention_mask[..., attention_mask.shape[-1] - far.shape[-1] :]
    sinks = s_aux.view(1, heads, 1, 1).expand(batch, -1, length, -1)
    logits = torch.cat([near.reshape(batch, heads, length, 2 * sliding_window), far, sinks], dim=-1)
    near, far, _ = logits.softmax(-1).split([2 * sliding_window, far.shape[-1], 1], dim=-1)

    output = torch.matmul(near.reshape(batch, heads, blocks, sliding_window, -1), window)
    output = output.reshape(batch, heads, length, dim) + torch.matmul(far, entries.unsqueeze(1))
    return output.transpose(1, 2).contiguous(), far


def _band(blocks: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask ``[blocks, W, 2W]``: 0 for the last W tokens up to the query, else -inf."""
    rows = torch.arange(window, device=like.device).view(1, -1, 1)
    columns = torch.arange(2 * window, device=like.device).view(1, 1, -1)
    age = rows + window - columns
    first = torch.arange(blocks, device=like.device).view(-1, 1, 1) == 0
    hidden = (age < 0) | (age >= window) | (first & (columns < window))
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(hidden, float("-inf"))


ALL_ATTENTION_FUNCTIONS.register(NAME, windowed_attention_forward)


def residual_streams(model: DeepseekV4ForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Streams ``[B, S, hc, D]`` after the last layer, and what else each layer was called with. `ids` ``[B, S]``.

    `model` is served, and validated, with the attention that it has before and after.
    """
    core, config = model.model, model.config
    batch, length = ids.shape
    positions = torch.arange(length, device=ids.device).unsqueeze(0)
    hidden = core.embed_tokens(ids)
    shared = {
        "position_embeddings": {
            kind: core.rotary_emb(hidden, position_ids=positions, layer_type=kind) for kind in ("main", "compress")
        },
        "position_ids": positions.expand(batch, -1),
        "attention_mask": torch.zeros(batch, 1, length, 0, device=ids.device),
        "past_key_values": None,
    }
    hidden = hidden.unsqueeze(2).expand(-1, -1, config.hc_mult, -1).contiguous()
    served, config._attn_implementation = config._attn_implementation, NAME
    try:
        for layer in core.layers:
            hidden = layer(hidden, input_ids=ids, **shared)
    finally:
        config._attn_implementation = served
    return hidden, shared
