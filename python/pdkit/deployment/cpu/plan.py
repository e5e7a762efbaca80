"""Flags and environment of SGLang's servers on CPU, as data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pdkit
from pdkit.core import paths
from pdkit.deployment.cpu import plugin

SITE = paths.ASSETS / "sglang-cpu-site"
SOURCE_VARIABLE = "PDKIT_SGLANG_SOURCE"
BACKENDS = "mooncake_tcp", "nixl"

FLAGS = """
    --device cpu --disable-cuda-graph --skip-server-warmup --random-seed 1 --sleep-on-idle
    --max-total-tokens 16384 --max-running-requests 16 --chunked-prefill-size 256
""".split()
"""Of every server. The pool holds eight of the longest prompts that the checks send."""

PD_FLAGS = ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
"""Of prefill and decode: retracted requests are kept as tensors, not in a pool of pinned memory."""

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "SGLANG_HOST_IP": "127.0.0.1",
    # libnccl of the CUDA wheels loads without a GPU; without it tensor-parallel groups use gloo.
    "SGLANG_NCCL_SO_PATH": "/nonexistent",
    "UCX_TLS": "tcp,self",
    # To the paths of DeepSeek-V4 that the shims cover. Other models read none of these, and all have one fork server.
    "SGLANG_DSV4_FP4_EXPERTS": "0",
    "SGLANG_FP8_PAGED_MQA_LOGITS_TORCH": "1",
    "SGLANG_OPT_USE_TILELANG_MHC_PRE": "0",
    "SGLANG_OPT_USE_TILELANG_MHC_POST": "0",
    "SGLANG_OPT_DEEPGEMM_HC_PRENORM": "0",
    "SGLANG_OPT_FUSE_MHC_POST_PRE": "0",
    "SGLANG_OPT_FLASHMLA_SPARSE_PREFILL": "0",
    "SGLANG_OPT_USE_FUSED_HASH_TOPK": "0",
    "SGLANG_OPT_USE_MULTI_STREAM_OVERLAP": "0",
    "SGLANG_OPT_DSV4_NONPAGED_INDEXER": "0",
    "SGLANG_OPT_USE_TOPK_V2": "0",
    "SGLANG_OPT_USE_JIT_INDEXER_METADATA": "0",
}


@dataclass(frozen=True)
class Model:
    """A kind of model, and its flags.

    name: which kernels it needs. checkpoint: its weights, see `checkpoints.provide`
    """

    name: str
    flags: tuple[str, ...]
    checkpoint: str


LLAMA = Model("llama", ("--dtype", "float32", "--attention-backend", "torch_native"), "llama")
DSV4 = Model(
    "dsv4",
    (
        *("--dtype", "bfloat16", "--kv-cache-dtype", "fp8_e4m3"),
        *("--swa-full-tokens-ratio", "1.0", "--dsa-topk-backend", "torch"),
    ),
    "dsv4",
)
TRAINED_DSV4 = replace(DSV4, checkpoint="dsv4-trained")
EAGLE = """
    --speculative-algorithm EAGLE
    --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2
""".split()


def library_path(environ: Mapping[str, str] = os.environ) -> str:
    """LD_LIBRARY_PATH of a server: what scripts/transfer_libraries.sh unpacked, if it did, and what is inherited."""
    unpacked = paths.cache(environ) / "debian-libraries"
    ours = [unpacked / "usr/lib/x86_64-linux-gnu", unpacked / "lib/x86_64-linux-gnu"] if unpacked.is_dir() else []
    return os.pathsep.join([*map(str, ours), *filter(None, [environ.get("LD_LIBRARY_PATH")])])


def source(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The directory that holds the package `sglang` of the working tree under test; None for the installed release."""
    given = environ.get(SOURCE_VARIABLE)
    if not given:
        return None
    root = Path(given).expanduser().absolute()
    return next((each for each in (root / "python", root) if (each / "sglang").is_dir()), root)


def python_path(tree: Path | None, environ: Mapping[str, str] = os.environ) -> str:
    """PYTHONPATH of a server: the shims' site, `tree` (a directory that holds a package sglang), pdkit, and the rest."""
    path = [SITE, tree, Path(pdkit.__file__).parent.parent]
    inherited = [each for each in environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    return os.pathsep.join(dict.fromkeys([*(str(each) for each in path if each), *inherited]))


def environment(model: Model, tree: Path | None = None, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a server of `model` is started with, beside what it inherits; `tree`: see `python_path`."""
    return {
        **ENVIRONMENT,
        plugin.FAMILY_VARIABLE: model.name,
        "PYTHONPATH": python_path(tree, environ),
        "LD_LIBRARY_PATH": library_path(environ),
        # Without .pyc files every server would compile SGLang anew, which takes longer than all the rest of its start.
        "PYTHONDONTWRITEBYTECODE": "",
    }


def require_active(log_path: str | Path) -> None:
    """Raises AssertionError unless the server that wrote the log runs with the shims."""
    with open(log_path, encoding="utf-8", errors="replace") as log:
        if not any(plugin.ACTIVE in line for line in log):
            raise AssertionError(
                f"{log_path}: SGLang did not load the CPU shims, so this server proves nothing: is {SITE} first on its PYTHONPATH?"
            )
