#!/usr/bin/env python3
"""What the Rust router loses when servers close connections that idle: bursts of requests, as far apart as that takes.

    scripts/env.sh python3 scripts/router_idle.py [--keep-alive 2 120]

For each --keep-alive, in seconds: prefill and decode of the embedded engine, which close a connection after so long, the
router, and bursts with --pause between them. A request without an answer in --timeout seconds is lost: prefill's half of
it went to a connection that was just being closed, and decode waits for the hand-over.
"""

import argparse
import contextlib
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests
from bench_engine import ASSETS, Server
from pdkit import ports
from pdkit.router_kit import kept_alive, metrics_at

QUESTION = {"prompt": "Question: David buys 5 eggs. How many eggs?\nAnswer:", "max_tokens": 1, "temperature": 0}


def start(logs, stack):
    """(prefill, router), ready; `stack` ends them and decode."""
    block = ports.claim()
    stack.callback(block.release)
    one, two, three, bootstrap, metrics, *_ = block.ports
    engine = ("pdkit.engine", "--model-path", str(ASSETS / "nano-dsv4"), "--log-level", "warning")
    room = ("--disaggregation-bootstrap-port", str(bootstrap))
    servers = []
    for name, port, *command in (
        ("prefill", one, *engine, "--disaggregation-mode", "prefill", *room),
        ("decode", two, *engine, "--disaggregation-mode", "decode", *room),
        ("router", three, "sglang_router.launch_router", "--pd-disaggregation", "--policy", "round_robin",
         "--prefill", f"http://127.0.0.1:{one}", str(bootstrap), "--decode", f"http://127.0.0.1:{two}",
         "--log-level", "warn", *metrics_at("127.0.0.1", metrics)),
    ):  # fmt: skip
        servers.append(Server(logs, name, port, *command))
        stack.callback(servers[-1].end)
    for server in servers:
        server.wait_until_ready()
    deadline = time.monotonic() + 120
    while not requests.get(f"{servers[-1].url}/readiness", timeout=10).ok:
        if time.monotonic() > deadline:
            sys.exit("the router found no pair in 120 s")
        time.sleep(0.2)
    return servers[0], servers[-1]


def answered(url, timeout):
    """Whether one request is answered in time."""
    with contextlib.suppress(requests.RequestException):
        return requests.post(f"{url}/v1/completions", json={**QUESTION, "model": "nano"}, timeout=timeout).ok
    return False


def kept(prefill):
    """How many connections to prefill are open."""
    port = int(prefill.url.rpartition(":")[2])
    return sum(each.status == "ESTABLISHED" and each.raddr and each.raddr.port == port for each in psutil.net_connections("tcp"))


def bursts(keep_alive, options):
    """Requests lost by a pair that keeps connections for `keep_alive` seconds."""
    lost, jitter = 0, random.Random(0)
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="router_idle_")))
        os.environ.update(kept_alive(keep_alive))
        prefill, router = start(logs, stack)
        pool = stack.enter_context(ThreadPoolExecutor(options.clients))
        for number in range(options.rounds):
            found = list(pool.map(lambda _: answered(router.url, options.timeout), range(options.clients)))
            lost += found.count(False)
            print(f"\r{keep_alive:5} s  burst {number + 1} of {options.rounds}: {lost} lost", end="", flush=True)
            time.sleep(options.pause + jitter.uniform(-0.6, 0.1))
        print(flush=True)
        began, before = time.monotonic(), kept(prefill)
        while options.watch and before and time.monotonic() - began < options.watch:
            if (now := kept(prefill)) < before:
                print(f"         {before - now} of {before} connections were closed after {time.monotonic() - began:.0f} s")
                before = now
            time.sleep(1)
    return lost


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--keep-alive", type=int, nargs="+", default=[2, 120], help="seconds (default: 2 120)")
    parser.add_argument("--pause", type=float, default=2, help="seconds between bursts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="bursts (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=48, help="requests in a burst (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=12, help="seconds (default: %(default)s)")
    parser.add_argument("--watch", type=float, default=0, help="seconds, in the end: when are idle connections closed")
    options = parser.parse_args()
    lost = {each: bursts(each, options) for each in options.keep_alive}
    print(f"\nrequests without an answer, of {options.rounds * options.clients}, {options.pause:g} s between bursts")
    for keep_alive, count in lost.items():
        print(f"  servers close idle connections after {keep_alive:4} s: {count}")


if __name__ == "__main__":
    main()
