"""Clients that say what became of a request: answered rightly, answered wrongly, failed with an error, left hanging."""

import json
import math
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import httpx
import openai
import requests

from pdkit.checks.http import ERROR_LIMIT, greedy, post


class Fate(Enum):
    """SERVED: the right answer. WRONG: anything else that looks like success. FAILED: an error. HUNG: no end in time."""

    SERVED = "served"
    FAILED = "failed"
    WRONG = "wrong"
    HUNG = "hung"


@dataclass(frozen=True)
class Query:
    """A greedy request of `new_tokens` tokens: streamed through OpenAI's client, or whole through /generate.

    prompt  a text, or token ids for /generate
    right   the text of the right answer; None while nobody knows it
    more    what else goes into the body: bootstrap_room, ...
    """

    prompt: str | tuple[int, ...]
    new_tokens: int
    stream: bool = False
    right: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def generate_body(self) -> dict[str, Any]:
        prompt = ("text", self.prompt) if isinstance(self.prompt, str) else ("input_ids", list(self.prompt))
        return dict([prompt]) | {"sampling_params": greedy(self.new_tokens)} | dict(self.more)


@dataclass(frozen=True)
class Outcome:
    """What became of a request. text: what the client got of an answer; seconds: from sending it to its end."""

    fate: Fate
    text: str
    error: str
    status: int | None
    seconds: float

    @property
    def is_clear(self) -> bool:
        """Whether a user can tell from it that the deployment failed, and not the request.

        A status of 5xx with words, or a connection that was refused or broke off.
        """
        return bool(self.error.strip()) and (self.status is None or 500 <= self.status < 600)


def token_ids(length: int, seed: int = 0, vocabulary: Sequence[int] = range(10, 500)) -> tuple[int, ...]:
    """`length` ids, the same each time."""
    return tuple(random.Random(f"{length} {seed}").choices(vocabulary, k=length))


def judge_answer(status: int, content: bytes, right: str | None) -> tuple[Fate, str, str]:
    """(fate, text, error) of a whole answer to /generate. right None: every answer is."""
    text = content.decode(errors="replace")
    if status != 200:
        return Fate.FAILED, "", f"{status}: {text[:ERROR_LIMIT]}" if text.strip() else ""
    try:
        answer = json.loads(text)
        reason, said = answer["meta_info"]["finish_reason"], answer["text"]
    except (ValueError, TypeError, KeyError):
        return Fate.WRONG, text, "200 with a body that is no answer"
    if reason is None or reason["type"] == "abort":
        return Fate.FAILED, said, f"aborted: {reason}"
    if right is not None and said != right:
        return Fate.WRONG, said, f"{said[:ERROR_LIMIT]!r} instead of {right[:ERROR_LIMIT]!r}"
    return Fate.SERVED, said, ""


def judge_stream(said: str, finish_reason: str | None, error: str, right: str | None) -> tuple[Fate, str]:
    """(fate, error) of a stream. Its end without a finish reason is no end; what came before an error must be right."""
    if right is not None and not right.startswith(said):
        return Fate.WRONG, f"{said[-ERROR_LIMIT:]!r} is not how {right[:ERROR_LIMIT]!r} begins"
    if error:
        return Fate.FAILED, error
    if finish_reason is None:
        return Fate.WRONG, f"the stream ended after {len(said)} characters as if that were all, without a finish reason"
    if right is not None and said != right:
        return Fate.WRONG, f"the stream ended with {finish_reason!r} after {len(said)} of {len(right)} characters"
    return Fate.SERVED, ""


class QueryThread(threading.Thread):
    """Sends `ask` to the server at `url` at once. `begun` is set at the first piece of an answer."""

    def __init__(self, url: str, ask: Query, timeout: float) -> None:
        super().__init__(daemon=True)
        self.url, self.ask, self.timeout = url, ask, timeout
        self.begun = threading.Event()
        self.outcome: Outcome | None = None
        self.ended_at = math.inf
        self._sent_at = time.monotonic()
        self.start()

    def run(self) -> None:
        try:
            fate, text, error, status = self._stream() if self.ask.stream else self._whole()
        except Exception as failure:
            fate, text, error, status = Fate.WRONG, "", f"the client does not understand: {failure!r}", None
        self.ended_at = time.monotonic()
        self.outcome = Outcome(fate, text, error, status, self.ended_at - self._sent_at)
        self.begun.set()

    def result(self) -> Outcome:
        """The Outcome. A client that outlives its own timeout, trickled at, hangs, too."""
        self.join(max(0.0, self._sent_at + 2 * self.timeout - time.monotonic()))
        return self.outcome or Outcome(Fate.HUNG, "", "still waiting", None, time.monotonic() - self._sent_at)

    def _whole(self) -> tuple[Fate, str, str, int | None]:
        try:
            answer = post(self.url, "/generate", self.ask.generate_body(), self.timeout)
        except requests.Timeout as error:
            return Fate.HUNG, "", f"no answer within {self.timeout:g} s: {error}", None
        except requests.RequestException as error:
            return Fate.FAILED, "", f"{type(error).__name__}: {error}"[:ERROR_LIMIT], None
        return *judge_answer(answer.status_code, answer.content, self.ask.right), answer.status_code

    def _stream(self) -> tuple[Fate, str, str, int | None]:
        said, reason, error, status = "", None, "", None
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=self.timeout)
        body = {"ignore_eos": True, **self.ask.more}
        try:
            with client:
                for chunk in client.completions.create(
                    model="default", prompt=self.ask.prompt, max_tokens=self.ask.new_tokens, temperature=0, stream=True,
                    extra_body=body,
                ):  # fmt: skip
                    for choice in chunk.choices:
                        said, reason = said + choice.text, choice.finish_reason or reason
                    self.begun.set()
        except (openai.APITimeoutError, httpx.TimeoutException) as failure:
            return Fate.HUNG, said, f"no word within {self.timeout:g} s: {failure!r}"[:ERROR_LIMIT], None
        except (openai.APIError, httpx.HTTPError) as failure:
            error, status = f"{type(failure).__name__}: {failure}"[:ERROR_LIMIT], getattr(failure, "status_code", None)
        fate, why = judge_stream(said, reason, error, self.ask.right)
        return fate, said, why, status
