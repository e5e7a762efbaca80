#!/usr/bin/env python3
"""What the target `sglang-cpu` costs: start, output tokens/s at 1 and at 16 requests, memory of each process.

Result: docs/sglang-cpu.md.

    scripts/env.sh python3 studies/sglang_cpu.py [--model dsv4|dsv4-trained|llama] [--backend mooncake_tcp|nixl] [--spawned]

Starts SGLang's prefill, decode, monolithic server and load balancer, sends requests to the pair, prints a table and ends them. Seconds and tokens/s by the
clock are those of the machine with all that it does beside; tokens for each second of CPU time of decode's scheduler are
what they would be on an idle core, at most.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode
from served import served

TOKENS, PROMPT, REQUESTS = 40, 128, 16


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """User and system time of `processes`; what ended in between counts as nothing."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def pss(processes: Sequence[psutil.Process]) -> float:
    """GiB; pages shared by n processes count as 1/n in each."""
    return sum(process.memory_full_info().pss for process in processes) / 2**30


def everything_started() -> list[psutil.Process]:
    """What this process and its fork servers started, which are sessions of their own."""
    return psutil.Process().children(recursive=True)


def measured(servers: Any, load: int) -> dict[str, float]:
    """Output tokens/s of `REQUESTS` requests, `load` at a time (of 4 where it is 1)."""
    from pdkit.checks.parity.plan import Round, generate_probe
    from pdkit.checks.parity.references import collect

    probes = tuple(
        generate_probe(f"load-{seed}", [5 + seed * index % 499 for index in range(PROMPT)], TOKENS)
        for seed in range(3, 3 + REQUESTS)
    )
    some = probes[:4] if load == 1 else probes
    sides = {side: tree(getattr(servers, f"process_{side}").pid) for side in ("prefill", "decode")}
    before, began = {side: cpu_seconds(each) for side, each in sides.items()}, time.monotonic()
    answers = collect(servers.lb_url, Round(f"{load} at a time", some, load), 600)
    seconds = time.monotonic() - began
    tokens = sum(len(answer.tokens) for answer in answers)
    used = {side: cpu_seconds(each) - before[side] for side, each in sides.items()}
    return {"tokens": tokens, "seconds": seconds, **used}


def rows_of(servers: Any, started: Mapping[str, float]) -> list[tuple[str, str]]:
    rows = [("up: seconds by the clock, and of CPU", f"{started['seconds']:.1f}, {started['cpu']:.1f}")]
    for load in (1, 16):
        found = measured(servers, load)
        rate = found["tokens"] / found["seconds"]
        text = f"{rate:.0f} by the clock, {found['tokens'] / found['decode']:.0f} a CPU second of decode"
        rows.append((f"output tokens/s, {load} at a time", f"{text} (prefill {found['prefill']:.1f} CPU s)"))
    every = everything_started()
    known: set[int] = set()
    for name in ("prefill", "decode", "monolithic", "lb"):
        process = getattr(servers, f"process_{name}", None)
        if process is not None:
            mine = tree(process.pid)
            known |= {each.pid for each in mine}
            rows.append((f"memory (PSS), {name}", f"{pss(mine):.2f} GiB in {len(mine)} processes"))
    rest = [each for each in every if each.pid not in known]
    rows.append(("memory (PSS), fork server and the rest", f"{pss(rest):.2f} GiB in {len(rest)} processes"))
    return rows


def main(argv: Sequence[str]) -> ExitCode:
    """Raises NotReady where the machine lacks what the target needs."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", choices=("dsv4", "dsv4-trained", "llama"), default="dsv4", help="default: %(default)s"
    )
    parser.add_argument(
        "--backend", choices=("mooncake_tcp", "nixl"), default="mooncake_tcp", help="default: %(default)s"
    )
    parser.add_argument("--spawned", action="store_true", help="servers start as in production, none is forked")
    args = parser.parse_args(argv)
    from pdkit.deployment.cpu import plan
    from pdkit.deployment.cpu.servers import SglangCpuServers
    from pdkit.deployment.monolithic import MonolithicBeside

    class Three(MonolithicBeside, SglangCpuServers):
        cpu_model = {"dsv4": plan.DSV4, "dsv4-trained": plan.TRAINED_DSV4, "llama": plan.LLAMA}[args.model]
        backend = args.backend
        forked = not args.spawned

    load, began = os.getloadavg()[0], time.monotonic()
    with served(Three) as servers:
        started = {"seconds": time.monotonic() - began, "cpu": cpu_seconds(everything_started())}
        rows = [("load average before", f"{load:.1f} on {os.cpu_count()} cores"), *rows_of(servers, started)]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}", flush=True)
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("sglang_cpu.py", main, sys.argv[1:]))
