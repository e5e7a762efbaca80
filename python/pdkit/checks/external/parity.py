"""Answers of a deployment against those of a monolithic server, without a tokenizer: the baseline's own is asked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pdkit.checks.hints import hint
from pdkit.checks.http import REWRITTEN, RequestFailed, generate
from pdkit.checks.parity import plan
from pdkit.checks.parity.plan import Geometry, PlanOptions, Probe, Prompts, Round
from pdkit.checks.parity.references import References, collect
from pdkit.checks.parity.verdict import Parity

OPTIONS = PlanOptions(tokens=12, rooms=16, in_flight=16, indexed=0)
QUICK = replace(OPTIONS, longest=600, tokens=4, rooms=8, extra_lengths=())
TEXT_TOKENS = 3000  # of the natural text that is asked for
PIECE = 1500  # characters of it in one request
# DeepSeek-V4's, for a model whose config.json cannot be read here
WINDOW, RATIOS = 128, (4, 128)
# natural text where there are no questions
SUMS = "\n\n".join(
    f"Question: A box holds {a} apples and a bag {b}. How many are there?\nAnswer: {a}+{b}={a + b}."
    for a in range(11, 60) for b in (7, 19)
)  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """`equal` of `total` requests got the baseline's answer; `problems` and `hint` say what is wrong, if anything is."""

    equal: int
    total: int
    problems: tuple[str, ...]
    hint: str | None
    report: str


def geometry_of(config: Mapping[str, Any] | None, info: Mapping[str, Any]) -> Geometry:
    """From config.json, or DeepSeek-V4's where there is none, and what a server reports of itself."""
    if config is not None:
        return Geometry.of(config, info)
    return replace(Geometry.of({"vocab_size": 0}, info), window=WINDOW, ratios=RATIOS)


def token_ids(url: str, text: str, timeout: float) -> list[int]:
    """Token ids of `text` by the tokenizer of the server at `url`, without the first. Raises RequestFailed."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    answer = generate(
        url, {"text": text, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}, timeout
    )
    try:
        return [token for _, token, *_ in answer["meta_info"]["input_token_logprobs"]][1:]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestFailed(f"{url}: /generate reports no logprobs of the prompt ({error!r})") from None


def prompts_of(url: str, text: str, timeout: float) -> Prompts:
    """Prompts from `text`: running pieces of it, and random sequences of the tokens that it has."""
    natural: list[int] = []
    for start in range(0, len(text), PIECE):
        natural += token_ids(url, text[start : start + PIECE], timeout)
        if len(natural) >= TEXT_TOKENS:
            break
    return Prompts(sorted(set(natural)), natural)


class Comparison:
    """What is sent to both, and what came of it.

    lb_url, baseline_url  the deployment, and a monolithic server of the same model
    text                  natural text of some thousand tokens
    exact                 a request alone must be answered to the bit: same kernels, same chunks
    batches               the load balancer takes several prompts in one request
    prompt_logprobs       the deployment may be asked for them
    """

    def __init__(
        self, lb_url: str, baseline_url: str, geometry: Geometry, text: str, *, model: str,
        options: PlanOptions = OPTIONS, exact: bool = False, batches: bool = True, prompt_logprobs: bool = True,
        timeout: float = 60.0,
    ) -> None:  # fmt: skip
        self.lb_url, self.baseline_url, self.timeout, self.exact = lb_url, baseline_url, timeout, exact
        self.options, self.model, self.text, self.prompt_logprobs = options, model, text, prompt_logprobs
        self.references = References(bitwise=False, timeout=timeout)
        self.boundaries = geometry.edges
        prompts = prompts_of(baseline_url, text, timeout)
        self.parameter_ids = prompts.random_ids(plan.PARAMETER_PROMPT)
        made = plan.make_plan(geometry, prompts, options)
        rounds = (*made.alone, *made.rooms, *made.shared_prefix, *made.concurrent)
        self.rounds = [_whatever_is_cached(each) for each in rounds if batches or not each.batch]

    def run(self) -> Compared:
        """Asks both. Raises RequestFailed where one of them does not answer."""
        rounds = [*self.rounds, self._parameters()]
        parities = [self._compare(each) for each in rounds]
        judged = [self._judged(*each) for each in zip(rounds, parities, strict=True)]
        problems = [problem for parity in judged if parity.control is None for problem in parity.problems]
        pooled = Parity.pool("all requests", parities)
        problems += pooled.problems
        evidence = [parity.evidence(round_, self.boundaries) for round_, parity in zip(rounds, judged, strict=True)]
        equal = sum(
            difference.diverged is None and not {"text", "finish"} & set(difference.other)
            for difference in pooled.candidate_distribution.differences
        )
        if problems:  # also those whose logprobs alone are off
            equal = min(
                equal, len(pooled.names) - sum(request.differs for each in evidence for request in each.requests)
            )
        return Compared(
            equal=equal,
            total=len(pooled.names),
            problems=tuple(problems),
            hint=hint(evidence) if problems else None,
            report=pooled.report(most=0),
        )

    def _compare(self, round_: Round) -> Parity:
        reference, control = self.references.take(self.baseline_url, round_)
        return Parity.of(round_, reference, collect(self.lb_url, round_, self.timeout), control)

    def _parameters(self) -> Round:
        _, round_ = plan.parameter_round(
            self.parameter_ids, self.text, lambda probe: self.references.answer(self.baseline_url, self._named(probe)),
            seeded=False, prompt_logprobs=self.prompt_logprobs,
        )  # fmt: skip
        return replace(round_, probes=tuple(map(self._named, round_.probes)))

    def _named(self, probe: Probe) -> Probe:
        """The same for the model that the deployment serves; a router may ask for its name."""
        if probe.path == "/generate":
            return probe
        return replace(probe, body=json.dumps(probe.request | {"model": self.model}))

    def _judged(self, round_: Round, parity: Parity) -> Parity:
        """Without its control arm where it must be equal to the bit."""
        is_exact = self.exact and round_.in_flight == 1 and not round_.batch
        return replace(parity, control=None, rounding=REWRITTEN) if is_exact else parity


def _whatever_is_cached(round_: Round) -> Round:
    """Caches are not ours to empty, and others may have filled them."""
    return replace(round_, flush=False, cold=False, cached=frozenset())
