"""A defect of SGLang's fused mHC kernel that falsifies small models, and the switch that avoids it.

Batches of up to 32 tokens go through `mhc_fused_post_pre_fma_tilelang` (`kernels/ops/layernorm/mhc.py`), which splits
the hidden size over 4 or 8 blocks of 256 threads. A thread leaves out what is past the hidden size, not what is past its
block's share: where a share is no multiple of 256, shares overlap and their sums count positions more than once. At
hidden size 128 logprobs of SGLang 0.5.23 are off by 2 nats; 2048, 4096, 5120 and 7168 divide well. docs/findings says
more.
"""

from pdkit.deployment import quirks

SOURCE = "kernels/ops/layernorm/mhc.py"
WRONG = "if hidden_idx < hidden_size:"
SWITCH = "SGLANG_OPT_USE_TILELANG_MHC_POST"
THREADS, SPLITS = 256, (4, 8)


def is_falsified(hidden_size: int) -> bool:
    """Whether shares of the hidden size overlap."""
    return any(hidden_size % (splits * THREADS) for splits in SPLITS if splits == 4 or hidden_size <= 4096)


def environment(hidden_size: int) -> dict[str, str]:
    """What servers of the installed release need to be right at that hidden size."""
    return {SWITCH: "0"} if is_falsified(hidden_size) and quirks.source_says(SOURCE, WRONG) else {}
