#!/usr/bin/env python3
"""Whether the CPU shims of target sglang-cpu compute what SGLang's kernels do on a GPU: same seeded inputs, one record.

    PYTHONPATH=python python3 studies/shims_truth.py --out shims-truth.json               # SGLang 0.5.23 on one Hopper GPU
    scripts/env.sh python3 studies/shims_truth.py --rehearse --out shims-truth.json       # without a GPU

The cases of `pdkit.deployment.cpu.truth`, with SGLang's own wrappers on the GPU. For each result the record
has shapes, dtypes, whether the bytes are equal, how many differ, and largest and root mean square difference, absolute
and over the root mean square of SGLang's. A case that fails is recorded, the next one runs. `--rehearse` calls SGLang's
wrappers with the shims installed in them and Triton's kernels in its interpreter: that the calls fit is tried so.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pdkit.core.command import Parser, positive, run_command
from pdkit.core.errors import ExitCode, NotReady
from pdkit.core.host import installed
from pdkit.deployment.cpu.truth import BF16, CASES, F32, I32, PAGE, Arm, Case, Results, op, value_of


def compared(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, Any]:
    """What the record holds of one result."""
    theirs = theirs.detach().cpu()
    row: dict[str, Any] = {
        "shape": list(ours.shape),
        "dtype": str(ours.dtype).removeprefix("torch."),
        "ours_sha256": hashlib.sha256(bytes_of(ours)).hexdigest()[:16],
    }
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return row | {"theirs_shape": list(theirs.shape), "theirs_dtype": str(theirs.dtype), "bytes_equal": False}
    row["bytes_equal"] = bytes_of(ours) == bytes_of(theirs)
    a, b = ours.double(), theirs.double()
    same = (a == b) | (a.isnan() & b.isnan())
    row["unequal"] = int((~same).sum())
    if row["unequal"]:
        off = torch.where(same, 0, (a - b).abs())
        size = float(b[b.isfinite()].square().mean().sqrt()) or 1.0
        row |= {"max": float(off.max()), "rms": float(off.square().mean().sqrt())}
        row |= {"max_over_rms": row["max"] / size, "rms_over_rms": row["rms"] / size}
        row["where"] = [list(each) for each in (~same).nonzero()[:4].tolist()]
    return row


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def run_case(case: Case, arm: Arm, seed: int) -> dict[str, Any]:
    """{"results": {name: comparison}} or {"error": traceback's end, "ours": names}."""
    began = time.monotonic()
    torch.manual_seed(seed)
    row: dict[str, Any] = {"about": case.about}
    ours: Results = {}
    try:
        parts = case.compute(arm)
        ours = next(parts)
        theirs = next(parts)
        if arm.device.type == "cuda":
            torch.cuda.synchronize()
        row["results"] = {name: compared(value_of(ours[name]), value_of(each)) for name, each in theirs.items()}
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        where = traceback.format_exc().splitlines()[-6:]
        row |= {"error": f"{type(error).__name__}: {str(error)[:600]}", "where": where, "ours": list(ours)}
    row["seconds"] = round(time.monotonic() - began, 2)
    return row


def modules_to_compile() -> list[tuple[str, tuple]]:
    """SGLang's CUDA modules that the cases need, compiled side by side before the first, and what they are made for."""
    layout = op("attention.dsv4.kv_layout:KVLayout").V4
    return [
        *(
            ("attention.dsv4.attn:_jit_fused_store_module", (kind, BF16, I32, size, layout))
            for kind, size in (("flashmla", PAGE), ("indexer", 64))
        ),
        *(
            ("attention.dsv4.compress:_jit_compress_module", (width, F32, F32, F32, ratio))
            for width, ratio in ((512, 4), (128, 4), (512, 128))
        ),
        *(
            ("attention.dsv4.compress:_jit_compress_norm_rope_module", (F32, width, 64, size, False, layout))
            for width, size in ((512, 64), (512, 2), (128, 64))
        ),
        ("attention.dsv4.compress:_jit_compress_plan_module", ()),
        ("attention.dsv4.norm_rope:_jit_fused_rope_module", ()),
        ("attention.dsv4.norm_rope:_jit_main_q_norm_rope_module", (BF16, 512, 64, True)),
        ("attention.dsv4.norm_rope:_jit_main_k_norm_rope_flashmla_module", (BF16, 512, 64, PAGE, layout)),
        ("attention.dsv4.norm_rope:_jit_main_q_indexer_rope_hadamard_quant_module", (BF16,)),
        ("activation.silu_and_mul_clamp:_jit_silu_and_mul_clamp_module", (BF16,)),
        ("speculative.tree:_jit_tree_module", ()),
        ("memory.adler32:_jit_adler32_module", ()),
    ]


def compile_all(limit: float) -> dict[str, Any]:
    """Compile what the cases need in `limit` seconds at most; what was not finished or failed, by name."""
    began = time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 4)
    try:
        wanted = modules_to_compile()
        for name, _ in wanted:
            op(name)
        futures = {pool.submit(op(name), *given): f"{name}{given}" for name, given in wanted}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    concurrent.futures.wait(futures, timeout=limit)
    failed = {name: repr(each.exception())[:300] for each, name in futures.items() if each.done() and each.exception()}
    unfinished = [name for each, name in futures.items() if not each.done()]
    pool.shutdown(wait=False, cancel_futures=True)
    return {"seconds": round(time.monotonic() - began, 1), "failed": failed, "unfinished": unfinished}


def versions() -> dict[str, str]:
    names = "sglang", "triton", "sgl-flash-mla", "sgl-deep-gemm", "tilelang"
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {name: version for name in names if (version := installed(name))}


def rehearse(argv: Sequence[str]) -> None:
    """Become a process in the environment of a server of this target, with the shims installed in SGLang."""
    from pdkit.deployment.cpu import plan, plugin

    if plugin.FAMILY_VARIABLE not in os.environ:
        environment = {**os.environ, **plan.environment(plan.DSV4), "TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, "-W", "ignore", __file__, *argv], environment)
    plugin.activate()


def main(argv: Sequence[str]) -> ExitCode:
    """Raises NotReady without a GPU."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("shims-truth.json"), help="default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: whether the calls fit")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds it")
    parser.add_argument(
        "--limit", type=positive, default=55, metavar="S", help="begin no case later (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    began, arm = time.monotonic(), Arm()
    if args.rehearse:
        rehearse(argv)
    elif not torch.cuda.is_available():
        raise NotReady("a comparison with SGLang's kernels needs a GPU; --rehearse tries the calls without one")
    else:
        arm = Arm(torch.device("cuda", torch.cuda.current_device()))
    record: dict[str, Any] = {"seed": args.seed, "rehearsal": args.rehearse, "versions": versions(), "cases": {}}
    record["device"] = torch.cuda.get_device_name(arm.device) if arm.device.type == "cuda" else "none"
    if arm.device.type == "cuda":
        record["compiled"] = compile_all(0.7 * args.limit)
    for case in CASES:
        name = case.name
        if args.only not in name or "gpu" not in case.on:
            continue
        late = time.monotonic() - began > args.limit
        row = {"error": f"not begun within {args.limit:g} s"} if late else run_case(case, arm, args.seed)
        record["cases"][name] = row
        results = row.get("results", {})
        equal = sum(each["bytes_equal"] for each in results.values())
        far = max((each.get("rms_over_rms", 0) for each in results.values()), default=0)
        line = f"{equal} of {len(results)} equal to the byte, RMS difference at most {far:.2g} of the value's RMS"
        print(
            f"{name}: {row['error'].splitlines()[0] if 'error' in row else line} ({row.get('seconds', 0)} s)",
            flush=True,
        )
        record["seconds"] = round(time.monotonic() - began, 1)
        unfinished = args.out.with_suffix(".part")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(args.out)
    failed = [name for name, row in record["cases"].items() if "error" in row]
    print(
        f"wrote {args.out}: {len(record['cases'])} cases in {record.get('seconds', 0)} s, without a result: {failed or 'none'}",
        flush=True,
    )
    sys.stdout.flush()
    os._exit(ExitCode.FAILED if failed and not args.rehearse else ExitCode.PASSED)  # compilers may still run


if __name__ == "__main__":
    sys.exit(run_command("shims_truth.py", main, sys.argv[1:]))
