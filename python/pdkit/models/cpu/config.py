"""The one architecture that the nano models share."""

from __future__ import annotations

from transformers import DeepseekV4Config

from pdkit.models.tokenizer import VOCAB_SIZE


def nano_config(*, index_topk: int, initializer_range: float) -> DeepseekV4Config:
    """A four-layer DeepSeek-V4 that holds each kind of state: sliding, 4x (twice) and 128x.

    Everything is scaled down from DeepSeek-V4-Flash but the compression rates and the
    number of residual streams; fewer Sinkhorn iterations save half of a decode step's ops.
    """
    return DeepseekV4Config(
        architectures=["DeepseekV4ForCausalLM"],
        dtype="bfloat16",
        vocab_size=VOCAB_SIZE,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        hidden_size=128,
        num_hidden_layers=4,
        layer_types=[
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
        num_attention_heads=4,
        head_dim=32,
        partial_rotary_factor=0.5,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=32,
        sliding_window=32,
        index_n_heads=8,
        index_head_dim=16,
        index_topk=index_topk,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=64,
        hc_mult=4,
        hc_sinkhorn_iters=3,
        max_position_embeddings=4096,
        initializer_range=initializer_range,
    )
