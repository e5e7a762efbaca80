"""The kinds of a DeepSeek-V4 state, and what can go wrong with the tensors of one.

Tensors are named as `pdkit.engine.state.tensors_of` names them; their tokens or entries run along dimension -2. Every
function returns new tensors and leaves its arguments alone.
"""

from collections.abc import Iterable
from enum import Enum

import numpy as np
import torch

RATIOS = {"4x": 4, "indexer": 4, "128x": 128}
MANTISSA_BITS, ALL_BITS = 23, 32
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class Kind(Enum):
    """A piece of state by what it is for. Buffers and overlap are pairs of tensors (kv, gate)."""

    WINDOW = "window"
    C4_COMPRESSED = "4x compressed"
    C4_BUFFERS = "4x buffers"
    C4_OVERLAP = "4x overlap"
    INDEXER_COMPRESSED = "indexer compressed"
    INDEXER_BUFFERS = "indexer buffers"
    INDEXER_OVERLAP = "indexer overlap"
    C128_COMPRESSED = "128x compressed"
    C128_BUFFERS = "128x buffers"
    LENGTH = "length"
    C4_COUNT = "4x count"
    INDEXER_COUNT = "indexer count"
    C128_COUNT = "128x count"

    @property
    def slug(self) -> str:
        return self.value.replace(" ", "-")

    @property
    def ratio(self) -> int:
        """Tokens an entry; 1 where each token has a row of its own."""
        owner, _, piece = self.value.partition(" ")
        return RATIOS[owner] if piece == "compressed" else 1


COUNTS = (Kind.LENGTH, Kind.C4_COUNT, Kind.INDEXER_COUNT, Kind.C128_COUNT)
TENSORS = tuple(kind for kind in Kind if kind not in COUNTS)
COMPRESSED = (Kind.C4_COMPRESSED, Kind.INDEXER_COMPRESSED, Kind.C128_COMPRESSED)

_PIECES = {
    "compressed_kv": "compressed",
    "buffer_kv": "buffers",
    "buffer_gate": "buffers",
    "overlap_kv": "overlap",
    "overlap_gate": "overlap",
    "entry_count": "count",
}


def kind_of(name: str, names: Iterable[str]) -> Kind:
    """The kind of tensor or count `name`; a layer with an indexer among `names` is a 4x layer."""
    layer, index, *rest = name.split(".")
    if rest == ["window"]:
        return Kind.WINDOW
    if rest == ["cumulative_length"]:
        return Kind.LENGTH
    part, piece = rest
    has_indexer = any(other.startswith(f"{layer}.{index}.indexer.") for other in names)
    owner = "indexer" if part == "indexer" else "4x" if has_indexer else "128x"
    return Kind(f"{owner} {_PIECES[piece]}")


def zeroed(tensor: torch.Tensor) -> torch.Tensor:
    """What a preallocated buffer holds that nobody wrote to."""
    return torch.zeros_like(tensor)


def overlaid(source: torch.Tensor | None, onto: torch.Tensor) -> torch.Tensor:
    """`onto` with its leading rows, as many as `source` has, replaced by those of `source`."""
    result = onto.clone()
    if source is not None:
        rows = min(source.shape[-2], onto.shape[-2])
        result[..., :rows, :] = source[..., :rows, :]
    return result


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """Each row one slot later, the first twice, the newest lost."""
    return torch.cat([tensor[..., :1, :], tensor[..., :-1, :]], dim=-2)


def newest_lost(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Zeros in place of the newest `rows` rows."""
    result = tensor.clone()
    result[..., max(0, tensor.shape[-2] - rows) :, :] = 0
    return result


def cut(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Without the newest `rows` rows."""
    return tensor[..., : max(0, tensor.shape[-2] - rows), :]


def rows_of_newest(kind: Kind, length: int, tokens: int) -> int:
    """How many rows of `kind` the newest `tokens` tokens of a prompt of `length` touch.

    A compressed entry is touched by each of its tokens; the overlap, of the last full window, as a whole or not at all.
    """
    rest = max(0, length - tokens)
    if kind in (Kind.C4_OVERLAP, Kind.INDEXER_OVERLAP):
        return RATIOS["4x"] if length // 4 != rest // 4 else 0
    return length // kind.ratio - rest // kind.ratio


def bits_flipped(tensor: torch.Tensor, rng: np.random.Generator, rate: float, bits: int = ALL_BITS) -> torch.Tensor:
    """Each of the low `bits` bits of each float32 flipped with probability `rate`."""
    result = tensor.clone(memory_format=torch.contiguous_format)
    words = result.numpy().reshape(-1).view(np.uint32)
    flips = rng.binomial(words.size * bits, rate)
    places = rng.integers(0, words.size * bits, flips)
    np.bitwise_xor.at(words, places // bits, np.uint32(1) << (places % bits).astype(np.uint32))
    return result


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast to `dtype` and back; to fp8 with the usual scale, which maps the largest magnitude to the largest number."""
    if dtype != torch.float8_e4m3fn or not tensor.numel():
        return tensor.to(dtype).to(tensor.dtype)
    scale = tensor.abs().amax().clamp(min=1e-12) / FP8_MAX
    return (tensor / scale).to(dtype).to(tensor.dtype) * scale


def noisy(tensor: torch.Tensor, rng: np.random.Generator, level: float) -> torch.Tensor:
    """With normal noise of `level` times the root mean square of the tensor."""
    noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), dtype=np.float32))
    return tensor + level * tensor.square().mean().sqrt() * noise


def common_rows(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many leading rows of two tensors [..., rows, D] are equal bit for bit."""
    rows = min(one.shape[-2], other.shape[-2])
    same = (one[..., :rows, :] == other[..., :rows, :]).flatten(0, -3).all(dim=0).all(dim=-1)
    return int(same.int().cumprod(0).sum())
