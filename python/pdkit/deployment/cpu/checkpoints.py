"""The models that are served, of docs/sglang-cpu.md; the random one is made from a fixed seed where it is needed.

"llama"    trained (`train_llama`), served in float32: who else is served changes the sixth decimal of its logprobs
"dsv4"     random, with an MTP layer whose draft mostly repeats the token before it
"dsv4-trained"  trained on a GPU and kept in assets/few-heads-dsv4, or in the cache
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pdkit.core import paths
from pdkit.core.errors import NotReady
from pdkit.core.paths import ASSETS
from pdkit.models.cuda import store
from pdkit.models.cuda.config import FEW_HEADS

SEED = 5
DSV4_FIELDS: dict[str, Any] = {
    **FEW_HEADS,
    "num_hidden_layers": 4,
    "compress_ratios": [0, 4, 128, 4, 0],
    "index_n_heads": 8,
    "vocab_size": 520,
}
"""config.json, in DeepSeek's own names; what is not named here is as in pdkit.models.cuda.config.

Linear layers are bfloat16: the fp8 ones need a GPU.
"""


def provide(kind: str) -> Path:
    """The directory of a model; the random one is made if it is not there, or was made by other code.

    Raises NotReady where the trained DeepSeek-V4 is absent, store.DamagedCheckpoint where it is not that of its record.
    """
    if kind == "llama":
        return ASSETS / "nano-llama"
    if kind == "dsv4-trained":
        for path in (ASSETS / "few-heads-dsv4", store.cached(store.FEW_HEADS)):
            if store.is_trained(path):
                return path
        raise NotReady(f"no trained DeepSeek-V4 in {ASSETS}: pdkit model kernel-train --few-heads makes one on a GPU")
    assert kind == "dsv4", kind
    path = paths.cache() / "sglang-cpu" / f"dsv4-{_version()}"
    if not (path / "config.json").is_file():
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        make_dsv4(unfinished)
        try:
            unfinished.rename(path)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return path


def _version() -> str:
    import hashlib

    import transformers

    content = Path(__file__).read_bytes() + json.dumps(DSV4_FIELDS).encode() + transformers.__version__.encode()
    return hashlib.sha256(content).hexdigest()[:10]


def _untrained_dsv4(*, mtp: bool) -> Any:
    """Without its MTP layer, or that layer as a model of one layer: a DeepseekV4ForCausalLM, float32."""
    from transformers import DeepseekV4ForCausalLM

    from pdkit.models.cuda.model import reference_config

    config = reference_config(DSV4_FIELDS, mtp=mtp, initializer_range=0.08)
    model = DeepseekV4ForCausalLM(config).float()
    _randomize(model)
    return model


def _randomize(module: Any) -> None:
    """Values that initialisation leaves at 0 or 1, so that all that is transferred and pooled matters; in place."""
    import torch

    from pdkit.models.cuda.checkpoint import FLOAT32

    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("tid2eid"):
                experts = DSV4_FIELDS["n_routed_experts"]
                tensor.copy_(torch.rand(len(tensor), experts).argsort(1)[:, : tensor.shape[1]])
            elif any(part in name for part in ("sinks", "position_bias", "correction_bias")):
                tensor.normal_(0, 0.3)
            elif "hc" in name:
                if name.endswith("fn"):
                    tensor.normal_(0, 0.05)
                elif name.endswith("base"):
                    tensor.normal_(0, 0.3)
                elif name.endswith("scale"):
                    tensor.fill_(0.5)
            if tensor.is_floating_point() and not FLOAT32.search(name):
                tensor.copy_(tensor.bfloat16().float())


def _mtp_tensors(main: Any) -> dict[str, Any]:
    """The MTP layer: a random layer, and a projection which makes the head name the token that was embedded."""
    import torch

    donor = _untrained_dsv4(mtp=True)
    width = DSV4_FIELDS["hidden_size"]
    embedding, head = main.model.embed_tokens.weight.detach(), main.lm_head.weight.detach()
    agree = head.T @ (embedding * embedding.square().mean(-1, keepdim=True).rsqrt())
    return {
        **donor.model.layers[0].state_dict(),
        **{f"hc_head.{name}": tensor for name, tensor in donor.model.hc_head.state_dict().items()},
        "norm.weight": donor.model.norm.weight.detach(),
        "enorm.weight": torch.ones(width),
        "hnorm.weight": torch.ones(width),
        "h_proj.weight": torch.randn(width, width) * 0.02,
        "e_proj.weight": agree * (20 / agree.norm(dim=1).mean()),  # louder than what the random layer adds
    }


def make_dsv4(path: Path) -> None:
    """Write the DeepSeek-V4 to the new directory `path`."""
    import torch
    from safetensors.torch import save_file

    from pdkit.models.cuda.checkpoint import TOKENIZER_FILES, stored

    path.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(ASSETS / "nano-dsv4" / name, path / name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        main = _untrained_dsv4(mtp=False)
        torch.manual_seed(SEED + 1)
        mtp = _mtp_tensors(main)
    named = {f"main.{name}": tensor for name, tensor in main.state_dict().items()}
    named |= {f"mtp.{name}": tensor for name, tensor in mtp.items()}
    save_file(stored(named, quantized=False), path / store.WEIGHTS)
    (path / "config.json").write_text(json.dumps(DSV4_FIELDS, indent=1) + "\n", encoding="utf-8")
