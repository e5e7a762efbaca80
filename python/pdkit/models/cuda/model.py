"""The model: transformers' DeepSeek-V4, and the MTP layer, which transformers leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import DeepseekV4Config

from pdkit.models.cpu.training import new_model
from pdkit.models.cpu.windowed_attention import NAME as WINDOWED_ATTENTION
from pdkit.models.cpu.windowed_attention import residual_streams
from pdkit.models.cuda.config import BLOCK, FIELDS, HIDDEN, KINDS

SHARED = """
    hidden_size moe_intermediate_size head_dim num_attention_heads num_key_value_heads num_hidden_layers
    q_lora_rank o_lora_rank o_groups index_head_dim index_n_heads index_topk sliding_window n_routed_experts
    n_shared_experts num_experts_per_tok scoring_func norm_topk_prob routed_scaling_factor swiglu_limit hc_mult
    hc_sinkhorn_iters hc_eps rms_norm_eps max_position_embeddings rope_theta compress_rope_theta vocab_size
    bos_token_id eos_token_id tie_word_embeddings
""".split()


def reference_config(of: Mapping[str, Any], *, mtp: bool = False, initializer_range: float = 0.05) -> DeepseekV4Config:
    """The same model for transformers; with `mtp` the MTP layer's, which transformers does not know, as a model.

    of: config.json of the model
    """
    layers = 1 if mtp else of["num_hidden_layers"]
    first = of["num_hidden_layers"] if mtp else 0
    hashed = 0 if mtp else of["num_hash_layers"]
    return DeepseekV4Config(
        **{name: of[name] for name in SHARED} | {"num_hidden_layers": layers},
        architectures=of["architectures"],
        layer_types=[KINDS[ratio] for ratio in of["compress_ratios"][first : first + layers]],
        mlp_layer_types=["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        partial_rotary_factor=of["qk_rope_head_dim"] / of["head_dim"],
        initializer_range=initializer_range,
    )


class Mtp(nn.Module):
    """Multi-token prediction: from the streams at a token and the embedding of the next, the one after that.

    The arithmetic is that of DeepSeek-V3 (DeepSeek-AI 2024, section 2.2) with hyper-connections, as SGLang's
    `deepseek_v4_nextn.py` serves it: the streams are those before the main model's head, and embedding and head are
    the main model's.
    """

    def __init__(self, of: Mapping[str, Any]):
        super().__init__()
        donor, hidden_size = new_model(reference_config(of, mtp=True), seed=None), of["hidden_size"]
        donor.config._attn_implementation = WINDOWED_ATTENTION
        norm = type(donor.model.norm)
        eps = donor.config.rms_norm_eps
        self.enorm, self.hnorm, self.norm = norm(hidden_size, eps=eps), norm(hidden_size, eps=eps), donor.model.norm
        self.e_proj, self.h_proj = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(2))
        self.layer, self.hc_head = donor.model.layers[0], donor.model.hc_head

    def forward(self, streams: torch.Tensor, following: torch.Tensor, **layer) -> torch.Tensor:
        """Hidden states ``[B, S, D]`` for the head, of `streams` ``[B, S, hc, D]`` and embeddings ``[B, S, D]``."""
        joined = self.e_proj(self.enorm(following)).unsqueeze(2) + self.h_proj(self.hnorm(streams))
        return self.norm(self.hc_head(self.layer(joined, **layer)))


class KernelNano(nn.Module):
    """`main` predicts the next token, `mtp` the one after it. `fields`: its config.json."""

    def __init__(self, fields: Mapping[str, Any] = FIELDS, seed: int = 0):
        super().__init__()
        self.fields = dict(fields)
        self.main, self.mtp = new_model(reference_config(self.fields), seed), Mtp(self.fields)

    @property
    def device(self) -> torch.device:
        return self.main.device

    def forward(self, ids: torch.Tensor, *, detach: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[B, S, V]`` of main (for token ``t + 1`` at `t`) and of MTP (for ``t + 2``; the last is void).

        `ids` ``[B, S]``, `S` a multiple of the window. With `detach` the MTP layer learns from the main model without changing it.
        """
        core = self.main.model
        streams, shared = residual_streams(self.main, ids)
        logits = self.main.lm_head(core.norm(core.hc_head(streams)))
        following = core.embed_tokens(ids.roll(-1, dims=1))
        weight = self.main.lm_head.weight
        if detach:
            streams, following, weight = streams.detach(), following.detach(), weight.detach()
        return logits, nn.functional.linear(self.mtp(streams, following, **shared), weight)


@torch.no_grad()
def rescale(model: KernelNano) -> None:
    """Make a new model's wide matrices as quiet as its narrow ones: std 0.05 is for a fan-in of 128."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and not name.endswith(("embed_tokens.weight", "mtp.e_proj.weight", "mtp.h_proj.weight")):
            narrow = 4 * HIDDEN if "hc" in name.split(".")[-2] else BLOCK
            weight.mul_((narrow / weight.shape[-1]) ** 0.5)


BRANCH = 0.12


@torch.no_grad()
def randomize(model: KernelNano, seed: int) -> None:
    """Fill `model` with well-conditioned noise from `seed`, in place.

    What attention and experts add to the streams is scaled by BRANCH: so the MTP layer, close to the identity
    on the next token's embedding, agrees with the main model for a good part of the tokens, so that drafts are accepted
    and rejected.
    """
    noise = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("tid2eid"):
            tensor.copy_(torch.rand(len(tensor), 4, generator=noise).argsort(1)[:, : tensor.shape[1]])
            continue
        values = torch.randn(tensor.shape, generator=noise)
        fan_in = tensor.shape[-1] ** -0.5
        if name.endswith("norm.weight"):
            values = 1 + 0.05 * values
        elif name.endswith((".scale", "hc_scale")):
            values = torch.ones(tensor.shape)
        elif name.endswith((".base", "hc_base", "position_bias")):
            values = 0.3 * values
        elif name.endswith("sinks"):
            values = 0.5 * values
        elif name.endswith("e_score_correction_bias"):
            values = 0.1 * values
        elif name.endswith("lm_head.weight"):
            values = 3 * fan_in * values
        elif name.endswith(("o_b_proj.weight", "down_proj", "down_proj.weight")):
            values = BRANCH * fan_in * values
        elif not name.endswith("embed_tokens.weight"):
            values = fan_in * values
        tensor.copy_(values)
    mtp = model.mtp
    mtp.e_proj.weight.copy_(torch.eye(len(mtp.e_proj.weight)))
    mtp.h_proj.weight.mul_(0.02 * BRANCH)
    mtp.enorm.weight.fill_(1)
    mtp.norm.weight.copy_(model.main.model.norm.weight)
