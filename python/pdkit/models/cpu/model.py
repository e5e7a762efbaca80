"""Loading a DeepSeek-V4 for CPU serving: a checkpoint, or random weights from a seed.

Both come out as transformers' ``DeepseekV4ForCausalLM`` in float32, in eval mode,
with eager attention and densely evaluated experts. Weights are stored in, or
rounded to, bfloat16: a random model saved as a checkpoint is the same model.
"""

from __future__ import annotations

import json
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.utils import logging

from pdkit.models.cpu.experts import NAME as DENSE_EXPERTS

LoadFormat = Literal["auto", "dummy"]
WEIGHTS = "model.safetensors"

_AROUND_ONE = ("norm.weight", ".scale", ".hc_scale")
_AROUND_ONE_SPREAD = 0.1


class ModelError(ValueError):
    """The model path holds nothing that can be loaded; the message is one line for the user."""


def load_config(path: str | Path) -> DeepseekV4Config:
    """Read ``config.json`` of a DeepSeek-V4. Raises :class:`ModelError`."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ModelError(f"no model at {str(path)!r}: config.json is missing; pass a directory that holds one")
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON ({error}); restore the file") from None
    found = fields.get("model_type") if isinstance(fields, dict) else None
    if found != "deepseek_v4":
        raise ModelError(f"{file} says model_type {found!r}; this engine serves 'deepseek_v4' only")
    try:
        return DeepseekV4Config.from_pretrained(file.parent)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{file} is not a valid DeepSeek-V4 configuration: {reason}") from None


def load_model(path: str | Path, *, load_format: LoadFormat = "auto", seed: int = 0) -> DeepseekV4ForCausalLM:
    """Load the DeepSeek-V4 at `path` for serving on CPU.

    ``"auto"`` reads ``model.safetensors`` (DeepSeek's or transformers' tensor names) and
    insists that every weight is there. ``"dummy"`` reads ``config.json`` alone and draws
    every weight from `seed`, see :func:`randomize`. Raises :class:`ModelError`.
    """
    assert load_format in ("auto", "dummy"), load_format
    config = load_config(path)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": DENSE_EXPERTS}
    if load_format == "dummy":
        model = DeepseekV4ForCausalLM._from_config(config, **options)
        randomize(model, seed)
    else:
        if not (Path(path) / WEIGHTS).is_file():
            raise ModelError(f"no {WEIGHTS} in {str(path)!r}; for random weights use --load-format dummy")
        try:
            with _quiet():
                model, info = DeepseekV4ForCausalLM.from_pretrained(
                    path, config=config, output_loading_info=True, local_files_only=True, **options
                )
        except (SafetensorError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"{WEIGHTS} in {str(path)!r} is damaged or does not fit its config.json: {reason}"
            ) from None
        wrong = sorted(str(key) for kind in info.values() for key in kind)
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ModelError(
                f"{WEIGHTS} in {str(path)!r} does not fit its config.json: "
                f"missing, unexpected or of another shape: {wrong[0]}{more}"
            )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def save_model(model: DeepseekV4ForCausalLM, path: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (bfloat16, DeepSeek's tensor names) to `path`.

    `model` itself keeps its precision.
    """
    rounded = DeepseekV4ForCausalLM._from_config(model.config, dtype=torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    with _quiet():
        rounded.save_pretrained(path)


@torch.no_grad()
def randomize(model: DeepseekV4ForCausalLM, seed: int) -> None:
    """Fill every parameter and routing buffer of `model` from `seed`, in place.

    Matrices, biases and sinks are N(0, ``initializer_range``²), norm weights and
    hyper-connection scales N(1, 0.1²), the expert bias N(0, 0.1²), all rounded to
    bfloat16; each row of a hash layer's ``tid2eid`` names distinct experts. Each tensor
    has its own stream, keyed by seed and name, drawn by numpy's PCG64, whose stream does
    not depend on machine or thread count.
    """
    std = model.config.initializer_range
    for name, tensor in model.state_dict().items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if name.endswith("tid2eid"):
            values = hash_routes(rng, *tensor.shape, model.config.n_routed_experts)
            tensor.copy_(torch.from_numpy(values))
            continue
        noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), dtype=np.float32))
        if name.endswith(_AROUND_ONE):
            noise = 1 + _AROUND_ONE_SPREAD * noise
        elif name.endswith("e_score_correction_bias"):
            noise = _AROUND_ONE_SPREAD * noise
        else:
            noise = std * noise
        tensor.copy_(noise.bfloat16())


def hash_routes(rng: np.random.Generator, vocab_size: int, top_k: int, experts: int) -> np.ndarray:
    """``tid2eid [vocab_size, top_k]`` of a hash layer: distinct random experts for each token."""
    return rng.random((vocab_size, experts)).argsort(axis=1)[:, :top_k].astype(np.int64)


@contextmanager
def _quiet():
    """Keep transformers' progress bars and multi-line load report off the terminal."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
