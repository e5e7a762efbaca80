"""FP8 (e4m3) as DeepSeek-V4's checkpoints and SGLang's kernels use it: what is stored, and what rounding does.

Scales are powers of two (ue8m0), so that a dequantised weight is the same number in float32, bfloat16 and fp8.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
_TINY = 2.0**-30


def power_of_two_scale(largest: torch.Tensor) -> torch.Tensor:
    """The least power of two by which `largest` fits into e4m3, elementwise."""
    return torch.exp2(torch.ceil(torch.log2((largest.float() / E4M3_MAX).clamp_min(_TINY))))


def quantize_blocks(weight: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` ``[O, I]`` as e4m3 ``[O, I]`` and float32 scales ``[O / block, I / block]``."""
    rows, columns = weight.shape
    assert rows % block == 0 and columns % block == 0, tuple(weight.shape)
    blocks = weight.float().view(rows // block, block, columns // block, block)
    scale = power_of_two_scale(blocks.abs().amax(dim=(1, 3)))
    values = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return values.reshape(rows, columns).contiguous(), scale.contiguous()


def dequantize_blocks(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 ``[O, I]`` that :func:`quantize_blocks` stored."""
    rows, columns = values.shape
    blocks = values.float().view(scale.shape[0], rows // scale.shape[0], scale.shape[1], columns // scale.shape[1])
    return (blocks * scale[:, None, :, None]).reshape(rows, columns)


def round_groups(x: torch.Tensor, group: int = 128, *, power_of_two: bool = False) -> torch.Tensor:
    """`x` as it is after fp8 with one scale for each `group` of its last dimension, in its own dtype."""
    groups = x.float().unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    scale = power_of_two_scale(largest) if power_of_two else (largest / E4M3_MAX).clamp_min(_TINY)
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)
