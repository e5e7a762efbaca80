"""The state of a request: what a prefill server computes and a decode server needs to go on.

A transformers `DynamicCache` of a DeepSeek-V4 model is the live form. After n tokens, with window W, head dim D,
batch B and the indexer's head dim I, it holds

    every layer    window [B, 1, min(n, W-1), D] and its cumulative length n (keys are values: shared-KV MQA)
    128x layers    compressor: compressed_kv [B, n//128, D], buffer_{kv,gate} [B, n%128, D], entry_count n//128
    4x layers      compressor: compressed_kv [B, n//4, D], buffer_{kv,gate} [B, n%4, 2D], entry_count n//4,
                   overlap_{kv,gate} [B, 4, D] once n >= 4; indexer: the same with I for D

and nothing else. Every update replaces a tensor and never writes into one, so a shallow copy is a snapshot.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

GROWING = ("compressed_kv", "buffer_kv", "buffer_gate")
OVERLAP = ("overlap_kv", "overlap_gate")


class StateError(ValueError):
    """A state that does not fit its model and its number of tokens."""


def new_cache(config: Any) -> DynamicCache:
    return DynamicCache(config=config)


def snapshot(cache: DynamicCache) -> DynamicCache:
    """A copy that later updates of `cache` do not reach. Tensors are shared."""
    twin = copy.copy(cache)
    twin.layers = []
    for layer in cache.layers:
        layer = copy.copy(layer)
        for name in (*GROWING, *OVERLAP, "entry_count"):
            if hasattr(layer, name):
                setattr(layer, name, dict(getattr(layer, name)))
        twin.layers.append(layer)
    return twin


def _fields(layer: Any) -> Iterator[tuple[dict[str, Any], str, str]]:
    """(holder, key, name) of each batched tensor of a layer but the window; a holder is a dict of the layer."""
    for name in (*GROWING, *OVERLAP):
        for part in getattr(layer, name, ()):
            yield getattr(layer, name), part, f"{part}.{name}"


def gather(parts: Sequence[tuple[DynamicCache, list[int]]], multiple: int = 1) -> DynamicCache:
    """One cache of the chosen rows, padded with copies of the last row.

    parts: [(cache, [row, ...]), ...], all of the same length in tokens. The number of rows of the result is the
    number chosen rounded up to `multiple`.
    """
    caches = [cache for cache, _ in parts]
    assert len({cache.get_seq_length() for cache in caches}) == 1, "rows of different lengths cannot share a batch"
    padding = -sum(len(rows) for _, rows in parts) % multiple

    def merge(tensors: Sequence[Any]) -> torch.Tensor | None:
        if tensors[0] is None:
            return None
        chosen = [tensor[rows] for tensor, (_, rows) in zip(tensors, parts)]
        if padding:
            chosen.append(chosen[-1][-1:].expand(padding, *chosen[-1].shape[1:]))
        return torch.cat(chosen)

    merged = snapshot(caches[0])
    for index, layer in enumerate(merged.layers):
        layers = [cache.layers[index] for cache in caches]
        layer.keys = layer.values = merge([each.keys for each in layers])
        for fields in zip(_fields(layer), *(_fields(each) for each in layers)):
            (holder, part, _), *sources = fields
            holder[part] = merge([source[part] for source, _, _ in sources])
    return merged


def tensors_of(cache: DynamicCache) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """{name: tensor [1, ...]} and {name: int} of a cache of one row: all that has to arrive at a decode server."""
    tensors, counts = {}, {}
    for index, layer in enumerate(cache.layers):
        prefix = f"layers.{index}"
        tensors[f"{prefix}.window"] = layer.keys.contiguous()
        counts[f"{prefix}.cumulative_length"] = layer.cumulative_length
        for holder, part, name in _fields(layer):
            if holder[part] is not None:
                tensors[f"{prefix}.{name}"] = holder[part].contiguous()
        for part, count in getattr(layer, "entry_count", {}).items():
            counts[f"{prefix}.{part}.entry_count"] = count
    return tensors, counts


def expected(config: Any, length: int) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """({name: shape}, {name: int}) of the state of a prompt of `length` tokens, from the config alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    for index, layer_type in enumerate(config.layer_types):
        prefix = f"layers.{index}"
        shapes[f"{prefix}.window"] = (1, 1, min(length, config.sliding_window - 1), config.head_dim)
        counts[f"{prefix}.cumulative_length"] = length
        ratio = config.compress_rates.get(layer_type)
        if ratio is None:
            continue
        overlapping = layer_type == "compressed_sparse_attention"
        widths = {"compressor": config.head_dim}
        if overlapping:
            widths["indexer"] = config.index_head_dim
        for part, width in widths.items():
            shapes[f"{prefix}.{part}.compressed_kv"] = (1, length // ratio, width)
            for name in ("buffer_kv", "buffer_gate"):
                shapes[f"{prefix}.{part}.{name}"] = (1, length % ratio, width * (2 if overlapping else 1))
            if overlapping and length >= ratio:
                for name in OVERLAP:
                    shapes[f"{prefix}.{part}.{name}"] = (1, ratio, width)
            counts[f"{prefix}.{part}.entry_count"] = length // ratio
    return shapes, counts


def check(config: Any, length: int, tensors: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> None:
    """Raises StateError unless every piece of the state of `length` tokens is there, as it should be, and no other."""
    shapes, numbers = expected(config, length)
    for kind, wanted, got in (
        ("tensor", shapes, {name: tuple(tensor.shape) for name, tensor in tensors.items()}),
        ("count", numbers, counts),
    ):
        for name in sorted({*wanted, *got}):
            if wanted.get(name) != got.get(name):
                raise StateError(
                    f"state of {length} tokens: {kind} {name} is {got.get(name, 'missing')}, "
                    f"expected {wanted.get(name, 'none')}"
                )
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype != config.dtype:
            raise StateError(f"state of {length} tokens: tensor {name} is {tensor.dtype}, expected {config.dtype}")


def restore(config: Any, tensors: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> DynamicCache:
    """The live cache of one row, from what `tensors_of` gave. The inverse of it, bit for bit."""
    cache = new_cache(config)
    for index, layer in enumerate(cache.layers):
        prefix = f"layers.{index}"
        window = tensors[f"{prefix}.window"]
        layer.lazy_initialization(window, window)
        layer.keys = layer.values = window
        layer.cumulative_length = counts[f"{prefix}.cumulative_length"]
        for holder, part, name in _fields(layer):
            holder[part] = tensors.get(f"{prefix}.{name}")
        for part in getattr(layer, "entry_count", {}):
            layer.entry_count[part] = counts[f"{prefix}.{part}.entry_count"]
    return cache
