"""Pieces that several kernels share: rotary embedding, Hadamard transform, RMS norm, rounding to fp8."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST = 1e-4  # amax below which SGLang's kernels do not scale down further


def rope(x: Tensor, freqs: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
    """`x` [n, ..., rope] rotated by its rows' positions, float32.

    freqs      [max, rope] float32, real and imaginary parts interleaved
    positions  [n] integers
    """
    angle = freqs[positions.long()].float().view(positions.shape[0], *([1] * (x.dim() - 2)), -1, 2)
    re, im = angle[..., 0], -angle[..., 1] if inverse else angle[..., 1]
    pairs = x.float().unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack((a * re - b * im, b * re + a * im), -1).flatten(-2)


def rope_tail(x: Tensor, freqs: Tensor, positions: Tensor) -> Tensor:
    """`x` [n, ..., d] float32 with its last freqs.shape[-1] dimensions rotated."""
    size = freqs.shape[-1]
    return torch.cat((x[..., :-size], rope(x[..., -size:], freqs, positions)), -1)


def hadamard(x: Tensor) -> Tensor:
    """`x` [..., n] float32 times the orthonormal Hadamard matrix of order n, a power of two; Sylvester's order."""
    size, half = x.shape[-1], 1
    while half < size:
        x = x.unflatten(-1, (-1, 2, half))
        x = torch.cat((x[..., 0, :] + x[..., 1, :], x[..., 0, :] - x[..., 1, :]), -1).flatten(-2)
        half *= 2
    return x * size**-0.5


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x` [..., d] over its root mean square, times `weight` [d]; float32."""
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight.float()


def to_fp8(x: Tensor) -> Tensor:
    """`x` rounded to e4m3 after clamping to its range, as CUDA's saturating conversion does."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def from_fp8(values: Tensor) -> Tensor:
    """bfloat16 of `values`, bytes of e4m3, but for a factor of 2**-120; NaN is taken for 480.

    The bits of e4m3 (sign, 4 of exponent, 3 of mantissa) are those of bfloat16 four places up, with the exponent's bias
    off by 120; so subnormal numbers come out right, too. Three times as fast as a conversion by torch.
    """
    bits = values.view(torch.int8).to(torch.int16)
    return bits.bitwise_left_shift_(4).bitwise_and_(-30736).view(torch.bfloat16)  # 0x87f0


def halves(values: Tensor) -> Tensor:
    """float16 of `values`, bytes of e4m3, but for a factor of 2**-8, as `from_fp8`."""
    bits = values.view(torch.int8).to(torch.int16)
    return bits.bitwise_left_shift_(7).bitwise_and_(-16385).view(torch.float16)  # 0xbfff


def amax_scale(x: Tensor) -> Tensor:
    """float32 [...] by which `x` [..., n] is divided to fill the range of e4m3."""
    return x.abs().amax(-1).clamp_min(SMALLEST) / FP8_MAX
