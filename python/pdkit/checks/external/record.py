"""A fingerprint of a good deployment: what it answers to fixed prompts, and whether it still answers so.

Two tokens of each prompt: prefill computes the first, decode the second from the state that the KV transfer brought.
No monolithic server and no tokenizer is needed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import requests

from pdkit.checks.external import parity
from pdkit.checks.judgement import Judgement
from pdkit.checks.parity.answers import Answer
from pdkit.checks.parity.plan import TOP_LOGPROBS, Probe
from pdkit.checks.parity.references import ask
from pdkit.checks.parity.verdict import GROSS_FACTOR, GROSS_FLOOR, compare
from pdkit.core.errors import NotReady
from pdkit.core.quantile import quantile
from pdkit.core.split_test import median_interval, split_test

FORMAT = 1
PROMPTS, LONGEST = 40, 900  # characters of the longest
RECORDED, ASKED = 3, 2  # answers to each prompt, after one that only fills the prefix caches
LEVEL = 1e-3  # P("drifted" or "broken") of a deployment whose answers are exchangeable with those of the record
NOWHERE = -1e3  # in place of a logprob that is not a number
DIGITS = 9  # a router that writes an answer's numbers anew may change what is behind them
PLACES = ("prefill's token", "the token after the KV transfer")

Answers = tuple[tuple[Answer, ...], ...]  # by prompt, then by turn


def prompts() -> tuple[str, ...]:
    """The fixed prompts: pieces of running text, from a few characters to LONGEST, lengths in geometric progression."""
    text = parity.SUMS
    lengths = np.geomspace(8, LONGEST, PROMPTS).astype(int)
    starts = (97 * index % (len(text) - LONGEST) for index in range(PROMPTS))
    return tuple(text[start : start + length] for start, length in zip(starts, lengths, strict=True))


def probes(texts: Sequence[str]) -> tuple[Probe, ...]:
    """One request for each text: two tokens with their alternatives."""
    sampling = {"temperature": 0, "max_new_tokens": len(PLACES), "ignore_eos": True}
    return tuple(
        Probe(f"prompt {index + 1}", json.dumps({"text": text, "sampling_params": sampling, "return_logprob": True,
                                                 "top_logprobs_num": TOP_LOGPROBS}))
        for index, text in enumerate(texts)
    )  # fmt: skip


def take(url: str, texts: Sequence[str], turns: int, timeout: float) -> Answers:
    """Answers to each text, one request at a time: a first turn that is not kept, then `turns`. Raises RequestFailed."""
    asked = probes(texts)
    with requests.Session() as session:
        taken = [[ask(session, url, probe, timeout) for probe in asked] for _ in range(turns + 1)]
    return tuple(zip(*taken[1:], strict=True))


@dataclass(frozen=True)
class Fingerprint:
    """What a good deployment answered. `version`: of the engine, as far as it was known."""

    model: str
    version: str | None
    texts: tuple[str, ...]
    answers: Answers

    def write(self, path: Path) -> None:
        """Raises NotReady where that cannot be done."""
        data = {"format": FORMAT, "model": self.model, "version": self.version, "texts": self.texts,
                "answers": [[asdict(answer) for answer in turns] for turns in self.answers]}  # fmt: skip
        try:
            path.write_text(json.dumps(data) + "\n", encoding="utf-8")
        except OSError as error:
            raise NotReady(f"{path} cannot be written: {error.strerror}") from None

    @classmethod
    def read(cls, path: Path) -> "Fingerprint":
        """Raises NotReady with one line."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise NotReady(
                f"{path} cannot be read ({error.strerror}); with --record it is made, of a deployment known to be good"
            ) from None
        except ValueError:
            raise NotReady(f"{path} is not a record: not JSON; make it again with --record") from None
        try:
            if data["format"] != FORMAT:
                raise NotReady(f"{path} has format {data['format']}, this version reads {FORMAT}; make it again")
            answers = tuple(tuple(map(_answer, turns)) for turns in data["answers"])
            found = cls(data["model"], data["version"], tuple(data["texts"]), answers)
        except (KeyError, TypeError, AttributeError) as error:
            raise NotReady(f"{path} is not a record ({error!r}); make it again with --record") from None
        if len(answers) != len(found.texts) or not answers or any(len(turns) < 2 for turns in answers):
            raise NotReady(f"{path} is not whole: {len(found.texts)} prompts, {len(answers)} answered; make it again")
        return found


def _answer(data: Mapping[str, Any]) -> Answer:
    alternatives = tuple(tuple((float(p), int(token)) for p, token in row) for row in data["alternatives"])
    lists = {name: tuple(data[name]) for name in ("tokens", "logprobs", "prompt_logprobs")}
    return Answer(**{**data, **lists, "alternatives": alternatives})


@dataclass(frozen=True)
class Tracking(Judgement):
    """A record, and what is answered to its prompts now.

    Two exact permutation tests, of prefill's token and of the token after the KV transfer, each at LEVEL / 2: within a
    prompt each answer may as well have been given in another turn (`pdkit.core.split_test`). Besides, an answer is
    broken that is off by more than GROSS_FLOOR nats and GROSS_FACTOR times what the record's own answers differ by, or
    counts other prompt tokens.
    """

    record: Fingerprint
    now: Answers

    @cached_property
    def noise(self) -> float:
        """The largest difference of logprob between two recorded answers to one prompt."""
        return max(compare(turns[0], other).largest for turns in self.record.answers for other in turns[1:])

    @cached_property
    def broken(self) -> tuple[str, ...]:
        """What is wrong beyond doubt, one text each."""
        found, limit = [], max(GROSS_FLOOR, GROSS_FACTOR * self.noise)
        for number, (before, after) in enumerate(zip(self.record.answers, self.now, strict=True), start=1):
            nearest = [min((compare(known, answer) for known in before), key=lambda each: each.largest)
                       for answer in after]  # fmt: skip
            if any("prompt_tokens" in each.other for each in nearest):
                counts = before[0].prompt_tokens, after[0].prompt_tokens
                found.append(
                    f"prompt {number} had {counts[0]} tokens and has {counts[1]}: another tokenizer or template"
                )
            elif (largest := max(each.largest for each in nearest)) > limit:
                found.append(f"prompt {number}: a logprob is off by {largest:.3g}, more than {limit:.3g}")
        return tuple(found)

    @cached_property
    def p_values(self) -> tuple[float, ...]:
        """Of each of PLACES."""
        return tuple(split_test(self._strata(place)) for place in range(len(PLACES)))

    @property
    def drifted(self) -> tuple[str, ...]:
        """The places that moved, and how far, one text each."""
        found = []
        for place, (name, p_value) in enumerate(zip(PLACES, self.p_values, strict=True)):
            if p_value <= LEVEL / len(PLACES):
                low, high = median_interval(self.shifts(place))
                found.append(
                    f"{name}: logprobs by {quantile(self.shifts(place), 0.5):.2g} in the median ({low:.2g} to {high:.2g} "
                    f"with 95 %), p = {p_value:.1g}"
                )
        return tuple(found)

    @property
    def problems(self) -> tuple[str, ...]:
        return self.broken + self.drifted

    def shifts(self, place: int) -> tuple[float, ...]:
        """By prompt: by how much the mean logprobs of its tokens moved, the median of them."""
        means = ((before.mean(axis=0), after.mean(axis=0)) for before, after in self._strata(place))
        return tuple(float(np.median(np.abs(now - then))) for then, now in means if now.size)

    def _strata(self, place: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(recorded, now): logprobs at `place`, a row for each answer and a column for each token that all of them name.

        Where not all answers of a prompt have the same tokens before `place`, they are not of the same thing.
        """
        found = []
        for before, after in zip(self.record.answers, self.now, strict=True):
            answers = (*before, *after)
            if len({answer.tokens[:place] for answer in answers}) > 1 or any(
                len(answer.alternatives) <= place for answer in answers
            ):
                continue
            tables = [{token: logprob for logprob, token in answer.alternatives[place]} for answer in answers]
            common = sorted(set.intersection(*map(set, tables)))
            rows = np.array([[table[token] for token in common] for table in tables], dtype=float)
            rows = np.nan_to_num(rows.reshape(len(answers), len(common)), nan=NOWHERE, neginf=NOWHERE).round(DIGITS)
            found.append((rows[: len(before)], rows[len(before) :]))
        return found

    def report(self) -> str:
        state = "broken" if self.broken else "drifted" if self.drifted else "same"
        rule = f"the record's own noise is up to {self.noise:.2g}; a sound deployment is called otherwise in 1 of 1000 checks"
        return "\n".join((f"{state}: {len(self.now)} prompts; {rule}", *self.problems))


def record_of(url: str, model: str, version: str | None, timeout: float) -> Fingerprint:
    """Asks a deployment that is known to be good. Raises RequestFailed."""
    texts = prompts()
    return Fingerprint(model, version, texts, take(url, texts, RECORDED, timeout))


def track(url: str, record: Fingerprint, timeout: float) -> Tracking:
    """Asks the same again. Raises RequestFailed."""
    return Tracking(record, take(url, record.texts, ASKED, timeout))
