"""Requests that must be refused: too long, malformed, empty; and what a refusal looks like."""

from collections.abc import Sequence
from typing import Any

import requests

from pdkit.checks.http import Client
from pdkit.checks.protocol.reference import LoadBalancerChecks, through_each_load_balancer

MALFORMED = (b"", b"{", b"[]", b"5", b"null", b'"text"', b'{"prompt": "1"', b"\xff")
WRONG_COMPLETIONS: Sequence[dict[str, Any]] = (
    {}, {"prompt": 5}, {"prompt": {"a": 1}}, {"prompt": "1", "max_tokens": 0}, {"prompt": "1", "max_tokens": -1},
    {"prompt": "1", "max_tokens": "many"}, {"prompt": "1", "temperature": "hot"}, {"prompt": "1", "temperature": -1},
    {"prompt": "1", "top_p": 2}, {"prompt": "1", "stop": 5},
)  # fmt: skip
SAY = [{"role": "user", "content": "1"}]
WRONG_CHATS: Sequence[dict[str, Any]] = (
    {}, {"messages": []}, {"messages": "hello"}, {"messages": [{}]}, {"messages": [{"role": "user", "content": 5}]},
    {"messages": SAY, "temperature": -1}, {"messages": SAY, "max_tokens": "many"},
)  # fmt: skip
WRONG_GENERATES: Sequence[dict[str, Any]] = (
    {}, {"text": {"a": 1}}, {"text": "1", "sampling_params": "x"}, {"text": "1", "sampling_params": {"temperature": -1}},
    {"text": "1", "sampling_params": {"max_new_tokens": -1}}, {"text": "1", "sampling_params": {"top_p": 0}},
)  # fmt: skip


class RefusalChecks(LoadBalancerChecks):
    """A bad request gets a 4xx that says why, and harms nobody.

    empty_text_is_fatal  why a text without a token is not sent, where one ends a server
    """

    empty_text_is_fatal: str | None = None

    def assertRefused(self, response: requests.Response, pattern: str = ".") -> None:
        """A 4xx with a short message, and nothing that looks like an answer."""
        self.assertIn(response.status_code, range(400, 500), response.text)
        self.assertTrue(response.text, "the refusal says nothing")
        self.assertRegex(response.text, pattern)
        for word in ("Traceback", '"choices"', '"output_ids"'):
            self.assertNotIn(word, response.text)

    @through_each_load_balancer
    def test_too_long(self, client: Client) -> None:
        """sglang/srt/managers/tokenizer_manager.py, `_validate_one_request`."""
        card = requests.get(f"{self.prefill_url}/v1/models", timeout=self.request_timeout).json()["data"][0]
        limit = card["max_model_len"]
        prompt = self.prompts(1)[0]
        long = {"input_ids": [11] * (limit + 1), "sampling_params": {"max_new_tokens": 1}}
        much = {"model": self.model, "prompt": prompt, "max_tokens": limit, "temperature": 0}
        self.assertRefused(client.post("/generate", long), "longer than.*context length")
        self.assertRefused(client.post("/v1/completions", much), "context length")
        chat = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": limit}
        self.assertRefused(client.post("/v1/chat/completions", chat), "context length")
        streamed = client.post("/v1/completions", much | {"stream": True})
        if client.balancer.keeps_status:
            self.assertIn(streamed.status_code, range(400, 500), streamed.text)
        self.assertIn("context length", streamed.text)
        self.assertNotIn('"choices"', streamed.text)
        self.assertServes(client)

    @through_each_load_balancer
    def test_malformed_bodies(self, client: Client) -> None:
        for path, wrong in (
            ("/v1/completions", WRONG_COMPLETIONS),
            ("/v1/chat/completions", WRONG_CHATS),
            ("/generate", WRONG_GENERATES),
        ):
            model = {} if path == "/generate" else {"model": self.model}
            for body in (*MALFORMED, *(model | each for each in wrong)):
                self.assertRefused(client.post(path, body))
        self.assertServes(client)

    @through_each_load_balancer
    def test_empty_prompt(self, client: Client) -> None:
        """Completions refuse it (`_validate_request`)."""
        for prompt in ("", [], [""]):
            refusal = client.post("/v1/completions", {"model": self.model, "prompt": prompt, "max_tokens": 4})
            self.assertRefused(refusal, "empty")
        self.assertServes(client)

    @through_each_load_balancer
    def test_empty_text(self, client: Client) -> None:
        """/generate refuses it unless the tokenizer makes a token of nothing."""
        if self.empty_text_is_fatal:
            self.skipTest(self.empty_text_is_fatal)
        native = client.post("/generate", {"text": "", "sampling_params": {"max_new_tokens": 2}})
        if native.status_code != 200:
            self.assertRefused(native, "empty")
        self.assertServes(client)
