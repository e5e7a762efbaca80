"""What the attention backend works out for a batch before its layers run."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from pdkit.deployment.cpu.registry import remakes, replaces
from pdkit.deployment.cpu.shims.attention import BACKEND

METADATA = "kernels/ops/attention/dsv4/metadata_kernel.py"
ENTRIES = 128  # tokens of an entry of the sparsest layers


@replaces(f"{BACKEND}:_init_compression_metadata_triton", imitates=(METADATA,))
def init_compression_metadata(
    seq_lens: Tensor,
    positions: Tensor,
    raw_out_loc: Tensor,
    page_table: Tensor | None = None,
    page_size: int = 0,
    compute_page_indices: bool = True,
) -> tuple[Tensor | None, ...]:
    """where compressed entries are stored, how many there are, and the slots of those of 128 tokens

    seq_lens, positions [n] int32; raw_out_loc [n] slots of the whole pool; page_table [n, pages] int32. For 4 and for
    128: slots of finished entries (0 where none is finished), position of the entry's first token, number of entries,
    the same but at least 1. Then the slots [n, pages * page_size / 128] int32 of entries of 128 tokens, or None.
    """
    n = raw_out_loc.shape[0]
    found: list[Tensor] = []
    for ratio in (4, ENTRIES):
        count = (seq_lens // ratio).to(torch.int32)
        loc = torch.where(seq_lens[:n] % ratio == 0, raw_out_loc // ratio, 0).to(torch.int64)
        found += [loc, (positions // ratio * ratio).to(torch.int32), count, count.clamp_min(1)]
    if not compute_page_indices or page_table is None:
        return (*found, None)
    each = page_size // ENTRIES
    at = torch.arange(each * page_table.shape[1])
    indices = page_table[:, at // each] * each + at % each
    return (*found, torch.where(at[None] < found[6][:, None], indices, -1).to(torch.int32))


@remakes(f"{BACKEND}:DeepseekV4AttnBackend.get_cpu_graph_seq_len_fill_value", adds=True)
def cpu_fill_value(_: None) -> Any:
    """asked of idle ranks under DP attention on CPU, defined for CUDA"""
    return importlib.import_module(BACKEND).DeepseekV4AttnBackend.get_cuda_graph_seq_len_fill_value


@remakes("sglang.srt.mem_cache.allocation:get_last_loc_triton")
def get_last_loc(_: Any) -> Any:
    """SGLang's own get_last_loc_torch, which it takes for one attention backend only"""
    return importlib.import_module("sglang.srt.mem_cache.allocation").get_last_loc_torch
