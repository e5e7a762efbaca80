"""The smallest DeepSeek-V4 that SGLang's kernels run.

Fixed by them: 64 heads of 448 + 64 dimensions, an indexer of 64 heads of 128 that selects 512 entries, a window of 128,
fp8 blocks of 128 x 128 (so every width is a multiple of 128), four residual streams, one MTP layer. Layers hold each
kind of state once: sliding, 4x and 128x. DeepEP moves hidden states of a few sizes only, of which `DEEPEP_HIDDEN` is the
smallest (`SWITCH_HIDDEN` of its `csrc/kernels/launch.cuh`); there experts are as wide as four tensor-parallel ranks need.
"""

from typing import Any

BLOCK = 128
DEEPEP_HIDDEN = 2048
KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}

FIELDS: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 448,
    "v_head_dim": 512,
    "kv_lora_rank": 512,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "compress_ratios": [0, 4, 128, 0],
    "compress_rope_theta": 160000,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
    "o_groups": 8,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "sliding_window": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "scoring_func": "sqrtsoftplus",
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "rms_norm_eps": 1e-06,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "rope_theta": 10000,
    # SGLang 0.5.17 asks for YaRN and stretches the layers without compression, too, which DeepSeek-V4 does not do;
    # stretched by 1 both are plain RoPE.
    "rope_scaling": {
        "type": "yarn",
        "factor": 1.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 1024,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [BLOCK, BLOCK],
    },
}
"""What config.json says; DeepSeek's own names, which SGLang reads."""

HIDDEN = FIELDS["hidden_size"]

FEW_HEADS: dict[str, Any] = {
    **{name: value for name, value in FIELDS.items() if name != "quantization_config"},
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "o_groups": 2,
    "index_n_heads": 32,
    "hc_sinkhorn_iters": 4,
    "vocab_size": 528,
}
"""The model that is served on CPU, too: bfloat16, 4.4 M parameters with its MTP layer, the same KV pages.

It does not run on one GPU (docs/sglang-cpu.md). DeepGEMM scores for 32 or 64 heads of the indexer.
"""


def fields(hidden_size: int = HIDDEN) -> dict[str, Any]:
    """config.json of the model of that width: `HIDDEN`, or `DEEPEP_HIDDEN`."""
    if hidden_size == HIDDEN:
        return FIELDS
    assert hidden_size == DEEPEP_HIDDEN, hidden_size
    return FIELDS | {"hidden_size": hidden_size, "intermediate_size": 4 * BLOCK, "moe_intermediate_size": 4 * BLOCK}
