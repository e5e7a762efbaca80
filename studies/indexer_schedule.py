#!/usr/bin/env python3
"""Whether the indexer of the installed SGLang reads past the lengths of its rows, which can end a server. One GPU.

Result (docs/results): 0.5.17 on an H100 ends in an illegal memory access with 122 rows with an entry; 0.5.23 on an H200 is
sound with 122, and ends so with none.

    scripts/env.sh python3 studies/indexer_schedule.py

Two requests of 64 tokens are 128 rows, 6 of them without a compressed entry: 122 tasks for the SMs of the GPU. DeepGEMM
scores them as SGLang's plan and as its own says, in a process each, with the lengths of the rows at the end of mapped
memory and away from it. Then the same for prompts so short that no row has an entry, for which SGLang 0.5.18 to 0.5.23
still start all SMs past the last row. docs/findings/indexer-plan-past-the-last-row.md says what is wrong.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version

from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode, NotReady

REQUESTS, TOKENS, RATIO = 2, 64, 4
ENTRIES_A_PAGE, HEADS, HEAD_DIM = 64, 64, 128
SGLANG_MODULES = "sglang.kernels.ops.attention.dsv4", "sglang.jit_kernel.dsv4", "sglang.jit_kernel.deepseek_v4"
ARM_S = 300


def mapped(words: int, spare: int):
    """A tensor of int32, followed by `spare` bytes of mapped memory and then by none."""
    import torch
    from cuda.bindings import driver

    def call(function, *args):
        error, *result = function(*args)
        assert error == driver.CUresult.CUDA_SUCCESS, (function, error)
        return result[0] if result else None

    torch.cuda.init()
    torch.empty(1, device="cuda")
    where = driver.CUmemAllocationProp()
    where.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    where.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    where.location.id = 0
    least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    size = call(driver.cuMemGetAllocationGranularity, where, least)
    base = call(driver.cuMemAddressReserve, 2 * size, 0, 0, 0)
    call(driver.cuMemMap, base, size, 0, call(driver.cuMemCreate, size, where, 0), 0)
    access = driver.CUmemAccessDesc()
    access.location = where.location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    call(driver.cuMemSetAccess, base, size, [access], 1)

    class Last:
        __cuda_array_interface__ = {
            "shape": (words,),
            "typestr": "<i4",
            "data": (int(base) + size - spare - 4 * words, False),
            "version": 3,
        }

    return torch.as_tensor(Last(), device="cuda")


def sglangs_plan():
    for name in SGLANG_MODULES:
        try:
            return importlib.import_module(name).get_paged_mqa_logits_metadata
        except (ImportError, AttributeError):
            continue
    raise NotReady(f"sglang {version('sglang')} has no plan of its own in {', '.join(SGLANG_MODULES)}")


def arm(plan: str, spare: int, tokens: int) -> dict:
    """Scores once, for requests of `tokens` tokens. Raises what CUDA raises."""
    import deep_gemm
    import torch

    rows, sms = REQUESTS * TOKENS, deep_gemm.get_num_sms()
    lengths = mapped(rows, spare)
    lengths.copy_((torch.arange(rows) % tokens + 1) // RATIO)
    make = sglangs_plan() if plan == "SGLang" else deep_gemm.get_paged_mqa_logits_metadata
    schedule = make(lengths[:, None], ENTRIES_A_PAGE, sms)
    found = {"sms": sms, "outside": int((schedule[:sms, 0] >= rows).sum()), "tasks": int((lengths > 0).sum())}
    print(json.dumps(found), flush=True)

    torch.manual_seed(0)
    pages = torch.randn(REQUESTS, ENTRIES_A_PAGE, HEAD_DIM, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.ones(REQUESTS, ENTRIES_A_PAGE, device="cuda").view(torch.uint8)
    cache = torch.cat([pages.flatten(1), scales.flatten(1)], 1).view(REQUESTS, ENTRIES_A_PAGE, 1, HEAD_DIM + 4)
    logits = deep_gemm.fp8_paged_mqa_logits(
        torch.randn(rows, 1, HEADS, HEAD_DIM, device="cuda").to(torch.float8_e4m3fn),
        cache,
        torch.rand(rows, HEADS, device="cuda"),
        lengths[:, None],
        torch.arange(REQUESTS, dtype=torch.int32, device="cuda").repeat_interleave(TOKENS)[:, None],
        schedule,
        ENTRIES_A_PAGE,
        False,
    )
    torch.cuda.synchronize()
    asked = torch.arange(ENTRIES_A_PAGE, device="cuda") < lengths[:, None]
    return found | {"sum": float(logits[:, :ENTRIES_A_PAGE][asked].double().sum())}


def outcome(plan: str, spare: int, tokens: int) -> dict:
    """What `arm` found in a process of its own, and how it ended."""
    command = [sys.executable, __file__, "--arm", plan, str(spare), str(tokens)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=ARM_S)
    except subprocess.TimeoutExpired:
        return {"ended": f"no end within {ARM_S} s"}
    found = {}
    for line in run.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if run.returncode == 0:
        return found | {"ended": f"scored, sum {found['sum']:.6f}"}
    if "illegal memory access" in run.stderr:
        return found | {"ended": "illegal memory access"}
    return found | {"ended": " ".join(run.stderr.split())[-300:] or f"exit code {run.returncode}"}


def main(argv: Sequence[str]) -> ExitCode:
    parser = Parser(prog="indexer_schedule.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--arm", nargs=3, metavar=("PLAN", "SPARE", "TOKENS"), help="one of them, in this process")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise NotReady("no Hopper GPU is visible; this asks one of compute capability 9.0")
    if args.arm:
        print(json.dumps(arm(args.arm[0], *map(int, args.arm[1:]))))
        return ExitCode.PASSED
    sglangs_plan()
    print(f"sglang {version('sglang')}, DeepGEMM on {torch.cuda.get_device_name()}", flush=True)
    print(f"{'plan of':<10}{'rows with an entry':<20}{'lengths at the end of mapped memory':<38}", end="")
    print(f"{'SMs that start past the last row':<36}ended", flush=True)
    scored = True
    for tokens in (TOKENS, RATIO - 1):
        for plan in ("SGLang", "DeepGEMM"):
            for spare in (512, 0):
                found = outcome(plan, spare, tokens)
                outside = f"{found['outside']} of {found['sms']}" if "sms" in found else "?"
                print(f"{plan:<10}{found.get('tasks', '?'):<20}{'no' if spare else 'yes':<38}", end="")
                print(f"{outside:<36}{found['ended']}", flush=True)
                scored = scored and "sum" in found
    return ExitCode.PASSED if scored else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(run_command("indexer_schedule.py", main, sys.argv[1:]))
