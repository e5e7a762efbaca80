#!/usr/bin/env python3
"""What a target without a GPU costs: start, output tokens/s at 1 and at 16 requests, memory, KV transfer by length.

Results: of `sglang-cpu` in docs/sglang-cpu.md. `embedded` on 2 cores (load 8 before it, 2026-11-27): up in 38 s, 23 s of CPU;
70 output tokens/s one at a time and 312 at 16, monolithic 78 and 352; 0.5 GiB each process; the state of 1024 tokens, 121,376
bytes, in 5 ms.

    scripts/env.sh python3 studies/target_costs.py embedded|sglang-cpu
        [--model dsv4|dsv4-trained|llama] [--backend mooncake_tcp|nixl] [--spawned]

Starts prefill, decode, monolithic server and load balancer, sends requests to the pair and to the monolithic server, prints a
table and ends them. Seconds and tokens/s by the clock are those of the machine with all that it does beside; tokens for each
second of CPU time are what they would be on an idle core, at most. The embedded engine counts its KV transfers, as prefill
sees them: from ready, packing included, to acknowledged.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import psutil
import requests
from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode
from served import TARGETS, served, three

TOKENS, PROMPT, REQUESTS = 40, 128, 16
LENGTHS, REPEATS = (1, 32, 128, 512, 1024, 2048, 4000), 5


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


def rates(servers: Any, url: str, sides: Sequence[str], load: int) -> str:
    """Output tokens/s of `REQUESTS` requests to `url`, `load` at a time (of 4 where it is 1); CPU time of the last side's."""
    from pdkit.checks.parity.plan import Round, generate_probe
    from pdkit.checks.parity.references import collect

    probes = tuple(
        generate_probe(f"load-{seed}", [5 + seed * index % 499 for index in range(PROMPT)], TOKENS)
        for seed in range(3, 3 + REQUESTS)
    )
    some = probes[:4] if load == 1 else probes
    trees = {side: tree(getattr(servers, f"process_{side}").pid) for side in sides}
    before, began = {side: cpu_seconds(each) for side, each in trees.items()}, time.monotonic()
    answers = collect(url, Round(f"{load} at a time", some, load), 600)
    seconds = time.monotonic() - began
    tokens = sum(len(answer.tokens) for answer in answers)
    used = {side: cpu_seconds(each) - before[side] for side, each in trees.items()}
    each_cpu = f"{tokens / used[sides[-1]]:.0f} a CPU second of {sides[-1]}"
    return ", ".join(
        (f"{tokens / seconds:.0f} by the clock", each_cpu, *(f"{s} {used[s]:.1f} CPU s" for s in sides[:-1]))
    )


def one_token(url: str, ids: list[int]) -> float:
    """Seconds to the answer to a prompt, of one token."""
    body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}}
    began = time.perf_counter()
    requests.post(f"{url}/generate", json=body, timeout=300).raise_for_status()
    return time.perf_counter() - began


def kv_transfers(servers: Any) -> Iterator[tuple[str, str]]:
    """Medians by prompt length."""
    rng = random.Random(0)

    def transfer() -> tuple[int, float]:
        found = requests.get(f"{servers.prefill_url}/server_info", timeout=30).json()["transfer"]
        return found["bytes"], found["seconds"]

    for length in LENGTHS:
        rows = []
        for _ in range(REPEATS):
            ids = [rng.randrange(10, 500) for _ in range(length)]
            alone = one_token(servers.monolithic_url, ids)
            before = transfer()
            through = one_token(servers.lb_url, ids)
            rows.append([*(after - since for after, since in zip(transfer(), before, strict=True)), alone, through])
        size, *seconds = map(median, zip(*rows, strict=True))
        moved, alone, through = (f"{each * 1e3:.1f} ms" for each in seconds)
        yield f"{length} tokens", f"{size:,.0f} bytes in {moved}; one token: {alone} monolithic, {through} by the pair"


def rows_of(servers: Any, started: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    yield "up: seconds by the clock, and of CPU", f"{started['seconds']:.1f}, {started['cpu']:.1f}"
    for load in (1, 16):
        pair = rates(servers, servers.lb_url, ("prefill", "decode"), load)
        yield f"output tokens/s, {load} at a time", pair
        yield f"output tokens/s, {load}, monolithic", rates(servers, servers.monolithic_url, ("monolithic",), load)
    every = everything_started()
    known: set[int] = set()
    for name in ("prefill", "decode", "monolithic", "lb"):
        mine = tree(getattr(servers, f"process_{name}").pid)
        known |= {each.pid for each in mine}
        yield f"memory (PSS), {name}", f"{pss(mine):.2f} GiB in {len(mine)} processes"
    rest = [each for each in every if each.pid not in known]
    yield "memory (PSS), fork server and the rest", f"{pss(rest):.2f} GiB in {len(rest)} processes"
    if servers.target == "embedded":
        yield from kv_transfers(servers)


def main(argv: Sequence[str]) -> ExitCode:
    """Raises NotReady where the machine lacks what the target needs."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("target", choices=TARGETS)
    add("--model", choices=("dsv4", "dsv4-trained", "llama"), default="dsv4", help="on sglang-cpu (%(default)s)")
    add("--backend", choices=("mooncake_tcp", "nixl"), default="mooncake_tcp", help="on sglang-cpu (%(default)s)")
    add("--spawned", action="store_true", help="servers start as in production, none is forked")
    args = parser.parse_args(argv)
    cls = three(args.target, args.model, backend=args.backend, forked=not args.spawned)
    load, began = os.getloadavg()[0], time.monotonic()
    print(f"load average before: {load:.1f} on {os.cpu_count()} cores", flush=True)
    with served(cls) as servers:
        started = {"seconds": time.monotonic() - began, "cpu": cpu_seconds(everything_started())}
        for name, value in rows_of(servers, started):
            print(f"{name:<40}{value}", flush=True)
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("target_costs.py", main, sys.argv[1:]))
