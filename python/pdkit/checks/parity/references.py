"""Sends rounds of probes, and keeps what a monolithic server answered to them."""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import requests

from pdkit.checks import http
from pdkit.checks.http import RequestFailed
from pdkit.checks.parity.answers import Answer, AnswerError, Arm
from pdkit.checks.parity.plan import Probe, Round
from pdkit.checks.parity.verdict import FLOAT_ROUNDING, Differences


def ask(session: requests.Session, url: str, probe: Probe, timeout: float) -> Answer:
    """The answer of the server at `url`. Raises RequestFailed."""
    try:
        response = http.post_or_fail(url, probe.path, probe.body, timeout, session, stream=probe.streams)
        if probe.streams:
            return Answer.of_stream([json.loads(data) for data in http.events_of(response) if data != b"[DONE]"])
        if probe.path == "/generate":
            return Answer.of_generate(response.json(), probe.asks_logprobs)
        return Answer.of_completion(response.json())
    except RequestFailed as failure:
        raise RequestFailed(f"{probe.name}: {failure}") from None
    except (requests.RequestException, AnswerError, ValueError) as error:
        raise RequestFailed(f"{probe.name}: {type(error).__name__}: {error}") from None


def ask_batch(session: requests.Session, url: str, probes: Sequence[Probe], timeout: float) -> list[Answer]:
    """The answers to probes of one kind sent as one request. Raises RequestFailed."""
    bodies = [probe.request for probe in probes]
    each = ("input_ids", "sampling_params")
    body = {**bodies[0], **{name: [body[name] for body in bodies] for name in each}}
    name = f"batch of {len(probes)} from {probes[0].name}"
    try:
        answers = [Answer.of_generate(one) for one in http.generate(url, body, timeout, session)]
    except RequestFailed as failure:
        raise RequestFailed(f"{name}: {failure}") from None
    except AnswerError as error:
        raise RequestFailed(f"{name}: {type(error).__name__}: {error}") from None
    if len(answers) != len(probes):
        raise RequestFailed(f"{name}: {len(answers)} answers")
    return answers


def collect(url: str, round_: Round, timeout: float) -> Arm:
    """The answers to a round. No further request is sent once one failed. Raises RequestFailed."""
    failed = threading.Event()

    def ask_unless_failed(probe: Probe) -> Answer | RequestFailed | None:
        if failed.is_set():
            return None
        try:
            return ask(session, url, probe, timeout)
        except RequestFailed as failure:
            failed.set()
            return failure

    with http.session_of(round_.in_flight) as session:
        if round_.batch:
            return ask_batch(session, url, round_.probes, timeout)
        with ThreadPoolExecutor(round_.in_flight) as pool:
            answers = list(pool.map(ask_unless_failed, round_.probes))
    if failures := [answer for answer in answers if isinstance(answer, RequestFailed)]:
        sent = sum(answer is not None for answer in answers)
        raise RequestFailed(
            f"{round_.condition}: {len(failures)} of {sent} requests to {url} failed "
            f"({len(answers) - sent} were not sent), the first: {failures[0]}"
        )
    return [answer for answer in answers if isinstance(answer, Answer)]


@dataclass
class References:
    """Monolithic answers, taken once.

    bitwise   an answer depends on its request alone: one is taken for each distinct request, and rounds share them.
              Otherwise the reference is the answer to each request alone, and the control arm the round as it stands:
              a server that is asked the same twice repeats itself, but not what a pair, which batches in its own way,
              makes of requests that are served together. Both arms that are compared are under load, or neither is.
    rounding  what counts as equal for requests that are served together, if bitwise
    control_url  another monolithic server that the control arm is asked of, where its sums are rounded as the pair's
              are: one of another tensor parallelism
    """

    bitwise: bool
    timeout: float
    rounding: float = 0.0
    control_url: str | None = None
    _answers: dict[tuple[str, str], Answer] = field(default_factory=dict, repr=False)
    _arms: dict[Round, tuple[Arm, Arm | None]] = field(default_factory=dict, repr=False)

    def take(self, url: str, round_: Round) -> tuple[Arm, Arm | None]:
        """(reference, control or None) of a round; asked of the server at `url` if not known yet."""
        if self.bitwise:
            return self._known(url, replace(round_, flush=False, batch=False)), None
        if round_ not in self._arms:
            self._arms[round_] = self.take_alone(url, round_), self._arm(self.control_url or url, round_)
        return self._arms[round_]

    def answer(self, url: str, probe: Probe) -> Answer:
        """The reference answer to one probe, sent alone."""
        return self.take(url, Round(probe.name, (probe,)))[0][0]

    def measure_rounding(self, url: str, round_: Round, in_flight: int) -> Differences:
        """Does the load change bits without any transfer? Sends a round that is known from being alone all at once."""
        alone = self.take(url, round_)[0]
        together = collect(url, Round("control: monolithic, together", round_.probes, in_flight), self.timeout)
        distribution = Differences.of(alone, together)
        if distribution.equal < len(round_.probes):
            self.rounding = FLOAT_ROUNDING
        return distribution

    def take_alone(self, url: str, round_: Round) -> Arm:
        """The answers to a round, each request sent alone; asked of the server at `url` if not known yet."""
        return self._known(url, replace(round_, in_flight=1, batch=False))

    def _arm(self, url: str, round_: Round) -> Arm:
        if round_.flush:
            http.flush_caches([url], self.timeout)
        return collect(url, round_, self.timeout)

    def _known(self, url: str, round_: Round) -> Arm:
        """The answers to a round, of which only what is not known yet is asked, and kept."""
        unknown = {probe.key: probe for probe in round_.probes if probe.key not in self._answers}
        if unknown and not url:
            raise RequestFailed(f"{round_.condition}: no monolithic answers were taken and no monolithic server is up")
        if unknown:
            self._answers.update(zip(unknown, self._arm(url, replace(round_, probes=tuple(unknown.values())))))
        return [self._answers[probe.key] for probe in round_.probes]
