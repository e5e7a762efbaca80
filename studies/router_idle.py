#!/usr/bin/env python3
"""What the Rust router loses when servers close connections that idle: bursts of requests, as far apart as that takes.

Result (docs/recovery.md): of 1920 requests in bursts 2 s apart, 2 were lost where servers close idle connections after 2 s,
0 where after 120 s.

    scripts/env.sh python3 studies/router_idle.py [--keep-alive 2 120]

For each --keep-alive: prefill and decode of the embedded engine, which close a connection that idles for so many
seconds, the router, and bursts with --pause between them. A request without an answer in --timeout seconds is lost:
prefill's half of it went to a connection that was just being closed, and decode waits for the KV transfer.
"""

import contextlib
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pdkit
import psutil
import requests
from guarded_server import start_all
from pdkit.core import ports
from pdkit.core.command import Parser, natural, run_command, seconds
from pdkit.core.errors import ExitCode
from pdkit.core.processes import wait_until
from pdkit.deployment.router import is_ready, kept_alive, metrics_at

NANO = Path(pdkit.__file__).parent / "assets" / "nano-dsv4"
PROMPT = "Question: David buys 5 eggs. How many eggs?\nAnswer:"
QUESTION = {"model": "nano", "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
READY_S = 120


def start(logs, stack):
    """(prefill, router), ready; `stack` ends them and decode."""
    block = ports.claim()
    stack.callback(block.release)
    one, two, three, bootstrap, metrics, *_ = block.ports
    engine = ("pdkit.engine", "--model-path", str(NANO), "--log-level", "warning")
    room = ("--disaggregation-bootstrap-port", str(bootstrap))
    commands = (
        ("prefill", one, *engine, "--disaggregation-mode", "prefill", *room),
        ("decode", two, *engine, "--disaggregation-mode", "decode", *room),
        ("router", three, "sglang_router.launch_router", "--pd-disaggregation", "--policy", "round_robin",
         "--prefill", f"http://127.0.0.1:{one}", str(bootstrap), "--decode", f"http://127.0.0.1:{two}",
         "--log-level", "warn", *metrics_at("127.0.0.1", metrics)),
    )  # fmt: skip
    prefill, _, router = start_all(logs, commands, stack)
    if not wait_until(lambda: is_ready(router.url), READY_S):
        sys.exit(f"the router found no pair in {READY_S} s")
    return prefill, router


def answered(url, timeout):
    """Whether one request is answered in time."""
    with contextlib.suppress(requests.RequestException):
        return requests.post(f"{url}/v1/completions", json=QUESTION, timeout=timeout).ok
    return False


def open_connections(prefill):
    """How many connections to prefill are open."""
    port = int(prefill.url.rpartition(":")[2])
    remote = [each.raddr.port for each in psutil.net_connections("tcp") if each.raddr and each.status == "ESTABLISHED"]
    return remote.count(port)


def watch(prefill, duration):
    """Says when idle connections are closed."""
    began, before = time.monotonic(), open_connections(prefill)
    while before and (idle := time.monotonic() - began) < duration:
        if (now := open_connections(prefill)) < before:
            print(f"{'':11}{before - now} of {before} connections were closed after {idle:.0f} s", flush=True)
            before = now
        time.sleep(1)


def lost_requests(keep_alive, options):
    """How many requests a pair that keeps connections for `keep_alive` seconds has lost."""
    lost, jitter = 0, random.Random(0)
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="router_idle_")))
        os.environ.update(kept_alive(keep_alive))
        prefill, router = start(logs, stack)
        pool = stack.enter_context(ThreadPoolExecutor(options.clients))
        for number in range(options.rounds):
            found = list(pool.map(lambda _: answered(router.url, options.timeout), range(options.clients)))
            lost += found.count(False)
            print(f"\r{keep_alive:5} s    burst {number + 1} of {options.rounds}: {lost} lost", end="", flush=True)
            time.sleep(max(0, options.pause + jitter.uniform(-0.6, 0.1)))
        print(flush=True)
        watch(prefill, options.watch)
    return lost


def main(argv):
    parser = Parser(prog="router_idle.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--keep-alive", type=natural, nargs="+", default=[2, 120], metavar="S", help="seconds (default: 2 120)")
    add("--pause", type=seconds, default=2, metavar="S", help="seconds between bursts (default: %(default)s)")
    add("--rounds", type=natural, default=40, metavar="N", help="bursts (default: %(default)s)")
    add("--clients", type=natural, default=48, metavar="N", help="requests in a burst (default: %(default)s)")
    add("--timeout", type=seconds, default=12, metavar="S", help="seconds (default: %(default)s)")
    add("--watch", type=seconds, default=0, metavar="S", help="then look for so long when idle connections are closed")
    options = parser.parse_args(argv)
    lost = {each: lost_requests(each, options) for each in options.keep_alive}
    print(f"\nrequests without an answer, of {options.rounds * options.clients}, bursts {options.pause:g} s apart")
    for keep_alive, count in lost.items():
        print(f"  servers close idle connections after {keep_alive:4} s: {count}")
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("router_idle.py", main, sys.argv[1:]))
