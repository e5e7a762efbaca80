#!/usr/bin/env python3
"""Compiles DeepSeek-V4's mHC kernels before a cold start, a process for each, on all GPUs of the machine.

Result (docs/results): hidden size 2048, SGLang 0.5.23, three of four H200s: 21 kernels in 39 s, where a server compiles them one
after the other in 201 s before it serves; a server that finds them takes 3 to 5 s.

    scripts/env.sh python3 studies/compile_mhc.py --model DIR [--tokens 8192]

DIR holds the config.json of the checkpoint. SGLang compiles a kernel for each number of blocks that up to `--tokens` tokens
are split into (`kernels/ops/layernorm/mhc.py`, `prewarm_mhc_pre`): its chunked prefill size, or a rank's share of it with DP
attention; those of a larger number include them. What ends a layer (`mhc_post`) is left to the server. The kernels go to
TileLang's and DeepGEMM's caches on disk, where servers of this machine find them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode, NotReady, UsageError

FUSED = 4, 16  # tokens: the kernel for small batches exists for fewer than 8, and for 8 to 32
FIELDS = "hc_mult", "hidden_size", "hc_eps", "rms_norm_eps", "hc_sinkhorn_iters"
POST_MULT = 2.0  # MHC_POST_MULT_VALUE of srt/models/deepseek_v4_mhc.py


def compile_one(config: dict[str, Any], tokens: int, fused: bool) -> None:
    """Calls the kernel once, on the first visible GPU, with zeros."""
    import torch
    from sglang.kernels.ops.layernorm import mhc

    mhc.get_parallel = lambda: SimpleNamespace(tp_group=None)
    mhc.is_allocation_symmetric = lambda: False
    mhc.use_symmetric_memory = lambda *args, **kwargs: nullcontext()
    streams, hidden, eps = config["hc_mult"], config["hidden_size"], config["hc_eps"]
    mixes = 2 * streams + streams**2
    residual = torch.zeros(tokens, streams, hidden, dtype=torch.bfloat16, device="cuda")
    weights = [torch.zeros(shape, device="cuda") for shape in ((mixes, streams * hidden), (3,), (mixes,))]
    scalars = config["rms_norm_eps"], eps, eps, POST_MULT, config["hc_sinkhorn_iters"]
    norm = {"norm_weight": residual.new_ones(hidden), "norm_eps": config["rms_norm_eps"]}
    with torch.inference_mode():
        if fused:
            before = residual.new_zeros(tokens, hidden), residual
            mixed = weights[0].new_zeros(tokens, streams, 1), weights[0].new_zeros(tokens, streams, streams)
            mhc.mhc_fused_post_pre(*before, *mixed, *weights, *scalars, **norm)
        else:
            mhc.mhc_pre(residual, *weights, *scalars, 1, 32, **norm)
    torch.cuda.synchronize()


def main(argv: Sequence[str]) -> ExitCode:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory with config.json")
    parser.add_argument("--tokens", type=int, default=8192, help="chunked prefill size")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    config = json.loads((args.model / "config.json").read_text())
    if missing := [field for field in FIELDS if field not in config]:
        raise UsageError(f"{args.model}/config.json: no {', '.join(missing)}; name a checkpoint of DeepSeek-V4")
    if args.only:
        kind, tokens = args.only.split(":")
        compile_one(config, int(tokens), kind == "fused")
        return ExitCode.PASSED

    import torch
    from sglang.kernels.ops.layernorm.mhc import get_mhc_pre_token_count_representatives

    if not (gpus := torch.cuda.device_count()):
        raise NotReady("GPU: none is visible; run this where the servers will run")
    split = get_mhc_pre_token_count_representatives(args.tokens, config["hc_mult"] * config["hidden_size"])
    jobs = [f"pre:{tokens}" for tokens in split] + [f"fused:{tokens}" for tokens in FUSED]
    began = time.monotonic()
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
    processes = {
        job: subprocess.Popen(
            [sys.executable, __file__, *argv, "--only", job],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": visible[i % gpus]},
        )
        for i, job in enumerate(jobs)
    }
    failed = []
    for i, (job, process) in enumerate(processes.items(), 1):
        if process.wait():
            failed.append(job)
        print(f"{i} of {len(jobs)}: {job} after {time.monotonic() - began:.1f} s", flush=True)
    if failed:
        raise NotReady(f"kernels: {', '.join(failed)} did not compile; the message is above")
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("compile_mhc.py", main, sys.argv[1:]))
