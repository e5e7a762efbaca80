"""A mixin that puts parity with a monolithic server on a disaggregation test.

    class TestDisaggregationDSV4Parity(MonolithicFirstMixin, ParityMixin, TestDisaggregationDSV4):
        pass

It needs `lb_url`, `prefill_url`, `decode_url` and `model` of the class that launches the servers, and monolithic
answers: see `pdkit.monolithic_kit`.
"""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import requests
from requests.adapters import HTTPAdapter

from pdkit.parity import FLOAT_ROUNDING, Answer, AnswerError, Arm, Distribution, Parity
from pdkit.parity_plan import (
    Geometry,
    Plan,
    PlanOptions,
    Probe,
    Prompts,
    Round,
    Variation,
    completion_probe,
    completion_variations,
    generate_probe,
    generate_variations,
    make_plan,
)
from pdkit.sequential_eval import default_dataset_path, read_dataset
from pdkit.server_info import read_server_info

PARAMETER_TOKENS = 24
PARAMETER_PROMPT = 64


class RequestFailed(AssertionError):
    """A request got no answer to compare; the message says which, of how many, and why."""


def ask(session: requests.Session, url: str, probe: Probe, timeout: float) -> Answer:
    """The answer of the server at `url`. Raises RequestFailed."""
    try:
        response = session.post(
            f"{url}{probe.path}",
            data=probe.body,
            headers={"Content-Type": "application/json"},
            timeout=timeout,
            stream=probe.streams,
        )
        if response.status_code != 200:
            raise RequestFailed(f"{probe.name}: status {response.status_code}: {' '.join(response.text.split())[:300]}")
        if probe.streams:
            return Answer.of_stream(_events(response))
        if probe.path == "/generate":
            return Answer.of_generate(response.json(), probe.asks_logprobs)
        return Answer.of_completion(response.json())
    except (requests.RequestException, AnswerError, ValueError) as error:
        raise RequestFailed(f"{probe.name}: {type(error).__name__}: {error}") from None


def _events(response):
    lines = (line.removeprefix(b"data: ") for line in response.iter_lines() if line)
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def ask_batch(session: requests.Session, url: str, probes: Sequence[Probe], timeout: float) -> list[Answer]:
    """The answers to probes of one kind sent as one request. Raises RequestFailed."""
    bodies = [probe.request for probe in probes]
    each = ("input_ids", "sampling_params")
    body = {**bodies[0], **{name: [body[name] for body in bodies] for name in each}}
    name = f"batch of {len(probes)} from {probes[0].name}"
    try:
        response = session.post(f"{url}/generate", json=body, timeout=timeout)
        if response.status_code != 200:
            raise RequestFailed(f"{name}: status {response.status_code}: {' '.join(response.text.split())[:300]}")
        answers = [Answer.of_generate(one) for one in response.json()]
    except (requests.RequestException, AnswerError, ValueError) as error:
        raise RequestFailed(f"{name}: {type(error).__name__}: {error}") from None
    if len(answers) != len(probes):
        raise RequestFailed(f"{name}: {len(answers)} answers")
    return answers


def collect(url: str, round_: Round, timeout: float) -> Arm:
    """The answers to a round. No further request is sent once one failed. Raises RequestFailed."""
    failed = threading.Event()

    def ask_unless_failed(probe):
        if failed.is_set():
            return None
        try:
            return ask(session, url, probe, timeout)
        except RequestFailed as failure:
            failed.set()
            return failure

    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(pool_maxsize=round_.in_flight))
        if round_.batch:
            return ask_batch(session, url, round_.probes, timeout)
        with ThreadPoolExecutor(round_.in_flight) as pool:
            answers = list(pool.map(ask_unless_failed, round_.probes))
    failures = [answer for answer in answers if isinstance(answer, RequestFailed)]
    if failures:
        sent = sum(answer is not None for answer in answers)
        raise RequestFailed(
            f"{round_.condition}: {len(failures)} of {sent} requests to {url} failed "
            f"({len(answers) - sent} were not sent), the first: {failures[0]}"
        )
    return answers


def flush(urls: Sequence[str], timeout: float) -> None:
    """Empty the caches of servers that are idle or about to be. Raises RequestFailed."""
    for url in urls:
        try:
            answer = requests.post(f"{url}/flush_cache", params={"timeout": 30}, timeout=timeout)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise RequestFailed(f"flush_cache of {url}: {error}") from None


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
    _answers: dict = field(default_factory=dict, repr=False)
    _arms: dict = field(default_factory=dict, repr=False)

    def take(self, url: str | None, round_: Round) -> tuple[Arm, Arm | None]:
        """(reference, control or None) of a round; asked of the server at `url` if not known yet."""
        if self.bitwise:
            return self._take_bitwise(url, round_), None
        if round_ not in self._arms:
            self._require(url, round_)
            self._arms[round_] = self._take_alone(url, round_), self._arm(self.control_url or url, round_)
        return self._arms[round_]

    def answer(self, url: str | None, probe: Probe) -> Answer:
        """The reference answer to one probe, sent alone."""
        return self.take(url, Round(probe.name, (probe,)))[0][0]

    def measure_rounding(self, url: str, round_: Round, in_flight: int) -> Distribution:
        """Does the load change bits without any hand-over? Sends a round that is known from being alone all at once."""
        alone = self.take(url, round_)[0]
        together = collect(url, Round("control: monolithic, together", round_.probes, in_flight), self.timeout)
        distribution = Distribution.of(alone, together)
        if distribution.equal < len(round_.probes):
            self.rounding = FLOAT_ROUNDING
        return distribution

    def _take_alone(self, url, round_):
        unknown = {probe.key: probe for probe in round_.probes if probe.key not in self._answers}
        if unknown:
            alone = replace(round_, probes=tuple(unknown.values()), in_flight=1, batch=False)
            self._answers.update(zip(unknown, self._arm(url, alone)))
        return [self._answers[probe.key] for probe in round_.probes]

    def _arm(self, url, round_):
        if round_.flush:
            flush([url], self.timeout)
        return collect(url, round_, self.timeout)

    def _take_bitwise(self, url, round_):
        unknown = {probe.key: probe for probe in round_.probes if probe.key not in self._answers}
        if unknown:
            self._require(url, round_)
            answers = collect(url, Round(round_.condition, tuple(unknown.values()), round_.in_flight), self.timeout)
            self._answers.update(zip(unknown, answers))
        return [self._answers[probe.key] for probe in round_.probes]

    @staticmethod
    def _require(url, round_):
        if url is None:
            raise RequestFailed(f"{round_.condition}: no monolithic answers were taken and no monolithic server is up")


class ParityArms:
    """What is sent, and what a monolithic server answers.

    bitwise          the engine's answers depend on the request alone, to the bit; otherwise a control arm is taken
    monolithic_url   a monolithic server that stays up; None if its answers were taken before, see MonolithicFirstMixin
    references       those answers; classes may share them
    parity_options   how much is sent
    request_timeout  seconds for one request
    tokenizer_path   config and tokenizer of the model; None where `model` names them
    """

    bitwise = False
    monolithic_url = None
    references = None
    parity_options = PlanOptions()
    request_timeout = 300.0
    tokenizer_path = None
    _plan = _parameter_rounds = None

    @classmethod
    def _references(cls):
        if cls.references is None:
            cls.references = References(cls.bitwise, cls.request_timeout)
        return cls.references

    @classmethod
    def references_of(cls, round_):
        return cls._references().take(cls.monolithic_url, round_)

    @classmethod
    def take_references(cls):
        """Ask the monolithic server everything that the checks will ask."""
        plan, references = cls.parity_plan(), cls._references()
        for round_ in plan.rounds:
            references.take(cls.monolithic_url, round_)
        variations, round_ = cls.parameter_round()
        references.take(cls.monolithic_url, round_)
        references.take(cls.monolithic_url, _without(variations))
        if cls.bitwise:
            control = references.measure_rounding(cls.monolithic_url, plan.alone[0], cls.parity_options.in_flight)
            print(
                f"control, monolithic together against alone: {control.report()}; logprobs of requests served "
                f"together must agree within {references.rounding:g}",
                flush=True,
            )

    @classmethod
    def parity_plan(cls) -> Plan:
        if cls._plan is None:
            info = read_server_info(cls.monolithic_url or cls.prefill_url)
            geometry = Geometry.of(cls._config(), info)
            cls._plan = make_plan(geometry, cls._prompts(geometry), cls.parity_options)
        return cls._plan

    @classmethod
    def parameter_round(cls) -> tuple[tuple[Variation, ...], Round]:
        """Variations of request parameters, and the round that sends them."""
        if cls._parameter_rounds is None:
            cls.parity_plan()
            ids, text = cls._parameter_ids, cls._natural_text()[:200]
            size, seeded = PARAMETER_TOKENS, cls.bitwise
            probes = generate_probe("greedy", ids, size), completion_probe("completion", text, size)
            greedy, completion = (cls._references().answer(cls.monolithic_url, probe) for probe in probes)
            variations = (
                *generate_variations(ids, size, greedy, seeded),
                *completion_variations(text, size, completion, seeded),
            )
            round_ = Round("request parameters", tuple(each.probe for each in variations), len(variations))
            cls._parameter_rounds = variations, round_
        return cls._parameter_rounds

    @classmethod
    def _config(cls):
        from transformers.utils import cached_file

        with open(cached_file(cls.tokenizer_path or cls.model, "config.json"), encoding="utf-8") as file:
            return json.load(file)

    @classmethod
    def _prompts(cls, geometry):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(cls.tokenizer_path or cls.model)
        vocabulary = sorted(set(range(min(geometry.vocab_size, len(tokenizer)))) - set(tokenizer.all_special_ids))
        prompts = Prompts(vocabulary, tokenizer(cls._natural_text())["input_ids"])
        cls._parameter_ids = prompts.random_ids(PARAMETER_PROMPT)
        return prompts

    @classmethod
    def _natural_text(cls):
        rows = read_dataset(getattr(cls, "gsm8k_data_path", None) or default_dataset_path()).rows
        return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in map(json.loads, rows[:400]))


class ParityMixin(ParityArms):
    """The pair answers as a monolithic server of the same model does."""

    def test_parity_alone(self):
        self.check_parity(self.parity_plan().alone)

    def test_parity_prefix_cached(self):
        rounds = self.parity_plan().cached
        if not rounds:
            self.skipTest("the model's prompts are shorter than a page of the prefix cache")
        self.check_parity(rounds)

    def test_parity_concurrent(self):
        self.check_parity(self.parity_plan().concurrent)

    def test_parity_shared_prefix(self):
        self.check_parity(self.parity_plan().shared_prefix)

    def test_parity_rooms(self):
        self.check_parity(self.parity_plan().rooms)

    def test_parity_where_the_indexer_chooses(self):
        rounds = self.parity_plan().indexed
        if not rounds:
            self.skipTest("the model has no indexer, or its prompts are too short for it to choose")
        self.check_parity(rounds)

    def test_parity_request_parameters(self):
        variations, round_ = self.parameter_round()
        arms = (self.references_of(each)[0] for each in (round_, _without(variations)))
        for variation, answer, plain in zip(variations, *arms):
            self.assertNotEqual(answer, plain, f"{variation.probe.name} changes nothing here: choose another prompt")
        self.check_parity((round_,))

    def check_parity(self, rounds):
        """Sends each round to the pair and asserts parity: round by round if bitwise, otherwise of all together."""
        parities = []
        for round_ in rounds:
            reference, control = self.references_of(round_)
            if round_.flush:
                flush([self.prefill_url, self.decode_url], self.request_timeout)
            candidate = collect(self.lb_url, round_, self.request_timeout)
            together = round_.in_flight > 1 or round_.batch
            rounding = self._references().rounding if together else 0.0
            names = tuple(probe.name for probe in round_.probes)
            parities.append(Parity(round_.condition, names, reference, candidate, control, rounding))
            if self.bitwise:
                self._assert_parity(parities[-1])
            if self.caches_prefixes():
                self._check_cached(round_, candidate)
        if not self.bitwise:
            self._assert_parity(Parity.pool(self.id().rpartition(".")[2], parities))

    @staticmethod
    def _assert_parity(parity):
        print(parity.report(), flush=True)
        parity.assert_passed()

    def _check_cached(self, round_, arm):
        for probe, answer in zip(round_.probes, arm):
            share = (
                f"{round_.condition}: {answer.cached_tokens} of {probe.prompt_length} tokens of {probe.name} came from"
            )
            if probe.name in round_.cached:
                self.assertGreater(answer.cached_tokens, 0, f"{share} prefill's cache")
            if round_.cold:
                self.assertEqual(answer.cached_tokens, 0, f"{share} a cache that is empty")

    @classmethod
    def caches_prefixes(cls):
        """Whether a prefix is found again; not among data-parallel ranks with a cache each: the next may be asked."""
        info = read_server_info(cls.prefill_url)
        return not info.get("disable_radix_cache", True) and info.get("dp_size", 1) == 1


def _without(variations):
    return Round("without the parameters", tuple(each.without for each in variations), len(variations))
