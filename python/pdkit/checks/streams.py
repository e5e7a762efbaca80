"""Streams: hundreds of short ones, each equal to its whole answer, so that a rate of bad ones is bounded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import requests

from pdkit.checks.base import Checks
from pdkit.checks.http import RequestFailed, events_of, post_or_fail
from pdkit.checks.judgement import Judgement

PATH = "/v1/completions"
CONFIDENCE = 0.95
COUNTS = "prompt_tokens", "completion_tokens", "total_tokens"
NO_USAGE = "it has no usage"


def rate_bound(count: int) -> float:
    """The largest rate of bad ones that `count` good ones in a row leave possible at CONFIDENCE.

    1 - (1 - CONFIDENCE)^(1/count): Clopper and Pearson's bound where none is bad.
    """
    return 1 - (1 - CONFIDENCE) ** (1 / count)


@dataclass(frozen=True)
class Streams(Judgement):
    """What is wrong with each stream, None where nothing is."""

    found: tuple[str | None, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(f"stream {number}: {wrong}" for number, wrong in enumerate(self.found, 1) if wrong)

    def report(self) -> str:
        count, bad = len(self.found), len(self.problems)
        if not bad:
            return (
                f"streams: PASS, all {count} equal their whole answers; a rate of bad ones above "
                f"{rate_bound(count):.2%} is ruled out at {CONFIDENCE:.0%}"
            )
        lines = [f"streams: FAIL, {bad} of {count} do not equal their whole answers"]
        return "\n".join(lines + [f"  {each}" for each in self.problems[:8]])


def difference(whole: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> str | None:
    """The first thing in which a stream of /v1/completions differs from the whole answer; None if nothing does."""
    texts, reasons, usages = [], [], []
    for event in events:
        usages += [event["usage"]] if event.get("usage") else []
        for choice in event.get("choices", ()):
            texts.append(choice.get("text") or "")
            reasons += [choice["finish_reason"]] if choice.get("finish_reason") else []
    (wanted,) = whole["choices"]
    if (said := "".join(texts)) != wanted["text"]:
        start = max(0, len(os.path.commonprefix((said, wanted["text"]))) - 30)
        return f"its text is {said[start : start + 60]!r}, the whole answer's {wanted['text'][start : start + 60]!r}"
    if reasons != [wanted["finish_reason"]]:
        return f"finish reasons {reasons}, expected one: {wanted['finish_reason']}"
    counts = [[usage.get(name) for name in COUNTS] for usage in (*usages[-1:], whole["usage"])]
    if counts[0] != counts[-1]:
        return f"its usage is {counts[0]}, the whole answer's {counts[-1]}"
    return None if usages else NO_USAGE


def stream_difference(url: str, body: Mapping[str, Any], whole: Mapping[str, Any], timeout: float) -> str | None:
    """The same of the stream that a server sends for `body`. Raises RequestFailed, ValueError or KeyError."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with post_or_fail(url, PATH, {**body, **options}, timeout, stream=True) as answer:
        *events, end = events_of(answer)
    if end != b"[DONE]":
        return f"its last event is {end[:60]!r}"
    return difference(whole, [json.loads(event) for event in events])


class StreamChecks(Checks):
    """Put it before the servers.

    stream_count      how many; stream_tokens: of each
    stream_in_flight  how many at a time
    """

    needs: tuple[str, ...] = ("lb_url", "model")

    stream_count = 60
    stream_tokens = 6
    stream_in_flight = 4
    stream_lengths: Sequence[int] = (4, 9, 17, 40)
    stream_timeout = 120.0

    def test_short_streams_equal_whole_answers(self) -> None:
        bodies = [
            {
                "model": self.model,
                "prompt": [13 + (index * 11 + length) % 220 for index in range(length)],
                "max_tokens": self.stream_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            for length in self.stream_lengths
        ]
        whole = [post_or_fail(self.lb_url, PATH, body, self.stream_timeout).json() for body in bodies]
        self.assertTrue(any(each["choices"][0]["text"] for each in whole), "the answers have no text to compare")
        asked = list(islice(cycle(zip(bodies, whole)), self.stream_count))
        with ThreadPoolExecutor(self.stream_in_flight) as pool:
            Streams(tuple(pool.map(lambda each: self._stream(*each), asked))).assert_passed()

    def _stream(self, body: Mapping[str, Any], whole: Mapping[str, Any]) -> str | None:
        try:
            return stream_difference(self.lb_url, body, whole, self.stream_timeout)
        except (RequestFailed, requests.RequestException, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
