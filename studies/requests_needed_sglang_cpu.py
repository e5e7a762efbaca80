#!/usr/bin/env python3
"""How many requests each wrong transfer of SGLang's own engine needs until it is seen, on the target `sglang-cpu`.

Result: docs/decisions/requests-needed.md.

Starts SGLang's pair and a monolithic server (DeepSeek-V4, random weights), turns on one fault after the other
(`pdkit.faults.real_engine`), and sends 12 prompts of 1 to 391 tokens, one at a time. Median and worst number of requests are
over all orders of the prompts. What was found goes to FILE, and is not asked again. From the repository root:

    scripts/env.sh python3 studies/requests_needed_sglang_cpu.py --out FILE
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdkit.core.command import Parser, run_command
from pdkit.core.console import columns
from pdkit.core.errors import ExitCode
from pdkit.faults.matrix.truth import LENGTHS
from pdkit.faults.real_engine.library import LIBRARY
from requests_needed import shown, until_first

TOKENS = 6
NOT_FOR_IT = "draft-window-lost", "first-draft-lost", "window-skipped", "window-of-the-request-before", "polls-fail"


def servers() -> Any:
    """The class that starts them; not up yet."""
    from pdkit.checks.parity.exact import ExactParityArms
    from pdkit.deployment.cpu import plan
    from pdkit.deployment.cpu.checkpoints import DSV4_FIELDS
    from pdkit.deployment.cpu.servers import SglangCpuServers
    from pdkit.deployment.monolithic import MonolithicBeside
    from pdkit.faults.real_engine.checks import TransferFaults

    class Servers(TransferFaults, ExactParityArms, MonolithicBeside, SglangCpuServers):
        cpu_model = plan.DSV4
        compress_ratios = DSV4_FIELDS["compress_ratios"][: DSV4_FIELDS["num_hidden_layers"]]
        first_drafts_prompts = 4
        transfer_timeout, fault_timeout = 30, 60

        @classmethod
        def take_references(cls) -> None:
            """None: what is asked here is asked here."""

        def runTest(self) -> None:
            """Nothing: only what the class starts is used."""

    return Servers


def asked(case: Any, name: str | None) -> dict[str, int]:
    """In how many of the prompts the fault changes status, tokens or logprobs."""
    from pdkit.checks.http import RequestFailed
    from pdkit.checks.parity.plan import Round, generate_probe
    from pdkit.checks.parity.verdict import compare

    found = {"prompts": len(LENGTHS), "status": 0, "tokens": 0, "logprobs": 0, "met": 0}
    case.overwrite()
    case.transfer_switch.turn(name)
    for length in LENGTHS:
        ids = [10 + (index * index + 7 * length) % 230 for index in range(length)]
        one = Round(f"length {length}", (generate_probe(f"length-{length}", ids, TOKENS),))
        try:
            difference = compare(case.reference_alone(one)[0], case.answers(one)[0])
        except RequestFailed:
            found["status"] += 1
            continue
        found["tokens"] += difference.diverged is not None
        found["logprobs"] += not difference.is_none
    found["met"] = case.transfer_switch.met()
    case.transfer_switch.turn(None)
    case.until_served()
    return found


def rows_of(found: dict[str, dict[str, int]]) -> list[list[str]]:
    """Of each fault: requests until seen, median / worst, by tokens and by logprobs."""
    rows = [["fault", "sglang-cpu, tokens", "sglang-cpu, logprobs"]]
    for name, counts in found.items():
        seen = counts["status"] + counts["tokens"], counts["status"] + counts["logprobs"]
        rows.append([name, *(shown(*until_first(each, counts["prompts"])) for each in seen)])
    return rows


def main(argv: Sequence[str]) -> ExitCode:
    """Raises NotReady where the machine lacks what the target needs."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="lines of JSON, one a fault")
    args = parser.parse_args(argv)
    names = ["no fault", *(name for name, fault in LIBRARY.items() if not fault.harmless and name not in NOT_FOR_IT)]
    found: dict[str, dict[str, int]] = {}
    if args.out.exists():
        found = dict(json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines())
    if set(names) - set(found):
        with tempfile.TemporaryDirectory(prefix="requests-needed-") as logs:
            os.environ.setdefault("SGLANG_PD_LOG_DIR", logs)
            from pdkit.deployment.cpu import requirements

            requirements.require_machine()
            cls = servers()
            cls.setUpClass()
            try:
                for name in names:
                    if name not in found:
                        found[name] = asked(cls(), name if name in LIBRARY else None)
                        print(name, found[name], flush=True)
                        with args.out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps([name, found[name]]) + "\n")
            finally:
                cls.tearDownClass()
                cls.doClassCleanups()
    print(columns(rows_of(found)))
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("requests_needed_sglang_cpu.py", main, sys.argv[1:]))
