#!/usr/bin/env python3
"""In how many of some prompts each fault of SGLang's own KV transfer shows on `sglang-cpu`, and whether the gate sees it.

Result: docs/results/sglang-cpu-faults-0.5.23.json, of which studies/requests_needed.py makes the table of
docs/decisions/requests-needed.md.

Starts SGLang's prefill, decode and monolithic server on CPU; for each fault it sends short prompts one at a time and one for
which the indexer chooses, counts answers that are not the monolithic server's (by status or tokens, by logprobs to the bit), and
on the trained model asks GSM8K as the main job does: 200 examples, of which more than 95 % must be right, and no more once 10
are wrong. From the repository root, each some minutes on a core:

    scripts/env.sh python3 studies/sglang_cpu_faults.py --model random --out FILE
    scripts/env.sh python3 studies/sglang_cpu_faults.py --model trained --out FILE [--faults window-lost,buffers-lost]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode
from served import served

EXAMPLES, SLICE, MOST_WRONG = 200, 16, 10  # 10 wrong of 200 are a score of 0.95, which fails


def shown(case: Any) -> dict[str, int]:
    """Of the prompts: how many there are, and how many show what is on, by status or tokens, and by logprobs, too."""
    from pdkit.checks.http import RequestFailed
    from pdkit.checks.parity.verdict import compare

    plan = case.parity_plan()
    counts = {"prompts": 0, "tokens": 0, "logprobs": 0}
    for round_ in (plan.alone[0], plan.indexed[0]):
        for probe, reference in zip(round_.probes, case.reference_alone(round_), strict=True):
            counts["prompts"] += 1
            try:
                (answer,) = case.answers(replace(round_, probes=(probe,), in_flight=1))
            except RequestFailed as failure:
                print(f"    {probe.name}: {failure}", flush=True)
                seen_by = ("tokens", "logprobs")
            else:
                found = compare(reference, answer)
                seen_by = ("tokens",) * (found.diverged is not None) + ("logprobs",) * (not found.is_none)
            for each in seen_by:
                counts[each] += 1
    return counts


def gate(case: Any) -> dict[str, Any]:
    """Right answers of how many examples, and whether the main job's gate fails: after 10 wrong ones nothing else is open."""
    from pdkit.checks.accuracy import client
    from pdkit.checks.accuracy.gsm8k import gsm8k_args, score_rows
    from pdkit.checks.http import RequestFailed
    from pdkit.core.gsm8k import read_dataset

    data = read_dataset(case.gsm8k_data_path)
    args = gsm8k_args(case.lb_url, case.model, case.gsm8k_data_path, timeout=300)
    asked = right = 0
    while asked < EXAMPLES and asked - right < MOST_WRONG:
        stop = min(asked + SLICE, EXAMPLES)
        try:
            right += score_rows(client.run, args, data, asked, stop).correct
        except RequestFailed as failure:
            return {"failed": str(failure)[:200], "sees": True}
        asked = stop
    return {"asked": asked, "right": right, "sees": asked - right >= MOST_WRONG}


def main(argv: Sequence[str]) -> ExitCode:
    """Raises NotReady where the machine lacks what the target needs."""
    from pdkit.checks.parity.exact import ExactParityArms
    from pdkit.checks.parity.plan import PlanOptions
    from pdkit.deployment.cpu import checkpoints, plan
    from pdkit.deployment.cpu.servers import SglangCpuServers
    from pdkit.deployment.monolithic import MonolithicBeside
    from pdkit.faults.real_engine.checks import TransferFaults
    from pdkit.faults.real_engine.library import LIBRARY

    names = [name for name, fault in LIBRARY.items() if not fault.harmless and "draft" not in name]
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("random", "trained"), required=True, help="weights of DeepSeek-V4")
    parser.add_argument("--faults", help="names, separated by commas (default: all but those of drafts)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file that gets the counts, beside what it holds")
    args = parser.parse_args(argv)
    faults = args.faults.split(",") if args.faults else names
    model = {"random": plan.DSV4, "trained": plan.TRAINED_DSV4}[args.model]
    config = json.loads((checkpoints.provide(model.checkpoint) / "config.json").read_text(encoding="utf-8"))

    class Pair(TransferFaults, ExactParityArms, MonolithicBeside, SglangCpuServers):
        cpu_model = model
        compress_ratios = config["compress_ratios"][: config["num_hidden_layers"]]
        parity_options = PlanOptions(longest=300, extra_lengths=(300,), indexed=1)
        transfer_timeout, fault_timeout = 60, 120
        first_drafts_prompts = 4

    with served(Pair) as servers:
        case = servers()
        for name in (None, *faults):
            case.overwrite()
            case.transfer_switch.turn(name)
            found: dict[str, Any] = {args.model: shown(case)}
            if args.model == "trained":
                found["gate"] = gate(case)
            found[args.model]["met"] = case.transfer_switch.met()
            case.transfer_switch.turn(None)
            case.until_served()
            print(f"fault of the transfer: {name or 'none'}: {found}", flush=True)
            recorded = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
            recorded.setdefault(name or "none", {}).update(found)
            args.out.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("sglang_cpu_faults.py", main, sys.argv[1:]))
