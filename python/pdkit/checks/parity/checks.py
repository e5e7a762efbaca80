"""Parity with a monolithic server as tests.

    class TestDisaggregationDSV4Parity(ParityChecks, MonolithicFirst, PDServers):
        pass

The monolithic server of the same model is launched by one of the bases: see `pdkit.deployment.monolithic`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from pdkit.checks.accuracy.gsm8k import default_dataset_path
from pdkit.checks.base import Checks
from pdkit.checks.hints import Evidence, hint
from pdkit.checks.http import flush_caches
from pdkit.checks.judgement import Judgement
from pdkit.checks.parity.answers import Arm
from pdkit.checks.parity.plan import (
    PARAMETER_PROMPT,
    Geometry,
    ParityPlan,
    PlanOptions,
    Prompts,
    Round,
    Variation,
    make_plan,
    parameter_round,
)
from pdkit.checks.parity.references import References, collect
from pdkit.checks.parity.verdict import Parity
from pdkit.checks.server_info import data_parallel_ranks, read_server_info
from pdkit.core import events
from pdkit.core.gsm8k import read_dataset, running_text


class ParityArms(Checks):
    """What is sent, what a monolithic server answers, and whether the pair does; by itself it has no test.

    monolithic_url   a monolithic server that stays up; None if its answers were taken before it stopped
    bitwise          the engine's answers depend on the request alone, to the bit; otherwise a control arm is taken
    alone_is_exact   so do the answers to requests that are served alone, if not those of requests served together
    references       those answers; classes may share them
    parity_options   how much is sent
    request_timeout  seconds for one request
    tokenizer_path   config and tokenizer of the model; None where `model` names them
    from_cache       how many of the pair's answers had a prompt of which prefill's cache held a part
    prompt_logprobs_are_fatal  why logprobs of a prompt are not asked for, where they end a server
    """

    needs: tuple[str, ...] = ("lb_url", "prefill_url", "decode_url", "model", "monolithic_url", "gsm8k_data_path")

    bitwise = False
    alone_is_exact = False
    references: References | None = None
    parity_options = PlanOptions()
    request_timeout = 300.0
    tokenizer_path: str | None = None
    prompt_logprobs_are_fatal: str | None = None
    _parameter_ids: tuple[int, ...] = ()
    evidence: Sequence[Evidence] = ()
    _geometry: Geometry | None = None
    prefill_urls: Sequence[str] = ()
    from_cache = 0

    @classmethod
    def known_references(cls) -> References:
        if cls.references is None:
            cls.references = References(cls.bitwise, cls.request_timeout)
        return cls.references

    @classmethod
    def references_of(cls, round_: Round) -> tuple[Arm, Arm | None]:
        return cls.known_references().take(cls.monolithic_url, round_)

    @classmethod
    def reference_alone(cls, round_: Round) -> Arm:
        """The monolithic server's answers to `round_`, asked once, each request alone."""
        return cls.known_references().take_alone(cls.monolithic_url, round_)

    @classmethod
    def take_references(cls) -> None:
        """Ask the monolithic server everything that the checks will ask."""
        plan, references = cls.parity_plan(), cls.known_references()
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
    @cache
    def parity_plan(cls) -> ParityPlan:
        geometry = cls.geometry()
        return make_plan(geometry, cls._prompts(geometry), cls.parity_options)

    @classmethod
    def geometry(cls) -> Geometry:
        """Of the model, as the server that is asked first serves it."""
        if cls._geometry is None:
            info = read_server_info(cls.monolithic_url or cls.prefill_url)
            cls._geometry = Geometry.of(cls.model_config(), info)
        return cls._geometry

    @classmethod
    @cache
    def parameter_round(cls) -> tuple[tuple[Variation, ...], Round]:
        """Variations of request parameters, and the round that sends them."""
        cls.parity_plan()
        if cls.prompt_logprobs_are_fatal:
            print(f"no logprobs of prompts are compared: {cls.prompt_logprobs_are_fatal}", flush=True)
        answer = partial(cls.known_references().answer, cls.monolithic_url)
        ids, may = cls._parameter_ids, not cls.prompt_logprobs_are_fatal
        return parameter_round(ids, cls._natural_text(), answer, cls.bitwise, may)

    @classmethod
    def model_config(cls) -> Mapping[str, Any]:
        from transformers.utils import cached_file

        with open(cached_file(cls.tokenizer_path or cls.model, "config.json"), encoding="utf-8") as file:
            return json.load(file)

    @classmethod
    def _prompts(cls, geometry: Geometry) -> Prompts:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(cls.tokenizer_path or cls.model)
        vocabulary = sorted(set(range(min(geometry.vocab_size, len(tokenizer)))) - set(tokenizer.all_special_ids))
        prompts = Prompts(vocabulary, tokenizer(cls._natural_text())["input_ids"])
        cls._parameter_ids = prompts.random_ids(PARAMETER_PROMPT)
        return prompts

    @classmethod
    def _natural_text(cls) -> str:
        return running_text(read_dataset(cls.gsm8k_data_path or default_dataset_path()).rows[:400])

    def check_parity(self, rounds: Iterable[Round]) -> None:
        """Sends each round to the pair and asserts parity: of each that is exact by itself, of the others together."""
        pooled, kept = [], 0
        lost: list[str] = []
        for round_ in rounds:
            together = round_.in_flight > 1 or round_.batch
            is_exact = self.bitwise or (self.alone_is_exact and not together)
            if is_exact and not self.bitwise:
                reference, control = self.reference_alone(round_), None
            else:
                reference, control = self.references_of(round_)
            candidate = self.answers_to(round_)
            rounding = self.known_references().rounding if together else 0.0
            parity = self.compared(round_, reference, candidate, control, rounding)
            if is_exact:
                self.assert_parity(parity)
            missing = self.check_cached(round_, candidate) if self.caches_prefixes() else []
            if is_exact:
                self.assertFalse(missing, "\n".join(missing))
            else:
                pooled.append(parity)
                kept, lost = kept + len(self.expected_from_cache(round_)) - len(missing), lost + missing
        self.assertLessEqual(len(lost), kept, "\n".join(lost))
        if pooled:
            self.assert_parity(Parity.pool(self.id().rpartition(".")[2], pooled))

    def answers_to(self, round_: Round) -> Arm:
        """The pair's. Raises RequestFailed."""
        if round_.flush:
            self.empty_prefix_caches()
        return collect(self.lb_url, round_, self.request_timeout)

    @classmethod
    def compared(
        cls, round_: Round, reference: Arm, candidate: Arm, control: Arm | None = None, rounding: float = 0.0
    ) -> Parity:
        """Of one round; what it showed is kept for the hint, and recorded."""
        count = len(round_.probes)
        loads = (count if round_.batch else round_.in_flight,) * count
        parity = replace(Parity.of(round_, reference, candidate, control, rounding), loads=loads)
        evidence = parity.evidence(round_, cls._geometry.edges if cls._geometry else {})
        cls.evidence = [*cls.evidence, evidence]
        cls.from_cache += sum(answer.cached_tokens > 0 for answer in candidate)
        events.emit("compared", **evidence.as_event(), further=parity.further)
        return parity

    @classmethod
    def empty_prefix_caches(cls) -> None:
        """Of all servers of the pair. Raises RequestFailed."""
        flush_caches([*(cls.prefill_urls or [cls.prefill_url]), cls.decode_url], cls.request_timeout)

    @classmethod
    def assert_parity(cls, parity: Judgement) -> None:
        """Its failure says which servers were compared, and where to look by all that was compared so far."""
        try:
            parity.assert_passed()
        except AssertionError as failure:
            lines = [str(failure), f"  asked: {cls.lb_url}, compared with the monolithic server"]
            if where := hint(cls.evidence):
                lines.append(f"  hint: {where}")
            raise AssertionError("\n".join(lines)) from None

    def check_cached(self, round_: Round, arm: Arm) -> list[str]:
        """One line for each prompt that is expected from prefill's cache and that did not come from there.

        Asserts that none came from a cache that is empty. SGLang may forget the window of a prefix before the transfer
        is done (docs/findings/prefix-lost-while-in-flight.md): where answers are not bitwise, half of them is enough.
        """
        missing, expected = [], self.expected_from_cache(round_)
        for probe, answer in zip(round_.probes, arm):
            share = (
                f"{round_.condition}: {answer.cached_tokens} of {probe.prompt_length} tokens of {probe.name} came from"
            )
            if probe.name in expected and not answer.cached_tokens:
                missing.append(f"{share} prefill's cache")
            if round_.cold:
                self.assertEqual(answer.cached_tokens, 0, f"{share} a cache that is empty")
        return missing

    @classmethod
    def expected_from_cache(cls, round_: Round) -> frozenset[str]:
        """Names of the probes of which a part comes from prefill's cache."""
        return round_.cached

    @classmethod
    @cache
    def caches_prefixes(cls) -> bool:
        """Whether a prefix is found again; not among servers or data-parallel ranks with a cache each: any may be next."""
        info = read_server_info(cls.prefill_url)
        caches = data_parallel_ranks(info) * max(1, len(cls.prefill_urls))
        return not info.get("disable_radix_cache", True) and caches == 1


class AloneParityChecks(ParityArms):
    """Requests one at a time."""

    def test_parity_alone(self) -> None:
        self.check_parity(self.parity_plan().alone)

    vars(test_parity_alone)["goes_first"] = True  # it names the part that is wrong, if any does


class IndexerParityChecks(ParityArms):
    """Prompts of thousands of tokens, one at a time."""

    def test_parity_where_the_indexer_chooses(self) -> None:
        rounds = self.parity_plan().indexed
        if not rounds:
            self.skipTest("the model has no indexer, or its prompts are too short for it to choose")
        self.check_parity(rounds)


class AnswerParityChecks(AloneParityChecks):
    """The pair answers as a monolithic server of the same model does: all that may be asked of servers in use."""

    def test_parity_concurrent(self) -> None:
        self.check_parity(self.parity_plan().concurrent)

    def test_parity_shared_prefix(self) -> None:
        self.check_parity(self.parity_plan().shared_prefix)

    def test_parity_rooms(self) -> None:
        self.check_parity(self.parity_plan().rooms)

    def test_parity_request_parameters(self) -> None:
        variations, round_ = self.parameter_round()
        arms = (self.references_of(each)[0] for each in (round_, _without(variations)))
        for variation, answer, plain in zip(variations, *arms):
            self.assertNotEqual(answer, plain, f"{variation.probe.name} changes nothing here: choose another prompt")
        self.check_parity((round_,))


class ParityChecks(AnswerParityChecks, IndexerParityChecks):
    """The same, and what takes caches that are ours to empty, and thousands of tokens a prompt."""

    def test_parity_prefix_cached(self) -> None:
        rounds = self.parity_plan().cached
        if not rounds:
            self.skipTest("the model's prompts are shorter than a page of the prefix cache")
        before = self.from_cache
        self.check_parity(rounds)
        if self.from_cache == before:
            self.skipTest("repeated prompts are answered rightly, and prefill took none of them from its cache")


def _without(variations: Sequence[Variation]) -> Round:
    return Round("without the parameters", tuple(each.without for each in variations), len(variations))
