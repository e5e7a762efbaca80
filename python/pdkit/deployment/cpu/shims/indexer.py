"""The indexer's scores: srt/layers/attention/dsv4/indexer.py. Not needed to run, but a third of a decode step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pdkit.deployment.cpu.registry import replaces
from pdkit.deployment.cpu.shims.arithmetic import from_fp8
from pdkit.deployment.cpu.shims.pages import INDEXER

PAGE = 64


@replaces("sglang.srt.layers.attention.dsv4.indexer:fp8_paged_mqa_logits_torch")
def fp8_paged_mqa_logits_torch(
    q_fp8: Tensor,
    kvcache_fp8: Tensor,
    weight: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    deep_gemm_metadata: Any,
    max_seq_len: int,
    clean_logits: bool = False,
) -> Tensor:
    """for speed: the same sums as SGLang's torch version, each page converted once, and no page that nobody reads

    q_fp8 [n, 1, heads, 128]; kvcache_fp8 [pages, 64, 1, 132] bytes (see `pages`); weight [n, heads] float32; seq_lens
    [n], entries that count; page_table [n, pages of a request] -> [n, max_seq_len] float32, 0 beyond seq_lens
    """
    assert not clean_logits and kvcache_fp8.shape[1] == PAGE, "as SGLang calls it"
    n = q_fp8.shape[0]
    used = min(page_table.shape[1], max(1, -(-int(seq_lens.max()) // PAGE)))
    pages, which = torch.unique(page_table[:, :used].clamp_min(0), return_inverse=True)
    content = kvcache_fp8.view(torch.uint8).view(kvcache_fp8.shape[0], -1)[pages]
    split = PAGE * INDEXER
    keys = (from_fp8(content[:, :split].contiguous()) * 2.0**120).unflatten(1, (PAGE, INDEXER))
    scales = content[:, split : split + 4 * PAGE].contiguous().view(torch.float32)
    keys, scales = keys[which].flatten(1, 2), scales[which].flatten(1)
    scores = F.relu(torch.bmm(keys, q_fp8[:, 0].to(torch.bfloat16).transpose(1, 2)))
    scores = (scores * weight.unsqueeze(1)).sum(2) * scales
    beyond = torch.arange(used * PAGE) >= seq_lens.unsqueeze(1)
    scores = scores.masked_fill(beyond, 0.0)[:, :max_seq_len]
    out = scores.new_zeros(n, max_seq_len)
    out[:, : scores.shape[1]] = scores
    return out
