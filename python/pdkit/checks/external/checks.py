"""What a deployment is asked, check by check; each answers with a row in plain words."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import requests

from pdkit.checks import acceptance, http
from pdkit.checks.accounting.counters import PairCounters, TransferAccount, settled
from pdkit.checks.accounting.ledger import ClientAccount, Ledger
from pdkit.checks.accuracy import client
from pdkit.checks.accuracy.gate import GateOptions, Policy, Verdict
from pdkit.checks.accuracy.gsm8k import ScoreError, gsm8k_args, gsm8k_gate, paired_gate
from pdkit.checks.accuracy.paired import FEW_FLIPS, MANY_FLIPS, PairedOptions
from pdkit.checks.external import parity
from pdkit.checks.external.record import Fingerprint, track
from pdkit.checks.http import RequestFailed, post, post_or_fail
from pdkit.checks.streams import NO_USAGE, stream_difference
from pdkit.core import stats
from pdkit.core.gsm8k import Dataset, prompts_of, running_text
from pdkit.deployment.external import Deployment, Served, Servers, discover, geometry_config, server_info
from pdkit.deployment.quirks import overwritten_by_prompt_logprobs

TIMEOUT_S = 180.0
IN_FLIGHT = 32  # questions at a time
MIN_SCORE = 0.95
SETTLE_S = 10.0
PROMPT = "Question: What is 1 + 1?\nAnswer:"
TOKENS = 16
QUICK_EXAMPLES = 40
QUICK_LEVEL = 0.01
DRAFTS = 32  # prompts for the acceptance length
DRAFT_TOKENS = 128


class State(str, Enum):
    PASSED = "passed"
    FAILED = "failed"
    DRIFTED = "drifted"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class CheckRow:
    """One check: `sentence` says what was found, `evidence` has what led to it."""

    check: str
    state: State
    sentence: str
    evidence: tuple[str, ...] = ()

    def line(self) -> str:
        if self.state is State.NOT_CHECKED:
            return f"not checked: {self.check}, {self.sentence}"
        bad = f"{self.state.name}, " if self.state is not State.PASSED else ""
        return f"{self.check}: {bad}{self.sentence}"


class Mismatch(Exception):
    """What was found is wrong; the message says what, in one line."""


@dataclass
class CheckedDeployment:
    """A deployment under check.

    servers    what stands behind its load balancer
    questions  GSM8K; a text says why there are none
    exact      a request alone must be answered to the bit as the baseline answers it
    """

    deployment: Deployment
    served: Served
    servers: Servers
    questions: Dataset | str
    quick: bool = False
    exact: bool = False
    min_score: float = MIN_SCORE
    timeout: float = TIMEOUT_S
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger([self.url])

    @property
    def url(self) -> str:
        return self.deployment.base_url

    @cached_property
    def model(self) -> str:
        """The name that requests carry."""
        wanted = self.deployment.model
        return wanted if wanted in self.served.names and wanted else self.served.names[0]

    def complete(self, prompt: str = PROMPT, **options: Any) -> Mapping[str, Any]:
        """A greedy completion of TOKENS tokens. Raises RequestFailed."""
        return post_or_fail(self.url, "/v1/completions", self.body(prompt, **options), self.timeout).json()

    def generate(self, prompt: str = PROMPT) -> Mapping[str, Any]:
        """The same through /generate. Raises RequestFailed."""
        body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS}}
        return http.generate(self.url, body, self.timeout)

    def body(self, prompt: str, **options: Any) -> dict[str, Any]:
        return {"model": self.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **options}


def usage_adds_up(target: CheckedDeployment) -> str:
    """Tokens that the endpoints report are those that were asked for."""
    longer = PROMPT + " 2. " + PROMPT
    for prompt in (PROMPT, longer):
        usage = target.complete(prompt, ignore_eos=True)["usage"]
        counted = target.generate(prompt)["meta_info"]["prompt_tokens"]
        expected = counted, TOKENS, counted + TOKENS
        found = usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]
        if found != expected:
            raise Mismatch(
                f"prompt, completion and total are {found}, expected {expected}: "
                f"/generate counts {counted} prompt tokens, and {TOKENS} were to be made"
            )
    return "yes"


def streaming_equals_whole(target: CheckedDeployment) -> str:
    """A stream has the text, the finish reason and the usage of the whole answer."""
    wrong = stream_difference(target.url, target.body(PROMPT), target.complete(), target.timeout)
    if wrong not in (None, NO_USAGE):
        raise Mismatch(wrong)
    return "yes"


def generate_equals_completion(target: CheckedDeployment) -> str:
    """SGLang's own endpoint and OpenAI's answer alike."""
    whole, own = target.complete(), target.generate()
    text, usage, meta = whole["choices"][0]["text"], whole["usage"], own["meta_info"]
    if own["text"] != text:
        raise Mismatch(f"/generate says {own['text']!r}, /v1/completions {text!r}")
    counts = meta["prompt_tokens"], meta["completion_tokens"]
    if counts != (usage["prompt_tokens"], usage["completion_tokens"]):
        raise Mismatch(f"/generate counts {counts} prompt and completion tokens, /v1/completions {usage}")
    return "yes"


def chat_answers(target: CheckedDeployment) -> str:
    """Chat completions are served."""
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    body = {"model": target.model, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    answer = post_or_fail(target.url, "/v1/chat/completions", body, target.timeout).json()
    reason = answer["choices"][0]["finish_reason"]
    if reason not in ("stop", "length") or not answer["usage"]["completion_tokens"] > 0:
        raise Mismatch(f"it ended by {reason!r} after {answer['usage']['completion_tokens']} tokens")
    return "yes"


def wrong_requests_are_refused(target: CheckedDeployment) -> str:
    """What is no request gets a status from 400 to 499 and a reason."""
    for path, body in (
        ("/v1/completions", {"model": target.model, "prompt": "1", "max_tokens": "many"}),
        ("/v1/completions", {"model": target.model, "prompt": "1", "temperature": "hot"}),
        ("/generate", {"text": "1", "sampling_params": "x"}),
    ):
        answer = post(target.url, path, body, target.timeout)
        if answer.status_code not in range(400, 500) or not answer.text:
            raise Mismatch(f"{path} answers {body} with {answer.status_code} {answer.text[:200]!r}")
    return "yes"


def _may_be_asked_for_prompt_logprobs(servers: Servers) -> bool:
    """Whether each prefill server is known, and none overwrites its memory by it."""
    infos = servers.prefill
    return bool(infos) and all(info and not overwritten_by_prompt_logprobs(info) for info in infos)


def answers_equal(target: CheckedDeployment) -> str | CheckRow:
    """The baseline's answers to the same requests: alone, together, with shared prefixes, with other parameters."""
    check, baseline = "answers equal the baseline", target.deployment.baseline_url
    if baseline is None:
        return CheckRow("answers", State.NOT_CHECKED, "no baseline to compare with (--baseline URL)")
    info = server_info(baseline, target.deployment.api_key) or {}
    if overwritten_by_prompt_logprobs(info):
        reason = "the baseline overwrites memory where logprobs of prompts are asked for, with this release of SGLang"
        return CheckRow(check, State.NOT_CHECKED, f"{reason}; start it without --speculative-algorithm")
    rows = target.questions.rows if isinstance(target.questions, Dataset) else ()
    comparison = parity.Comparison(
        target.url,
        baseline,
        parity.geometry_of(geometry_config(target.served.model_path), info),
        running_text(rows[:400]) or parity.SUMS,
        model=target.model,
        options=parity.QUICK if target.quick else parity.OPTIONS,
        exact=target.exact,
        batches=not target.servers.is_rust_router,
        prompt_logprobs=_may_be_asked_for_prompt_logprobs(target.servers),
        timeout=target.timeout,
    )
    found = comparison.run()
    share = f"{found.equal} of {found.total}"
    if not found.problems:
        noise = "" if found.equal == found.total else ", the others as far off as the baseline is from itself"
        return share + noise
    bits = ", but logprobs are off" if found.equal == found.total else ""
    sentence = f"{share}{bits}{': ' + found.hint if found.hint else ''}"
    return CheckRow(check, State.FAILED, sentence, (*found.report.splitlines()[1:], *found.problems))


def gsm8k(target: CheckedDeployment) -> str | CheckRow:
    """The accuracy gate on GSM8K; a few questions with --quick."""
    if isinstance(target.questions, str):
        return CheckRow("GSM8K", State.NOT_CHECKED, target.questions)
    count = len(target.questions.rows)
    args = gsm8k_args(target.url, target.model, str(target.questions.path), num_shots=5, timeout=target.timeout)
    args.num_threads = IN_FLIGHT
    if target.quick:
        args.num_examples = min(QUICK_EXAMPLES, count)
        right = sum(client.run(args)["outcomes"])
        share = f"score {right / args.num_examples:.3f} of {args.num_examples} questions"
        wrong, good = (
            args.num_examples - right,
            GateOptions().good if target.min_score == MIN_SCORE else target.min_score,
        )
        if stats.at_least(wrong, args.num_examples, 1 - good) <= QUICK_LEVEL:
            raise Mismatch(f"{share}; a deployment that is right in {good:.1%} gets so few right in 1 of 100 runs")
        return f"{share} (too few to pass the gate: without --quick)"
    if target.deployment.baseline_url and target.min_score == MIN_SCORE:
        paired = PairedOptions(flips=FEW_FLIPS if target.exact else MANY_FLIPS)
        if paired.suffices(count):
            return _gsm8k_paired(args, target.deployment.baseline_url, paired)
    options = GateOptions(threshold=target.min_score)
    if target.min_score != MIN_SCORE or not options.suffices(count):
        options = replace(options, policy=Policy.FIRST_LOOK)
    if count < options.first_look:
        return CheckRow(
            "GSM8K", State.NOT_CHECKED, f"{count} questions are too few, the gate needs {options.first_look}"
        )
    gate = gsm8k_gate(args, options, run=client.run, progress=lambda line: None)
    share = f"score {gate.correct / gate.examples:.3f} of {gate.examples} questions"
    if gate.verdict is not Verdict.PASS:
        return CheckRow("GSM8K", State.FAILED, f"{share}, the gate is {target.min_score:g}",
                   tuple(gate.report().splitlines()))  # fmt: skip
    return f"{share}, the gate is {target.min_score:g}"


def _gsm8k_paired(args: SimpleNamespace, baseline_url: str, options: PairedOptions) -> str | CheckRow:
    """Whether the deployment loses right answers of its baseline, on as few questions as decide."""
    baseline = SimpleNamespace(**{**vars(args), "base_url": baseline_url})
    gate = paired_gate(args, baseline, options, run=client.run, progress=lambda line: None)
    share = (
        f"score {sum(gate.candidate) / gate.examples:.3f} of {gate.examples} questions, the baseline's is "
        f"{sum(gate.baseline) / gate.examples:.3f}: {gate.lost} right answers lost, {gate.gained} gained"
    )
    return share if gate.passed else CheckRow("GSM8K", State.FAILED, share, tuple(gate.report().splitlines()))


def acceptance_length(target: CheckedDeployment) -> str | CheckRow:
    """Tokens per verification step of speculative decoding, against the baseline's where it speculates."""
    check = "acceptance length"
    algorithms = {info.get("speculative_algorithm") for info in target.servers.decode if info}
    if algorithms == {None}:
        return CheckRow(check, State.NOT_CHECKED, "decode does not speculate")
    if isinstance(target.questions, str):
        return CheckRow(check, State.NOT_CHECKED, target.questions)
    measured = _accepted(target, target.url)
    if measured is None:
        return CheckRow(check, State.NOT_CHECKED, "no answer reports verification steps")
    baseline = target.deployment.baseline_url
    reference = _accepted(target, baseline) if baseline else None
    if reference is None:
        return f"{measured.length:.2f} (nothing to compare with)"
    gate = acceptance.AcceptanceGate(measured, reference.length)
    if not gate.passed:
        raise Mismatch(f"{measured.length:.2f}, the baseline's is {reference.length:.2f}; needed is {gate.minimum:.2f}")
    return f"{measured.length:.2f}, the baseline's is {reference.length:.2f}"


def _accepted(target: CheckedDeployment, url: str) -> acceptance.Acceptance | None:
    assert isinstance(target.questions, Dataset)
    prompts = prompts_of(target.questions, 8 if target.quick else DRAFTS)
    sampling = {"temperature": 0, "max_new_tokens": DRAFT_TOKENS}
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda text: http.generate(url, {"text": text, "sampling_params": sampling}, target.timeout), prompts
            )
        )
    metas = [answer["meta_info"] for answer in answers]
    return acceptance.from_meta_info(
        "speculation" if any(meta.get("spec_verify_ct") for meta in metas) else None, metas
    )


Check = Callable[[CheckedDeployment], str | CheckRow]
ACCOUNTED: tuple[tuple[str, Check], ...] = (
    ("usage adds up", usage_adds_up),
    ("streaming equals whole", streaming_equals_whole),
    ("/generate equals /v1/completions", generate_equals_completion),
    ("chat answers", chat_answers),
    ("answers equal the baseline", answers_equal),
    ("GSM8K", gsm8k),
    ("acceptance length", acceptance_length),
)
"""Each with its name; their requests are counted."""


def ask(name: str, check: Check, target: CheckedDeployment) -> CheckRow:
    try:
        found = check(target)
    except Mismatch as mismatch:
        return CheckRow(name, State.FAILED, str(mismatch))
    except (RequestFailed, requests.RequestException, acceptance.AcceptanceError, ScoreError) as failure:
        return CheckRow(name, State.FAILED, f"no answer: {' '.join(str(failure).split())[:400]}")
    except (KeyError, TypeError, IndexError, ValueError) as error:
        return CheckRow(
            name, State.FAILED, f"an answer of another shape than SGLang's: {type(error).__name__}: {error}"
        )
    return found if isinstance(found, CheckRow) else CheckRow(name, State.PASSED, found)


def roles(target: CheckedDeployment) -> CheckRow:
    """Whether prefill and decode are there."""
    servers, check = target.servers, "prefill and decode"
    if not servers.confirmed:
        known = f"{servers.source} them, but they do not report their roles" if servers.source else (
            "neither /server_info nor /workers of the load balancer lists its servers; name them by --prefill-urls and "
            "--decode-urls"
        )  # fmt: skip
        return CheckRow(check, State.NOT_CHECKED, f"could not be confirmed: {known}")
    counts = f"{len(servers.prefill)} prefill and {len(servers.decode)} decode"
    return CheckRow(check, State.PASSED, f"{servers.source} {counts}")


def pair_counters(deployment: Deployment, settle: float = 0.0) -> PairCounters | None:
    """What the servers have counted, once nothing runs or after `settle` seconds; None where they have no counters."""

    def infos() -> tuple[tuple[Mapping[str, Any], ...], ...]:
        servers = discover(deployment)
        return servers.prefill, servers.decode

    return settled(infos, settle)


def accounting(account: ClientAccount) -> CheckRow:
    """Whether each request was answered, at once."""
    total, failed = len(account.attempts), len(account.failures)
    if account.problems:
        return CheckRow("every request was answered", State.FAILED, f"{total - failed} of {total}",
                   tuple(account.report().splitlines()))  # fmt: skip
    return CheckRow("every request was answered", State.PASSED, f"{total} of {total}")


def counters(before: PairCounters | None, after: PairCounters | None, account: ClientAccount, exact: bool) -> CheckRow:
    """Whether each sequence was prefilled, transferred and decoded once; `exact`: nobody else used the servers."""
    check = "counters"
    if before is None or after is None:
        return CheckRow(check, State.NOT_CHECKED, "the servers have none")
    did, (answered, sent) = after.since(before), account.sequences
    if did.decode.prefill_tokens:
        return CheckRow(check, State.FAILED, f"decode computed {did.decode.prefill_tokens} prompt tokens itself")
    if not exact and did.prefill.requests > sent:
        return CheckRow(
            check, State.PASSED, "decode computed no prompt itself; others used the servers, so that no more is known"
        )
    kv_transfer = TransferAccount(did, answered, sent)
    if kv_transfer.problems:
        return CheckRow(check, State.FAILED, kv_transfer.problems[0], kv_transfer.problems[1:])
    return CheckRow(check, State.PASSED, f"each of {answered} sequences was prefilled, transferred and decoded once")


def check_all(
    target: CheckedDeployment, said: Callable[[CheckRow], None], watched: Callable[[str], Any] = nullcontext
) -> list[CheckRow]:
    """All checks in turn, each row to `said` as soon as it is known; `watched(name)` is open while a check runs."""
    rows: list[CheckRow] = []

    def add(row: CheckRow) -> None:
        rows.append(row)
        said(row)

    add(roles(target))
    before, is_up = pair_counters(target.deployment), True
    with target.ledger.open():
        for name, check in ACCOUNTED:
            with watched(name):
                row = ask(name, check, target)
            add(row)
            is_up = not row.sentence.startswith("no answer: ") or _answers(target)
            if not is_up:
                add(CheckRow("all else", State.NOT_CHECKED, f"{target.url} does not answer any more"))
                break
    account = target.ledger.account()
    add(accounting(account))
    add(counters(before, pair_counters(target.deployment, SETTLE_S) if before else None, account, target.servers.exact))
    if is_up:
        add(ask("wrong requests are refused", wrong_requests_are_refused, target))
    return rows


def check_record(target: CheckedDeployment, record: Fingerprint, said: Callable[[CheckRow], None]) -> list[CheckRow]:
    """Whether the deployment still answers as it did when `record` was made; no other question is asked of it."""
    rows = [roles(target)]
    with target.ledger.open():
        rows.append(ask("answers like the record", lambda asked: _tracked(asked, record), target))
    rows.append(accounting(target.ledger.account()))
    for row in rows:
        said(row)
    return rows


def _tracked(target: CheckedDeployment, record: Fingerprint) -> CheckRow:
    tracking = track(target.url, record, target.timeout)
    state = State.FAILED if tracking.broken else State.DRIFTED if tracking.drifted else State.PASSED
    sentence, *evidence = tracking.report().splitlines()
    return CheckRow("answers like the record", state, sentence, tuple(evidence))


def _answers(target: CheckedDeployment) -> bool:
    try:
        target.complete()
        return True
    except (RequestFailed, requests.RequestException, ValueError):
        return False
