"""A defect of SGLang's fused mHC kernel that falsifies small models, and the switch that avoids it.

Where a block's share of the hidden size is no multiple of its threads, positions count more than once:
docs/findings/fused-mhc-counts-positions-twice.md.
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
