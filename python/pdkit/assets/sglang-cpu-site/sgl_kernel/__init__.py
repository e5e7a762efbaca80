"""Stands for the wheel sglang-kernel, which needs libcuda.so.1.

`torch.ops.sgl_kernel.convert_weight_packed` stays absent: SGLang takes its torch paths then.
"""

from pdkit.deployment.cpu.shims.speculative import (  # noqa: F401  what SGLang imports on CPU
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_tree_kernel_efficient_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
    verify_tree_greedy_cpu,
)
from pdkit.deployment.cpu.stand_in import absent_from

__version__ = "0.4.10"
__path__: list[str] = []  # a package whose modules are absent: `import sgl_kernel.flash_attn` is an ImportError
__getattr__ = absent_from("sgl_kernel")
