"""Checkpoints under the tensor names, dtypes and scales that SGLang's DeepSeek-V4 loader reads, and back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pdkit.core.paths import ASSETS
from pdkit.models.cpu.model import ModelError
from pdkit.models.cuda.fp8 import dequantize_blocks, quantize_blocks
from pdkit.models.cuda.model import KernelNano
from pdkit.models.cuda.store import WEIGHTS

# The nano's tokenizer whose special tokens have DeepSeek's names: SGLang 0.5.23 makes chats of a DeepseekV4ForCausalLM
# itself, by these names, whatever template the checkpoint has (`entrypoints/openai/serving_deepseek_recipe.py`); without
# them its server ends when it starts. <think> and </think> have new ids, which no training has seen.
# those of assets/few-heads-dsv4 are kept as committed: what made them of the nano's is gone
TOKENIZER_FILES = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"

_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^main\.model\.", ""),
        (r"^main\.lm_head\.", "head."),
        (r"^mtp\.(?:layer\.)?", "mtp.0."),
        (r"^embed_tokens\.", "embed."),
        (r"\bhc_head\.hc_", "hc_head_"),
        (r"\bself_attn\.compressor\.indexer\.scorer\.", "attn.indexer."),
        (r"\bself_attn\.compressor\.indexer\.q_b_proj\.", "attn.indexer.wq_b."),
        (r"\bself_attn\.compressor\.indexer\.", "attn.indexer.compressor."),
        (r"\bself_attn\.", "attn."),
        (r"\bcompressor\.kv_norm\.", "compressor.norm."),
        (r"\bcompressor\.gate_proj\.", "compressor.wgate."),
        (r"\bposition_bias$", "ape"),
        (r"\bsinks$", "attn_sink"),
        (r"\bq_a_norm\.", "q_norm."),
        (r"\b(q_a|q_b|o_a|o_b|kv)_proj\.", r"w\1."),
        (r"\bmlp\.", "ffn."),
        (r"\be_score_correction_bias$", "bias"),
        (r"\bshared_experts\.gate_proj\.", "shared_experts.w1."),
        (r"\bshared_experts\.down_proj\.", "shared_experts.w2."),
        (r"\bshared_experts\.up_proj\.", "shared_experts.w3."),
        (r"\binput_layernorm\.", "attn_norm."),
        (r"\bpost_attention_layernorm\.", "ffn_norm."),
        (r"\b(attn|ffn)_hc\.", r"hc_\1_"),
    )
)
_FP8 = re.compile(
    r"\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight$|\.(experts\.\d+|shared_experts)\.w[123]\.weight$"
    r"|\.[eh]_proj\.weight$"
)
FLOAT32 = re.compile(r"\bhc_\w+$|\.attn_sink$|\.ape$|\.compressor\.norm\.weight$|\.gate\.bias$")


def name_of(name: str) -> str:
    """DeepSeek's name of a tensor of KernelNano's state dict."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def pieces(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint that one tensor of the model is made of, as views of it: experts are stored apart."""
    renamed = name_of(name)
    if renamed.endswith("experts.gate_up_proj"):
        for index, expert in enumerate(tensor):
            w1, w3 = expert.chunk(2)
            yield renamed.replace("gate_up_proj", f"{index}.w1.weight"), w1
            yield renamed.replace("gate_up_proj", f"{index}.w3.weight"), w3
    elif renamed.endswith("experts.down_proj"):
        for index, expert in enumerate(tensor):
            yield renamed.replace("down_proj", f"{index}.w2.weight"), expert
    else:
        yield renamed, tensor


def stored(tensors: Mapping[str, torch.Tensor], quantized: bool) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, on CPU, of those of KernelNano's state dict.

    quantized: linear layers are fp8, with a float32 ``.scale`` each
    """
    found = {}
    for own, whole in tensors.items():
        for name, tensor in pieces(own, whole.detach().cpu()):
            if quantized and _FP8.search(name):
                found[name], found[f"{name.removesuffix('.weight')}.scale"] = quantize_blocks(tensor)
            elif name.endswith("tid2eid"):
                found[name] = tensor.to(torch.int32)
            else:
                found[name] = tensor.to(torch.float32 if FLOAT32.search(name) else torch.bfloat16)
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def tensors_of(model: KernelNano) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint of `model`, as its configuration says."""
    return stored(model.state_dict(), "quantization_config" in model.fields)


def save(model: KernelNano, path: str | Path) -> Path:
    """Write config.json, weights and tokenizer to the directory `path`; a reader sees the old weights or the new."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        (path / name).write_bytes((ASSETS / "few-heads-dsv4" / name).read_bytes())
    (path / "config.json").write_text(json.dumps(model.fields, indent=1) + "\n")
    unfinished = path / f".{WEIGHTS}.{os.getpid()}"
    save_file(tensors_of(model), unfinished, metadata={"format": "pt"})
    unfinished.replace(path / WEIGHTS)
    return path


@torch.no_grad()
def load(path: str | Path) -> KernelNano:
    """The model in the checkpoint at `path`, float32, dequantised. Raises pdkit.models.cpu.model.ModelError."""
    file = Path(path) / WEIGHTS
    try:
        stored = load_file(file)
        model = KernelNano(json.loads(file.with_name("config.json").read_text())).requires_grad_(False)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"no readable checkpoint at {path}: {error}; pdkit model kernel-random writes one") from None
    quantized = "quantization_config" in model.fields
    for own, whole in model.state_dict().items():
        for name, target in pieces(own, whole):
            fp8 = quantized and bool(_FP8.search(name))
            scale = stored.pop(f"{name.removesuffix('.weight')}.scale", None) if fp8 else None
            tensor = stored.pop(name, None)
            if tensor is None or tensor.shape != target.shape or (scale is None) == fp8:
                raise ModelError(f"{file} does not fit its config.json: {name} is missing or of another shape")
            target.copy_(tensor if scale is None else dequantize_blocks(tensor, scale))
    if stored:
        raise ModelError(f"{file} does not fit its config.json: {min(stored)} is unknown")
    return model.eval()
