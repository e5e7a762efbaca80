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
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import requests
from pdkit.core.command import Parser, natural, run_command, seconds
from pdkit.core.errors import ExitCode
from pdkit.deployment.embedded import EmbeddedServers
from pdkit.deployment.router import RustRouterBeside, kept_alive
from served import served

PROMPT = "Question: David buys 5 eggs. How many eggs?\nAnswer:"
QUESTION = {"model": "nano", "prompt": PROMPT, "max_tokens": 1, "temperature": 0}


class Pair(RustRouterBeside, EmbeddedServers):
    server_args = ["--log-level", "warning"]
    keep_alive: int

    @classmethod
    def configure(cls):
        super().configure()
        cls.server_env = {**cls.server_env, **kept_alive(cls.keep_alive)}


def answered(url, timeout):
    """Whether one request is answered in time."""
    with contextlib.suppress(requests.RequestException):
        return requests.post(f"{url}/v1/completions", json=QUESTION, timeout=timeout).ok
    return False


def open_connections(prefill_url):
    """How many connections to prefill are open."""
    port = int(prefill_url.rpartition(":")[2])
    remote = [each.raddr.port for each in psutil.net_connections("tcp") if each.raddr and each.status == "ESTABLISHED"]
    return remote.count(port)


def watch(prefill_url, duration):
    """Says when idle connections are closed."""
    began, before = time.monotonic(), open_connections(prefill_url)
    while before and (idle := time.monotonic() - began) < duration:
        if (now := open_connections(prefill_url)) < before:
            print(f"{'':11}{before - now} of {before} connections were closed after {idle:.0f} s", flush=True)
            before = now
        time.sleep(1)


def lost_requests(keep_alive, options):
    """How many requests a pair that keeps connections for `keep_alive` seconds has lost."""
    lost, jitter = 0, random.Random(0)
    servers_that_close = type("Pair", (Pair,), {"keep_alive": keep_alive})
    with served(servers_that_close) as servers, ThreadPoolExecutor(options.clients) as pool:
        for number in range(options.rounds):
            found = list(pool.map(lambda _: answered(servers.router_url, options.timeout), range(options.clients)))
            lost += found.count(False)
            print(f"\r{keep_alive:5} s    burst {number + 1} of {options.rounds}: {lost} lost", end="", flush=True)
            time.sleep(max(0, options.pause + jitter.uniform(-0.6, 0.1)))
        print(flush=True)
        watch(servers.prefill_url, options.watch)
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
