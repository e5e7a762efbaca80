"""Checks of a deployment that somebody else runs: it is asked, nothing is launched or ended, no cache is emptied."""

from dataclasses import replace

import openai

from pdkit.checks.accounting.checks import AccountingChecks, unaccounted
from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.checks.base import Checks
from pdkit.checks.http import post
from pdkit.checks.parity.checks import AnswerParityChecks
from pdkit.checks.parity.plan import PlanOptions
from pdkit.deployment import attached


class ApiChecks(Checks):
    """The interfaces that clients use agree with each other."""

    needs = ("lb_url", "model")

    api_prompt = "Question: What is 1 + 1?\nAnswer:"
    api_tokens = 16
    api_timeout = 120

    def test_api_streamed_equals_whole(self):
        whole, streamed = self._complete(), self._complete(stream=True)
        chunks = [chunk for chunk in streamed if chunk.choices]
        self.assertEqual("".join(chunk.choices[0].text for chunk in chunks), whole.choices[0].text)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason]
        self.assertEqual(reasons, [whole.choices[0].finish_reason])

    def test_api_generate_equals_completion(self):
        whole = self._complete()
        sampling = {"temperature": 0, "max_new_tokens": self.api_tokens}
        body = {"text": self.api_prompt, "sampling_params": sampling}
        answer = post(self.lb_url, "/generate", body, self.api_timeout)
        self.assertEqual(answer.status_code, 200, answer.text[:300])
        self.assertEqual(answer.json()["text"], whole.choices[0].text)
        meta = answer.json()["meta_info"]
        self.assertEqual(
            (meta["prompt_tokens"], meta["completion_tokens"]),
            (whole.usage.prompt_tokens, whole.usage.completion_tokens),
        )

    def test_api_chat_answers(self):
        messages = [{"role": "user", "content": "What is 1 + 1?"}]
        answer = self._client().chat.completions.create(
            model=self.model, messages=messages, max_tokens=self.api_tokens, temperature=0
        )
        self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))
        self.assertGreater(answer.usage.completion_tokens, 0)

    @unaccounted
    def test_api_refuses_what_is_wrong(self):
        for path, body in (
            ("/v1/completions", {"model": self.model, "prompt": "1", "max_tokens": "many"}),
            ("/v1/completions", {"model": self.model, "prompt": "1", "temperature": "hot"}),
            ("/generate", {"text": "1", "sampling_params": "x"}),
        ):
            answer = post(self.lb_url, path, body, self.api_timeout)
            self.assertIn(answer.status_code, range(400, 500), f"{path} {body}: {answer.text[:300]}")
            self.assertTrue(answer.text, f"{path} {body}: the refusal says nothing")

    def _client(self):
        return openai.OpenAI(base_url=f"{self.lb_url}/v1", timeout=self.api_timeout, max_retries=0)

    def _complete(self, **options):
        return self._client().completions.create(
            model=self.model, prompt=self.api_prompt, max_tokens=self.api_tokens, temperature=0, **options
        )


class ExternalChecks(ApiChecks, AccountingChecks, AnswerParityChecks, GSM8KChecks):
    """What such a deployment is asked: with little load, and without what needs its caches to be empty."""

    parity_options = PlanOptions(tokens=12, rooms=16, in_flight=16, indexed=0)

    def setUp(self):
        super().setUp()
        if self._testMethodName.startswith("test_parity") and not self.monolithic_url:
            self.skipTest(f"parity needs a server to compare with: {attached.variable('baseline_url')}")

    @classmethod
    def parity_plan(cls):
        """The same rounds, but for what they want of caches, which are not ours to empty."""
        plan = super().parity_plan()
        return replace(plan, **{name: tuple(map(_whatever_is_cached, rounds)) for name, rounds in vars(plan).items()})

    @classmethod
    def caches_prefixes(cls):
        return False


def _whatever_is_cached(round_):
    return replace(round_, flush=False, cold=False, cached=frozenset())
