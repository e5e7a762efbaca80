#!/usr/bin/env python3
"""What the target `embedded` costs: output tokens/s of prefill/decode against monolithic, memory, transfer by length.

Result: of the main job alone, 568 output tokens/s on 2 shared cores (2026-11-25); a whole table has not been kept.

    scripts/env.sh python3 studies/bench_engine.py

starts a monolithic engine and the prefill/decode pair (two engines and the load balancer), drives each with SGLang's own
run_eval (GSM8K completions, 5-shot, 200 examples, 128 threads) and then with single prompts, and ends all of them.
Throughputs are to be compared within one run: machines are noisy.
"""

import argparse
import contextlib
import io
import os
import random
import signal
import statistics
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import requests
from pdkit.core.paths import ASSETS
from pdkit.deployment.embedded import RANDOM_WEIGHTS, EmbeddedServers
from pdkit.deployment.monolithic import MonolithicBeside
from served import served

GOAL_TOKENS_PER_S, GOAL_GIB = 250, 6
LENGTHS = (1, 32, 128, 512, 1024, 2048, 4000)


def peak_bytes(pid):
    """Peak resident memory of a process; pages shared with others count in each."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def evaluate(url, examples, threads):
    """run_eval's metrics: score, latency in seconds, output_throughput in tokens/s."""
    from sglang.test.run_eval import run_eval

    args = SimpleNamespace(
        base_url=url, model=None, eval_name="gsm8k", api="completion", max_tokens=512, num_examples=examples,
        num_threads=threads, gsm8k_data_path=str(ASSETS / "gsm8k_nano.jsonl"),
    )  # fmt: skip
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return run_eval(args)


def one_token(url, ids):
    """Seconds to the answer to a prompt, of one token."""
    body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}}
    begin = time.perf_counter()
    requests.post(url + "/generate", json=body, timeout=300).raise_for_status()
    return time.perf_counter() - begin


def kv_transfers(servers, lengths, repeats):
    """(tokens, bytes of the state, seconds of its KV transfer, seconds to one token monolithic and through the pair).

    By prompt length; medians. The KV transfer is what prefill sees: from ready, packing included, to acknowledged.
    """
    rng = random.Random(0)

    def transfer():
        found = requests.get(servers.prefill_url + "/server_info", timeout=30).json()["transfer"]
        return found["bytes"], found["seconds"]

    for length in lengths:
        rows = []
        for _ in range(repeats):
            ids = [rng.randrange(10, 500) for _ in range(length)]
            alone = one_token(servers.monolithic_url, ids)
            before = transfer()
            through = one_token(servers.lb_url, ids)
            rows.append([*(after - since for after, since in zip(transfer(), before)), alone, through])
        yield length, *map(statistics.median, zip(*rows))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2, help="evals of each kind, in turns (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="prompts of each length (default: %(default)s)")
    parser.add_argument("--model-path", type=Path, default=ASSETS / "nano-dsv4")
    parser.add_argument("--log-dir", type=Path, help="keep the servers' logs there")
    args = parser.parse_args(argv)
    if not (args.model_path / "config.json").is_file():
        parser.error(f"no model at {args.model_path}")
    return args


def main(argv=None):
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    weights = [] if (args.model_path / "model.safetensors").is_file() else RANDOM_WEIGHTS

    class Pair(MonolithicBeside, EmbeddedServers):
        model_name = str(args.model_path)
        server_args = ["--log-level", "warning", *weights]

    begin = time.monotonic()
    print("starting a monolithic engine, prefill, decode and the load balancer ...", flush=True)
    with served(Pair, args.log_dir) as servers:
        print(f"ready after {time.monotonic() - begin:.0f} s\n", flush=True)
        urls = {"monolithic": servers.monolithic_url, "prefill/decode": servers.lb_url}
        found = {name: [] for name in urls}
        for number in range(args.rounds):
            for name, url in urls.items():
                for cached in (servers.monolithic_url, servers.prefill_url):
                    requests.post(cached + "/flush_cache?timeout=30", timeout=60).raise_for_status()
                metrics = evaluate(url, args.examples, args.threads)
                found[name].append(metrics["output_throughput"])
                print(
                    f"round {number + 1}  {name:<14}  {metrics['output_throughput']:7.1f} output tokens/s  "
                    f"{metrics['latency']:6.1f} s  score {metrics['score']:.3f}", flush=True,
                )  # fmt: skip
        alone, handed = (statistics.median(values) for values in found.values())
        print(
            f"\n{args.examples} examples, {args.threads} threads: {handed:.0f} output tokens/s prefill/decode, "
            f"{alone:.0f} monolithic, ratio {handed / alone:.2f} (goal: at least {GOAL_TOKENS_PER_S} tokens/s)\n"
        )

        print("prompt tokens  state bytes  KV transfer    one token: monolithic  through the pair", flush=True)
        for length, size, seconds, alone, through in kv_transfers(servers, LENGTHS, args.repeats):
            print(
                f"{length:13}  {size:11,.0f}  {seconds * 1e3:6.1f} ms  {alone * 1e3:18.1f} ms  "
                f"{through * 1e3:13.1f} ms", flush=True,
            )  # fmt: skip

        print("\npeak memory (resident; pages that processes share count in each)")
        names = ("monolithic", "prefill", "decode", "lb")
        peaks = {name: peak_bytes(getattr(servers, f"process_{name}").pid) for name in names}
        peaks["eval client"] = peak_bytes(os.getpid())
        for name, peak in peaks.items():
            print(f"{name:<14}  {peak / 2**30:5.2f} GiB")
        pair = sum(peaks.values()) - peaks["monolithic"]
        print(f"{'whole pair':<14}  {pair / 2**30:5.2f} GiB without the monolithic engine (goal: under {GOAL_GIB} GiB)")


if __name__ == "__main__":
    main()
