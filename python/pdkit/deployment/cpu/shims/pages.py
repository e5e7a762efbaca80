"""The byte layouts of DeepSeek-V4's KV pages: what is transferred between prefill and decode.

A page of the FlashMLA pool (`KVLayout.V4`, kernels/jit/include/sgl_kernel/deepseek_v4/kv_layout.cuh) holds for each of
its tokens 576 bytes, which are 448 e4m3 values and 64 bfloat16 ones, and after all of them 8 bytes for each token: 7
exponents of powers of two (biased by 127), one for each 64 values, and a zero. A page of the indexer's pool holds 128
e4m3 values for each token, and after all of them a float32 scale each. Pages may be padded at their end.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from pdkit.deployment.cpu.shims.arithmetic import FP8_MAX, SMALLEST, amax_scale, halves, to_fp8

NOPE, ROPE = 448, 64
TOKEN, SCALES = NOPE + 2 * ROPE, 8
GROUP = 64
INDEXER, INDEXER_SCALE = 128, 4
WORD = 8


@functools.cache
def _steps(count: int) -> Tensor:
    return torch.arange(count)


def _offsets(loc: Tensor, page_size: int, stride: int, base: int, size: int) -> Tensor:
    """Byte offsets [..., size] of what each token slot `loc` [...] has from `base` on in its page."""
    loc = loc.long()
    page = torch.div(loc, page_size, rounding_mode="floor")
    return (page * stride + base + (loc - page * page_size) * size)[..., None]


def store_flashmla(rows: Tensor, cache: Tensor, loc: Tensor, page_size: int) -> None:
    """Write `rows` [n, 512] float32, normed and rotated, into token slots `loc` [n] of `cache` [pages, bytes] uint8."""
    if not rows.shape[0]:
        return
    cache = cache.view(torch.uint8)
    stride, flat = cache.shape[1], cache.view(-1)
    nope = rows[:, :NOPE].float().unflatten(-1, (-1, GROUP))
    exponent = torch.ceil(torch.log2(nope.abs().amax(-1).clamp_min(SMALLEST) / FP8_MAX)).clamp(-127, 127)
    low = to_fp8((nope / torch.exp2(exponent)[..., None]).flatten(1)).view(torch.uint8)
    high = rows[:, NOPE:].bfloat16().contiguous().view(torch.uint8)
    flat[_offsets(loc, page_size, stride, 0, TOKEN) + _steps(TOKEN)] = torch.cat((low, high), 1)
    scales = F.pad((exponent + 127).to(torch.uint8), (0, 1))
    flat[_offsets(loc, page_size, stride, page_size * TOKEN, SCALES) + _steps(SCALES)] = scales


def load_flashmla(cache: Tensor, loc: Tensor, out: Tensor | None = None) -> Tensor:
    """float32 [..., 512] of token slots `loc` [...] (>= 0), in `out` if it is given.

    cache: the pool as attention sees it, [pages, page_size, 1, 584], one byte an element, whose stride(0) is the size of
    a page, a multiple of 576; only its storage is used.
    """
    page_size, stride = cache.shape[1], cache.stride(0)
    row = torch.empty(*loc.shape, NOPE + ROPE) if out is None else out
    if cache.shape[0] == 0 or not loc.numel():
        return row
    assert stride % TOKEN == 0, "as SGLang pads pages"
    # Read as rows of 576 bytes, and as 8-byte words: every offset is a multiple of them.
    size = ((cache.shape[0] - 1) * stride + page_size * (TOKEN + SCALES)) // WORD
    words = torch.as_strided(cache.view(torch.uint8), (size * WORD,), (1,)).view(torch.int64)
    tokens = words.as_strided((size * WORD // TOKEN, TOKEN // WORD), (TOKEN // WORD, 1))
    flat = loc.reshape(-1).long()
    page = torch.div(flat, page_size, rounding_mode="floor")
    at = flat - page * page_size
    data = tokens.index_select(0, page * (stride // TOKEN) + at).view(torch.uint8).view(*loc.shape, TOKEN)
    scale = words.index_select(0, page * (stride // WORD) + (page_size * TOKEN // WORD) + at)
    scale = scale[:, None].view(torch.uint8)[:, : NOPE // GROUP].view(*loc.shape, NOPE // GROUP, 1)
    nope = row[..., :NOPE]
    nope.copy_(halves(data[..., :NOPE]))
    nope.unflatten(-1, (-1, GROUP)).mul_(torch.exp2(scale.float() - 119))  # 127, and 8 of `halves`
    row[..., NOPE:] = data[..., NOPE:].view(torch.bfloat16)
    return row


def store_indexer(rows: Tensor, cache: Tensor, loc: Tensor, page_size: int) -> None:
    """Write `rows` [n, 128] float32 into token slots `loc` [n] of `cache` [pages, bytes] uint8."""
    if not rows.shape[0]:
        return
    cache = cache.view(torch.uint8)
    stride, flat = cache.shape[1], cache.view(-1)
    scale = amax_scale(rows)
    values = to_fp8(rows / scale[:, None]).view(torch.uint8)
    flat[_offsets(loc, page_size, stride, 0, INDEXER) + _steps(INDEXER)] = values
    scales = scale.float()[:, None].contiguous().view(torch.uint8)
    flat[_offsets(loc, page_size, stride, page_size * INDEXER, INDEXER_SCALE) + _steps(INDEXER_SCALE)] = scales
