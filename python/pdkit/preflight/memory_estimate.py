"""How much GPU memory a DeepSeek-V4 takes, roughly, from its config.json.

Weights are counted tensor by tensor, as `sglang/srt/models/deepseek_v4.py` and its checkpoints have them. One GPU holds

    [routed / tp + lm_head / tp + (heads + shared + embedding) / a + replicated] / pp

where a = tp / attention_dp is the width of attention: routed experts are spread over all tp ranks of a replica; query
and output projections, shared experts and embedding only over those of one attention group; the rest (KV projection,
compressors, indexer, hyper-connections, router) is on each GPU. Quantized matrices take one byte an element and four
per 128 x 128 block; FP4 experts half a byte and one per 32 elements.

KV cache, per token of context, from SGLang's `DSV4PoolConfigurator` (0.5.12; later releases move the parts with w
into a pool of fixed size):

    kv      = nope + 2 * rope + 8                                bytes of one latent: FP8, bf16, scales
    index   = i + 4 * (i // 128)                                 i = index_head_dim
    state4  = 4 * (nope + rope) * 4 + 4 * i * 4                  fp32 state of a compressor and its indexer
    state128 = 2 * (nope + rope) * 4
    token   = w * kv * L + kv / 4 * L4 + index / 4 * L4 + kv / 128 * L128
              + w * (ring4 / window * state4 * L4 + ring128 / window * state128 * L128)

with L layers, L4 and L128 of them compressed by 4 and 128, w = 0.1 the share of tokens that keep sliding-window slots,
and rings of 8 and 128 slots; with speculative decoding rings of 16 and 256, times (L + 1) / L for the draft layer. The
tokens that fit are (memory * mem_fraction_static - weights) / token. Activations, CUDA graphs, communication buffers
and what CUDA itself takes come out of the share that mem_fraction_static leaves, and are not estimated.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Group = Literal["routed experts", "shared experts", "heads", "embedding", "lm head", "replicated"]

_RATIO = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
SWA_SHARE = 0.1
BLOCK = 128


class UnknownModel(Exception):
    """No estimate for this config; the message is one line."""


@dataclass(frozen=True)
class Tensor:
    """`numel` parameters of a kind: `matrix` is quantized where the model is, the others keep their type."""

    group: Group
    rows: int
    columns: int
    kind: Literal["matrix", "bf16", "fp32", "int32"]
    copies: int = 1

    @property
    def numel(self) -> int:
        return self.rows * self.columns * self.copies

    def bytes(self, is_fp8: bool, has_fp4_experts: bool) -> float:
        if self.kind != "matrix":
            return self.numel * {"bf16": 2, "fp32": 4, "int32": 4}[self.kind]
        if has_fp4_experts and self.group == "routed experts":
            return self.numel * (1 / 2 + 1 / 32)
        if is_fp8:
            return self.numel + 4 * math.ceil(self.rows / BLOCK) * math.ceil(self.columns / BLOCK) * self.copies
        return self.numel * 2


@dataclass(frozen=True)
class Model:
    """Tensors of the model and of its MTP layer, which only speculative decoding loads, and its KV bytes per token.

    Routed experts are FP4 where `has_fp4_experts` or, below, `fp4_experts` says so; None leaves it to the former.
    """

    tensors: tuple[Tensor, ...]
    mtp: tuple[Tensor, ...]
    is_fp8: bool
    has_fp4_experts: bool
    kv_bytes_per_token: float
    kv_bytes_per_token_speculative: float

    def parameters(self, with_mtp: bool = False) -> int:
        return sum(tensor.numel for tensor in self._tensors(with_mtp))

    def weight_bytes(self, with_mtp: bool = False, fp4_experts: bool | None = None) -> float:
        """Bytes of all weights, as on disk."""
        return sum(self._bytes(tensor, fp4_experts) for tensor in self._tensors(with_mtp))

    def weight_bytes_per_gpu(
        self, tp: int, attention_dp: int = 1, pp: int = 1, with_mtp: bool = False, fp4_experts: bool | None = None
    ) -> float:
        """Bytes of weights on each GPU of a server; see the formula above."""
        attention = tp / attention_dp
        shares = {"routed experts": tp, "lm head": tp, "replicated": 1}
        tensors = self._tensors(with_mtp)
        return sum(self._bytes(t, fp4_experts) / shares.get(t.group, attention) for t in tensors) / pp

    def tokens(self, gpu_bytes: float, mem_fraction: float, weights: float, speculative: bool = False) -> float:
        """Tokens of context that fit beside `weights` bytes on one GPU; negative where these do not fit themselves."""
        token = self.kv_bytes_per_token_speculative if speculative else self.kv_bytes_per_token
        return (gpu_bytes * mem_fraction - weights) / token

    def _bytes(self, tensor: Tensor, fp4_experts: bool | None) -> float:
        return tensor.bytes(self.is_fp8, self.has_fp4_experts if fp4_experts is None else fp4_experts)

    def _tensors(self, with_mtp: bool) -> tuple[Tensor, ...]:
        return self.tensors + self.mtp * with_mtp


def _compression(config: Mapping) -> list[int]:
    if "compress_ratios" in config:
        return list(config["compress_ratios"][: config["num_hidden_layers"]])
    rates = config.get("compress_rates") or {}
    return [rates.get(kind, _RATIO[kind]) for kind in config["layer_types"]]


def _hash_layers(config: Mapping) -> int:
    return config.get("num_hash_layers", list(config.get("mlp_layer_types", ())).count("hash_moe"))


def _compressor(hidden: int, ratio: int, dim: int) -> Iterator[Tensor]:
    width = dim * (2 if ratio == 4 else 1)
    yield Tensor("replicated", ratio, width, "fp32")
    yield Tensor("replicated", width, hidden, "bf16", copies=2)
    yield Tensor("replicated", 1, dim, "fp32")


def _layer(config: Mapping, ratio: int, is_hashed: bool) -> Iterator[Tensor]:
    c, hidden, dim, heads = config, config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    low_rank = c["o_groups"] * c["o_lora_rank"]
    yield Tensor("replicated", c["q_lora_rank"], hidden, "matrix")
    yield Tensor("heads", heads * dim, c["q_lora_rank"], "matrix")
    yield Tensor("replicated", dim, hidden, "matrix")
    yield Tensor("heads", low_rank, heads * dim // c["o_groups"], "matrix")
    yield Tensor("heads", hidden, low_rank, "matrix")
    yield Tensor("heads", 1, heads, "fp32")
    yield Tensor("replicated", 1, c["q_lora_rank"] + dim + 2 * hidden, "bf16")
    if ratio:
        yield from _compressor(hidden, ratio, dim)
    if ratio == 4:
        yield Tensor("replicated", c["index_n_heads"] * c["index_head_dim"], c["q_lora_rank"], "matrix")
        yield Tensor("replicated", c["index_n_heads"], hidden, "bf16")
        yield from _compressor(hidden, ratio, c["index_head_dim"])
    yield from _hyper_connections(c["hc_mult"], hidden)
    yield Tensor("replicated", c["n_routed_experts"], hidden, "bf16")
    if is_hashed:
        yield Tensor("replicated", c["vocab_size"], c["num_experts_per_tok"], "int32")
    else:
        yield Tensor("replicated", 1, c["n_routed_experts"], "fp32")
    width = c["moe_intermediate_size"]
    yield Tensor("routed experts", width, hidden, "matrix", copies=3 * c["n_routed_experts"])
    yield Tensor("shared experts", width, hidden, "matrix", copies=3 * c["n_shared_experts"])


def _hyper_connections(streams: int, hidden: int) -> Iterator[Tensor]:
    """Before attention and before the experts."""
    mixed = (2 + streams) * streams
    yield Tensor("replicated", 1, mixed * streams * hidden + mixed + 3, "fp32", copies=2)


def _head_of_streams(streams: int, hidden: int) -> Tensor:
    return Tensor("replicated", 1, streams * streams * hidden + streams + 1, "fp32")


def _mtp(config: Mapping) -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    yield from _layer(config, 0, False)
    yield Tensor("replicated", hidden, hidden, "matrix", copies=2)
    yield Tensor("replicated", 3, hidden, "bf16")
    yield _head_of_streams(config["hc_mult"], hidden)


def _kv_bytes_per_token(config: Mapping, ratios: list[int], speculative: bool) -> float:
    rope = config["qk_rope_head_dim"]
    nope, index, window = config["head_dim"] - rope, config["index_head_dim"], config["sliding_window"]
    layers, by_4, by_128 = len(ratios), ratios.count(4), ratios.count(128)
    ring_4, ring_128 = (16, 256) if speculative else (8, 128)
    latent, index_bytes = nope + 2 * rope + 8, index + index // BLOCK * 4
    state_4, state_128 = 16 * (nope + rope + index), 8 * (nope + rope)
    compressed = (latent + index_bytes) / 4 * by_4 + latent / 128 * by_128
    window_slots = latent * layers + ring_4 / window * state_4 * by_4 + ring_128 / window * state_128 * by_128
    token = compressed + SWA_SHARE * window_slots
    return token * (layers + 1) / layers if speculative else token


def of_config(config: Mapping) -> Model:
    """The estimate for the config.json of a DeepSeek-V4, in SGLang's or transformers' words. Raises UnknownModel."""
    if config.get("model_type") != "deepseek_v4":
        raise UnknownModel(f"no memory estimate for model type {config.get('model_type')!r}, only for deepseek_v4")
    try:
        return _of_dsv4(config)
    except KeyError as error:
        raise UnknownModel(f"no memory estimate: config.json lacks {error.args[0]!r}") from None


def _of_dsv4(config: Mapping) -> Model:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    ratios, hashed = _compression(config), _hash_layers(config)
    tensors = [tensor for i, ratio in enumerate(ratios) for tensor in _layer(config, ratio, i < hashed)]
    tensors += [
        Tensor("embedding", vocabulary, hidden, "bf16"),
        Tensor("lm head", vocabulary, hidden, "bf16"),
        Tensor("replicated", 1, hidden, "bf16"),
        _head_of_streams(config["hc_mult"], hidden),
    ]
    mtp = [tensor for _ in range(config.get("num_nextn_predict_layers", 0)) for tensor in _mtp(config)]
    is_fp8 = (config.get("quantization_config") or {}).get("quant_method") == "fp8"
    kv = (_kv_bytes_per_token(config, ratios, speculative) for speculative in (False, True))
    return Model(tuple(tensors), tuple(mtp), is_fp8, config.get("expert_dtype") == "fp4", *kv)
