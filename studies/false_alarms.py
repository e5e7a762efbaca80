#!/usr/bin/env python3
"""How often the checks that need few requests fail a sound pair: simulations of a recorded clean run.

Results: docs/decisions/requests-needed.md.

Starts a sound pair and a monolithic server, records what the checks ask for, and judges 200 runs drawn from the record:

  paired gate          examples, drawn with replacement
  wrong answers        in an order in which 3.5 % are wrong by chance, in that of the 200 requests of the main job
  teacher-forced       continuations of both arms, drawn with replacement
  baseline record      of each prompt's answers, given while others are served, three as the record's and two as today's
  parity with control  requests drawn with replacement, in any order: tests of all, and by order and load
  near ties            each prompt's answer, given alone, drawn from its repetitions, must be the monolithic one's to the bit

Beside the false alarms stands how many of 50 such runs fail with something planted, since a check that never fails proves
nothing. From the repository root, some minutes on a core:

    scripts/env.sh python3 studies/false_alarms.py --target embedded
    scripts/env.sh python3 studies/false_alarms.py --target sglang-cpu
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from flip_rate import outcomes, served
from pdkit.checks.accuracy.paired import PairedGate, PairedOptions
from pdkit.checks.external import record
from pdkit.checks.order import by_number
from pdkit.checks.parity.answers import Answer, Arm
from pdkit.checks.parity.forced import Differences, Forced, ForcedParityChecks, differences
from pdkit.checks.parity.plan import Probe, Round, generate_probe
from pdkit.checks.parity.references import References, collect
from pdkit.checks.parity.verdict import Parity
from pdkit.core.command import Parser, run_command
from pdkit.core.console import columns
from pdkit.core.errors import ExitCode
from served import TARGETS

RUNS, PLANTED, TIMEOUT = 200, 50, 300
QUESTIONS, FORCED_TOKENS, TURNS, LOADS = 200, 64, 8, (4, 16)
AVAILABLE = 1314  # examples of GSM8K that are scored
LENGTHS = (1, 3, 5, 33, 64, 96, 127, 129, 142, 200, 255, 257, 301, 391)
POOL, REPETITIONS = 4, 20  # near ties are chosen among so many prompts of each length, and asked so often
SHARE_WRONG = 0.035


@dataclass(frozen=True)
class CleanRun:
    """What a sound pair and a monolithic server answered.

    right      of each question: whether the monolithic server, and the pair, were right
    forced     own logprob less prefill's, by the pair and by the monolithic server
    turns      answers of the pair to each prompt of the baseline record, while others were served
    compared   requests served together, by the pair and as control, with the monolithic server's answers to each alone
    ties       the monolithic server's answer to each near tie, and the pair's, REPETITIONS of them
    """

    right: tuple[tuple[bool, ...], tuple[bool, ...]]
    forced: tuple[Differences, Differences]
    turns: tuple[tuple[Answer, ...], ...]
    compared: Parity
    ties: tuple[Arm, tuple[tuple[Answer, ...], ...]]


def prompt(length: int, number: int) -> list[int]:
    """Token ids that every vocabulary of ours has; others for each number."""
    return np.random.default_rng((length, number)).integers(10, 240, length).tolist()


def near_ties(monolithic: str) -> tuple[Probe, ...]:
    """One prompt of each length, longest first: where the two likeliest second tokens of the monolithic server are closest."""
    chosen = []
    for length in LENGTHS[::-1]:
        pool = tuple(generate_probe(f"{length}-{number}", prompt(length, number), 3) for number in range(POOL))
        answers = collect(monolithic, Round("near ties", pool), TIMEOUT)
        margins = [answer.alternatives[1][0][0] - answer.alternatives[1][1][0] for answer in answers]
        chosen.append(pool[int(np.argmin(margins))])
    return tuple(chosen)


def recorded(pair: str, monolithic: str, data: str) -> CleanRun:
    """Asks for all of it. Raises RequestFailed."""

    def done(what: str) -> None:
        print(f"recorded: {what}", file=sys.stderr, flush=True)

    right = tuple(outcomes(url, data, QUESTIONS, 32) for url in (monolithic, pair))
    done("questions")
    ids = ForcedParityChecks.forced_ids(SimpleNamespace(forced_length=48, forced_prompts=16))  # type: ignore[arg-type]
    forced = tuple(differences(url, monolithic, ids, FORCED_TOKENS, TIMEOUT) for url in (pair, monolithic))
    done("continuations")
    texts = record.probes(record.prompts())
    shuffled = np.random.default_rng(1).permutation(np.arange(TURNS * len(texts)) % len(texts))
    answered: list[list[Answer]] = [[] for _ in texts]
    asked = Round("baseline record", tuple(texts[index] for index in shuffled))
    for index, answer in zip(shuffled, collect(pair, replace(asked, in_flight=8), TIMEOUT), strict=True):
        answered[index].append(answer)
    done("answers to the prompts of the baseline record")
    references, parities = References(bitwise=False, timeout=TIMEOUT), []
    for load in LOADS:
        probes = tuple(generate_probe(f"{load}-{n}", prompt(20 + 7 * n, 100 + load), 8) for n in range(48))
        together = Round(f"{load} in flight", probes, load)
        reference, control = references.take(monolithic, together)
        names = tuple(probe.name for probe in probes)
        candidate = collect(pair, together, TIMEOUT)
        parities.append(Parity(together.condition, names, reference, candidate, control, loads=(load,) * len(names)))
    done("requests served together")
    ties = near_ties(monolithic)
    arms = [collect(url, Round("near ties", ties), TIMEOUT) for url in [monolithic] + [pair] * REPETITIONS]
    done("near ties")
    return CleanRun(right, forced, tuple(map(tuple, answered)), Parity.pool("together", parities),
                    (arms[0], tuple(zip(*arms[1:], strict=True))))  # type: ignore[arg-type]  # fmt: skip


def shifted(answer: Answer, by: float) -> Answer:
    """With the logprobs of all tokens but the first, which prefill computes, moved."""
    rows = tuple(
        tuple((logprob + by * (at > 0), token) for logprob, token in row) for at, row in enumerate(answer.alternatives)
    )
    logprobs = tuple(logprob + by * (at > 0) for at, logprob in enumerate(answer.logprobs))
    return replace(answer, alternatives=rows, logprobs=logprobs)


Drawn = Callable[[CleanRun, np.random.Generator, bool], Any]  # what is judged; the last: whether something is planted


def paired_gate(run: CleanRun, rng: np.random.Generator, planted: bool) -> PairedGate:
    """Planted: every tenth right answer of the pair is lost."""
    drawn = rng.integers(len(run.right[0]), size=AVAILABLE)
    baseline, candidate = (np.array(each)[drawn] for each in run.right)
    if planted:
        candidate &= rng.random(AVAILABLE) > 0.1
    gate = PairedGate(PairedOptions(), AVAILABLE)
    while count := gate.next_examples:
        part = slice(gate.examples, gate.examples + count)
        gate = gate.record(tuple(baseline[part].tolist()), tuple(candidate[part].tolist()))
    return gate


def wrong_answers(run: CleanRun, rng: np.random.Generator, planted: bool) -> Any:
    """Planted: from the 150th request on half of the answers are wrong, too."""
    wrong = ~rng.permutation(np.array(run.right[1])) | (rng.random(len(run.right[1])) < SHARE_WRONG)
    if planted:
        wrong[150:] |= rng.random(len(wrong) - 150) < 0.5
    return by_number("wrong answers", wrong.tolist())


def teacher_forced(run: CleanRun, rng: np.random.Generator, planted: bool) -> Forced:
    """Planted: each token of the pair is off by 0.05."""
    drawn = rng.integers(len(run.forced[0]), size=len(run.forced[0]))
    candidate, control = (tuple(arm[index] for index in drawn) for arm in run.forced)
    return Forced(tuple(tuple(token + 0.05 * planted for token in row) for row in candidate), control)


def baseline_record(run: CleanRun, rng: np.random.Generator, planted: bool) -> record.Tracking:
    """Planted: today's answers are off by 0.05 after the KV transfer."""
    before, now = [], []
    for answers in run.turns:
        turns = [answers[index] for index in rng.permutation(len(answers))[: record.RECORDED + record.ASKED]]
        before.append(tuple(turns[: record.RECORDED]))
        now.append(tuple(shifted(each, 0.05 * planted) for each in turns[record.RECORDED :]))
    return record.Tracking(record.Fingerprint("m", None, record.prompts(), tuple(before)), tuple(now))


def with_control(run: CleanRun, rng: np.random.Generator, planted: bool) -> Parity:
    """Planted: the later half of the pair's answers is off by 0.3."""
    whole = run.compared
    drawn = rng.integers(len(whole.names), size=len(whole.names)).tolist()
    candidate = [shifted(whole.candidate[index], 0.3 * (planted and 2 * place >= len(drawn)))
                 for place, index in enumerate(drawn)]  # fmt: skip
    assert whole.control is not None
    return Parity(whole.condition, tuple(whole.names[index] for index in drawn), [whole.reference[i] for i in drawn],
                  candidate, [whole.control[i] for i in drawn], loads=tuple(whole.loads[i] for i in drawn))  # fmt: skip


def tied(run: CleanRun, rng: np.random.Generator, planted: bool) -> Parity:
    """Planted: each answer is off by 1e-6."""
    reference, repeated = run.ties
    candidate = [shifted(answers[rng.integers(len(answers))], 1e-6 * planted) for answers in repeated]
    return Parity("near ties", tuple(map(str, LENGTHS[::-1])), reference, candidate)


DRAWN: dict[str, Drawn] = {
    "paired gate": paired_gate,
    "wrong answers by number": wrong_answers,
    "teacher-forced parity": teacher_forced,
    "baseline record: drifted or broken": baseline_record,
    "parity with control, order, load": with_control,
    "near ties, to the bit": tied,
}


def failing(drawn: Drawn, run: CleanRun, planted: bool, runs: int) -> int:
    """How many of so many runs fail; each has a seed of its own."""
    return sum(not drawn(run, np.random.default_rng(seed), planted).passed for seed in range(runs))


def main(argv: Sequence[str]) -> ExitCode:
    """Raises NotReady where the machine lacks what the target needs."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, required=True, help="start servers of this target, and ask those")
    parser.add_argument("--keep", type=Path, help="file for the record; where it is there, nothing is started")
    args = parser.parse_args(argv)
    if args.keep and args.keep.exists():
        run = pickle.loads(args.keep.read_bytes())
    else:
        with served(args.target) as urls:
            run = recorded(*urls)
        if args.keep:
            args.keep.write_bytes(pickle.dumps(run))
    rows = [["check", "false alarms", "seen where something is planted"]]
    for name, drawn in DRAWN.items():
        cells = [
            f"{failing(drawn, run, planted, runs)} of {runs}" for planted, runs in ((False, RUNS), (True, PLANTED))
        ]
        rows.append([name, *cells])
    print(columns(rows), flush=True)
    print(f"\nforced: {Forced(*run.forced).report()}\n\n{run.compared.report()}", flush=True)
    print(f"flips: {sum(ours != theirs for ours, theirs in zip(*run.right, strict=True))} of {len(run.right[0])}")
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("false_alarms.py", main, sys.argv[1:]))
