"""Every HTTP attempt of a client by outcome, seen below the client.

An eval client retries in silence: openai's own two retries times six trials of SGLang's samplers make 18 attempts of
one question, and a question that fails them all is scored as a wrong answer. A `Ledger` stands below the clients, in
httpx and requests, where each attempt is seen.
"""

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import httpx
import requests

from pdkit.checks.accounting.invariants import contradiction
from pdkit.checks.judgement import Judgement

OK = "200"
TIMEOUT = "timeout"
CONNECTION = "connection error"
NOT_SENT = "not sent"
ERROR_BODY = "200 with an error body"
NO_ANSWER = "200 without an answer"
ABORTED = "200 aborted"
CONTRADICTS = "200 that contradicts itself"

GENERATION_PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")
ERROR_TEXT_LIMIT = 300


def sequences_of(path: str, body: bytes | str | None) -> int:
    """How many sequences a request asks for: prompts times samples each; 0 for one that generates nothing."""
    if path not in GENERATION_PATHS:
        return 0
    try:
        given = json.loads(body or b"")
    except ValueError:
        return 1
    if not isinstance(given, dict):
        return 1
    prompts = next((given[name] for name in ("text", "input_ids", "prompt") if given.get(name) is not None), None)
    is_batch = isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)
    params: Any = given.get("sampling_params") or {}
    params = params[0] if isinstance(params, list) and params else params
    samples: int = (params.get("n") if path == "/generate" else given.get("n")) or 1
    return (len(prompts) if isinstance(prompts, list) and is_batch else 1) * samples


def judge(path: str, status: int, content: bytes | None, sent: bytes | str | None = None) -> tuple[str, str | None]:
    """(outcome, error text or None) of an answer; `content` is None where a stream was left unread.

    sent: the body of the request, for what must hold between the two
    """
    text = None if content is None else " ".join(content.decode("utf-8", "replace").split())[:ERROR_TEXT_LIMIT]
    if status != 200:
        return str(status), text or f"status {status}"
    if path not in GENERATION_PATHS or content is None or content.startswith(b"data:"):
        return OK, None
    try:
        answer = json.loads(content)
    except ValueError:
        return NO_ANSWER, f"not JSON: {text}"
    for each in answer if isinstance(answer, list) else [answer]:
        if not isinstance(each, dict):
            return NO_ANSWER, text
        if each.get("error") or each.get("object") == "error":
            return ERROR_BODY, text
        if not (each.get("meta_info") if path == "/generate" else each.get("choices")):
            return NO_ANSWER, text
        if ((each.get("meta_info") or {}).get("finish_reason") or {}).get("type") == "abort":
            return ABORTED, text
    try:
        wrong = contradiction(path, json.loads(sent) if sent else None, answer)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        wrong = f"not an answer of {path} ({error!r})"
    return (CONTRADICTS, f"{wrong}: {text}") if wrong else (OK, None)


@dataclass(frozen=True)
class HttpAttempt:
    """One HTTP request as it was sent once. `key` is the same for attempts of the same request, `seconds` its time."""

    path: str
    outcome: str
    error: str | None
    sequences: int
    seconds: float
    key: int

    @property
    def failed(self) -> bool:
        return self.outcome != OK


@dataclass(frozen=True)
class ClientAccount(Judgement):
    """Attempts in the order they ended. A problem: more than `tolerated_rate` of them failed, or there are none."""

    attempts: tuple[HttpAttempt, ...]
    tolerated_rate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.tolerated_rate < 1:
            raise ValueError(f"the tolerated failure rate is a share from 0 to below 1, got {self.tolerated_rate}")

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(attempt.outcome for attempt in self.attempts)

    @property
    def failures(self) -> tuple[HttpAttempt, ...]:
        return tuple(attempt for attempt in self.attempts if attempt.failed)

    @property
    def failure_rate(self) -> float:
        return len(self.failures) / len(self.attempts) if self.attempts else 0.0

    @property
    def hidden(self) -> int:
        """Requests that failed and were answered at a later attempt: no client reports them."""
        return sum(not ended.failed for ended in self._last_of_failed())

    @property
    def lost(self) -> int:
        """Requests that were never answered: an eval scores them as wrong."""
        return sum(ended.failed for ended in self._last_of_failed())

    def _last_of_failed(self) -> list[HttpAttempt]:
        by_key = defaultdict(list)
        for attempt in self.attempts:
            by_key[attempt.key].append(attempt)
        return [same[-1] for same in by_key.values() if any(attempt.failed for attempt in same)]

    @property
    def sequences(self) -> tuple[int, int]:
        """(answered, sent): sequences that answers came for, and all that were asked for."""
        sent = [attempt for attempt in self.attempts if attempt.outcome != NOT_SENT]
        answered = sum(attempt.sequences for attempt in sent if not attempt.failed)
        return answered, sum(attempt.sequences for attempt in sent)

    @property
    def problems(self) -> tuple[str, ...]:
        if not self.attempts:
            return (
                "no request was seen: is the client one of httpx or requests, and the address the load balancer's?",
            )
        wrong = [attempt for attempt in self.attempts if attempt.outcome == CONTRADICTS]
        if wrong:
            what = (wrong[0].error or "").partition(": ")[0]
            return (f"{len(wrong)} of {len(self.attempts)} answers contradict themselves, the first: {what}",)
        if self.failure_rate <= self.tolerated_rate:
            return ()
        return (
            f"{len(self.failures)} of {len(self.attempts)} attempts failed ({self.failure_rate:.1%}, "
            f"tolerated {self.tolerated_rate:.1%})",
        )

    def report(self) -> str:
        counts = ", ".join(f"{count} x {outcome}" for outcome, count in self.outcomes.most_common())
        lines = [f"client: {'FAIL' if self.problems else 'PASS'}, {len(self.attempts)} attempts: {counts or 'none'}"]
        lines += [f"  {problem}" for problem in self.problems]
        if self.failures:
            slowest = max(attempt.seconds for attempt in self.failures)
            lines.append(
                f"  {self.hidden} requests failed and were answered at a later attempt, {self.lost} were never "
                f"answered; the slowest failure took {slowest:.1f} s"
            )
            lines.append(f"  first error: {self.failures[0].path}: {self.failures[0].error}")
        return "\n".join(lines)


@dataclass
class Ledger:
    """Records each attempt that a client of this process sends to one of `urls`, while it is open.

    attempt_timeout  seconds after which an attempt that would wait longer is a failure; None leaves it to the client
    give_up_after    failures after which nothing is sent any more: each further request is answered here with 400,
                     which evals do not retry. A dead server costs seconds then, not the 126 s of its client's backoff.

    progressed       called after each attempt that ended

    A streamed answer is recorded when its headers arrive.
    """

    urls: Sequence[str]
    attempt_timeout: float | None = None
    give_up_after: int = 20
    attempts: list[HttpAttempt] = field(default_factory=list)
    progressed: Callable[[], None] = field(default=lambda: None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def account(self, tolerated_rate: float = 0.0) -> ClientAccount:
        with self._lock:
            return ClientAccount(tuple(self.attempts), tolerated_rate)

    @contextmanager
    def open(self) -> Iterator["Ledger"]:
        """Within it, attempts are recorded. One ledger at a time can be open in a process."""
        with (
            mock.patch.object(httpx.Client, "send", self._wrap_httpx(httpx.Client.send)),
            mock.patch.object(requests.Session, "send", self._wrap_requests(requests.Session.send)),
        ):
            yield self

    def _wrap_httpx(self, original: Callable[..., httpx.Response]) -> Callable[..., httpx.Response]:
        def send(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
            path = self._watched_path(str(request.url))
            if path is None:
                return original(client, request, **options)
            with self._attempt(path, request.content) as attempt:
                if attempt.gives_up:
                    return httpx.Response(400, request=request, json={"error": {"message": attempt.refusal}})
                if self.attempt_timeout is not None:
                    timeout = httpx.Timeout(self.attempt_timeout).as_dict()
                    request.extensions = {**request.extensions, "timeout": timeout}
                response = original(client, request, **options)
                if response.status_code != 200:
                    response.read()
                attempt.answer(response.status_code, response.content if response.is_closed else None)
                return response

        return send

    def _wrap_requests(self, original: Callable[..., requests.Response]) -> Callable[..., requests.Response]:
        def send(session: requests.Session, request: requests.PreparedRequest, **options: Any) -> requests.Response:
            path = self._watched_path(request.url or "")
            if path is None:
                return original(session, request, **options)
            with self._attempt(path, request.body) as attempt:
                if attempt.gives_up:
                    refused = requests.Response()
                    refused.status_code, refused.request, refused.url = 400, request, request.url or ""
                    refused._content = attempt.refusal.encode()
                    return refused
                if self.attempt_timeout is not None:
                    options["timeout"] = self.attempt_timeout
                response = original(session, request, **options)
                unread = options.get("stream") and response.status_code == 200
                attempt.answer(response.status_code, None if unread else response.content)
                return response

        return send

    def _watched_path(self, url: str) -> str | None:
        """What is asked of the watched server that `url` begins with, as "/generate"; None: not a watched one."""
        bases = [watched.rstrip("/") for watched in self.urls]
        return next((urlsplit(url[len(base) :]).path for base in bases if url.startswith(f"{base}/")), None)

    @contextmanager
    def _attempt(self, path: str, body: object) -> Iterator["_Pending"]:
        with self._lock:
            gives_up = sum(attempt.failed for attempt in self.attempts) >= self.give_up_after
        known = body if isinstance(body, (bytes, str)) else None
        pending = _Pending(path, known, gives_up, self.give_up_after)
        started = time.monotonic()
        try:
            yield pending
        except (httpx.TimeoutException, requests.Timeout) as error:
            pending.outcome, pending.error = TIMEOUT, f"{type(error).__name__}: {error}"
            raise
        except (httpx.TransportError, requests.RequestException) as error:
            pending.outcome, pending.error = CONNECTION, f"{type(error).__name__}: {error}"
            raise
        finally:
            if pending.outcome is not None:
                seconds = time.monotonic() - started
                key = hash((path, known))
                sequences = sequences_of(path, known)
                attempt = HttpAttempt(path, pending.outcome, pending.error, sequences, seconds, key)
                with self._lock:
                    self.attempts.append(attempt)
                self.progressed()


class _Pending:
    def __init__(self, path: str, body: bytes | str | None, gives_up: bool, limit: int) -> None:
        self.path, self.body, self.gives_up = path, body, gives_up
        self.refusal = f"not sent: {limit} attempts had failed before"
        self.outcome: str | None = NOT_SENT if gives_up else None
        self.error: str | None = self.refusal if gives_up else None

    def answer(self, status: int, content: bytes | None) -> None:
        self.outcome, self.error = judge(self.path, status, content, self.body)
