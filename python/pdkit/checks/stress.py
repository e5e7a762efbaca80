"""Hundreds of mixed short rounds to every server of a test; the round that ended one is named.

What it is for: a kernel that reads past its buffer ends a server only where the shapes of a batch and the layout of
memory meet. Of two servers with equal flags one passed 200 rounds and the other died in round 148.
"""

import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from pdkit.checks.accounting.checks import unaccounted
from pdkit.checks.base import Checks
from pdkit.checks.http import post, session_of
from pdkit.deployment.mixin import BeforePlannedServers
from pdkit.deployment.server import Server

EDGES = (1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
FILLED_ROWS = 128  # tokens of a batch whose int32 lengths fill an allocation of 512 bytes to its end
DEATH_SECONDS = 20.0
LOG_LINES = 30


@dataclass(frozen=True)
class StressRound:
    """Requests that are sent at once. number: from 1; kind: what their lengths are; bodies: of POST /generate."""

    number: int
    kind: str
    bodies: tuple[dict[str, Any], ...]


def lengths_of(rng: random.Random, most: int, longest: int) -> tuple[str, list[int]]:
    """(kind, prompt lengths in tokens) of one round of 8 to `most` requests; a full batch of rows may be fewer."""
    kind = rng.choice(("edges", "edges", "any", "any", "equal", "full", "one long"))
    count = rng.randint(min(8, most), most)
    if kind == "full":  # every batch of these that is cut in the middle has FILLED_ROWS tokens or a divisor of it
        length = rng.choice([rows for rows in (4, 8, 16, 32, 64) if FILLED_ROWS // rows <= most])
        return kind, [length] * (FILLED_ROWS // length)
    if kind == "equal":
        return kind, [rng.choice(EDGES)] * count
    if kind == "any":
        return kind, [rng.randint(1, 300) for _ in range(count)]
    lengths = [rng.choice(EDGES) for _ in range(count)]
    return kind, lengths + [longest] * (kind == "one long")


def rounds(count: int, seed: int, most: int, longest: int, vocabulary: range) -> Iterator[StressRound]:
    """`count` rounds, the same each time: mixed lengths, 1 to 8 new tokens, greedy, sampled, with and without logprobs.

    most        requests of a round
    longest     prompt length of the one long request that a round may have beside its short ones; tokens
    vocabulary  token ids that prompts are made of
    """
    rng = random.Random(seed)
    for number in range(1, count + 1):
        kind, lengths = lengths_of(rng, most, longest)
        bodies = []
        for length in lengths:
            sampling = {"temperature": rng.choice((0, 0, 1)), "max_new_tokens": rng.randint(1, 8), "ignore_eos": True}
            ids = [rng.choice(vocabulary) for _ in range(length)]
            bodies.append({"input_ids": ids, "sampling_params": sampling, "return_logprob": rng.random() < 0.2})
        yield StressRound(number, kind, tuple(bodies))


class StressChecks(Checks):
    """Put it before the class that launches the servers.

    stress_rounds    to each of the two; stress_seed: of the rounds, which a failure names
    stress_most      requests of a round; stress_longest: tokens of its one long prompt, if it has one
    stress_timeout   seconds for one request
    """

    needs: tuple[str, ...] = ("lb_url", "monolithic_url", "log_path")

    stress_rounds = 200
    stress_seed = 1
    stress_most = 32
    stress_longest = 700
    stress_timeout = 120.0
    stress_vocabulary = range(10, 250)

    @classmethod
    def take_references(cls) -> None:
        """Nothing is compared."""

    @unaccounted
    def test_short_rounds_to_the_monolithic_server(self) -> None:
        self.stress("monolithic server", self.monolithic_url, ("monolithic",))

    def test_short_rounds_to_the_pair(self) -> None:
        self.stress("prefill and decode", self.lb_url, ("prefill", "decode"))

    def stress(self, target: str, url: str, servers: tuple[str, ...]) -> None:
        """Fails with the number of the round, whom it was sent to, and the log of who died or does not answer."""
        begin, sent = time.monotonic(), 0
        planned = rounds(
            self.stress_rounds, self.stress_seed, self.stress_most, self.stress_longest, self.stress_vocabulary
        )
        with session_of(self.stress_most + 1) as session, ThreadPoolExecutor(self.stress_most + 1) as pool:
            for round_ in planned:
                try:
                    self._send(session, pool, url, round_)
                except BaseException as error:
                    where = (
                        f"round {round_.number} of {self.stress_rounds} (seed {self.stress_seed}, {round_.kind}: "
                        f"{len(round_.bodies)} requests of {self._spoken_lengths(round_)} tokens) to the {target}, {url}"
                    )
                    error.args = (f"{where}: {error}{self._logs(error, servers)}",)
                    raise
                sent += len(round_.bodies)
        seconds = time.monotonic() - begin
        print(
            f"stress, {target}: {self.stress_rounds} rounds, {sent} requests in {seconds:.0f} s, no death", flush=True
        )

    @staticmethod
    def _spoken_lengths(round_: StressRound) -> str:
        lengths = sorted({len(body["input_ids"]) for body in round_.bodies})
        return ", ".join(map(str, lengths)) if len(lengths) < 6 else f"{lengths[0]} to {lengths[-1]}"

    def _send(self, session: requests.Session, pool: ThreadPoolExecutor, url: str, round_: StressRound) -> None:
        answers = [pool.submit(post, url, "/generate", body, self.stress_timeout, session) for body in round_.bodies]
        try:
            for body, answer in zip(round_.bodies, answers):
                self._check(body, answer.result())
        except Exception as error:
            time.sleep(DEATH_SECONDS if isinstance(error, requests.RequestException) else 0)  # a death is raised in it
            raise AssertionError(f"{type(error).__name__}: {error}") from error

    @staticmethod
    def _check(body: Mapping[str, Any], answer: requests.Response) -> None:
        wanted = body["sampling_params"]["max_new_tokens"]
        assert answer.status_code == 200, f"status {answer.status_code}: {answer.text[:300]}"
        said = answer.json()["meta_info"]
        assert said["completion_tokens"] == wanted, f"{said['completion_tokens']} tokens of {wanted}: {said}"

    def _logs(self, error: BaseException, servers: Sequence[str]) -> str:
        """The end of each server's log, unless `error` is a death, which has the log of who died."""
        if not isinstance(error, Exception):
            return ""
        ends = ""
        for name in servers:
            path = Path(self.log_path(name))
            if path.is_file():
                lines = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
                ends += f"\nlast lines of {path}:\n" + "\n".join(lines)
        return ends


class CoreDumps(BeforePlannedServers):
    """Servers leave light CUDA cores where their logs are. Put it before what launches them."""

    @classmethod
    def launch(
        cls, name: str, command: Sequence[str], env: Mapping[str, str] | None = None, *more: Any, **by_name: Any
    ) -> Server:
        cores = {
            "SGLANG_CUDA_COREDUMP": "1",
            "SGLANG_CUDA_COREDUMP_DIR": os.path.join(cls.log_directory(), "cuda_cores"),
        }
        return super().launch(name, command, {**(env or {}), **cores}, *more, **by_name)
