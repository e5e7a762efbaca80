"""What answers are held against: how the servers go on after a prompt when nobody else asks, and that all is idle after.

What is asserted is what SGLang's servers say that they answer (sglang/srt/entrypoints), at the places named. After
each test both servers must be idle, which SGLang's /flush_cache tells: it refuses while a request is queued, running
or being transferred.
"""

import unittest
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import requests

from pdkit.checks.base import Checks
from pdkit.checks.http import MINI_LB, REWRITTEN, RUST_ROUTER, Client, greedy, post
from pdkit.core.gsm8k import question_text, read_lines
from pdkit.core.processes import wait_until

Taken = Sequence[Any]  # logprob in nats, token id or text


@dataclass(frozen=True)
class Reference:
    """How a server goes on after `prompt`, asked alone.

    tokens, ids, logprobs: the text, the id and the log-probability (nats) of each output token. certain: how many of the first tokens are compared: where
    answers are not reproducible to the bit, those before the first near tie, and before a character in pieces.
    """

    prompt: str
    text: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    certain: int
    logprobs: tuple[float, ...] = ()

    @property
    def certain_text(self) -> str:
        return "".join(self.tokens[: self.certain]) if self.certain < len(self.tokens) else self.text


def ask_reference(client: Client, prompt: str, max_tokens: int, margin: float) -> Reference:
    """The Reference of `prompt`. margin: log-odds of the best over the second token below which they are near a tie."""
    answer = client.generate(text=prompt, sampling_params=greedy(max_tokens), return_logprob=True, top_logprobs_num=2)
    completion = client.complete(prompt, max_tokens, logprobs=1).choices[0]
    tops = answer["meta_info"]["output_top_logprobs"]
    ties = [index for index, (best, second) in enumerate(tops) if best[0] - second[0] < margin]
    tokens = tuple(completion.logprobs.tokens)
    certain = min([len(tokens), *ties])
    while not completion.text.startswith("".join(tokens[:certain])):  # pieces of a character are spelled otherwise
        certain -= 1
    logprobs = tuple(logprob for logprob, *_ in answer["meta_info"]["output_token_logprobs"])
    return Reference(prompt, completion.text, tokens, tuple(answer["output_ids"]), certain, logprobs)


def is_best(taken: Taken, tops: Sequence[Taken]) -> bool:
    """Whether greedy decoding may take `taken` where the best ones are `tops`.

    taken: (logprob in nats, token id or text); tops: one or more of the same. Of tokens whose logprobs are equal to the
    bit any may be taken, however they are listed; one that is not listed only if it is as good as all that are.
    """
    logprobs = [logprob for logprob, _ in tops]
    return taken[0] == max(logprobs) and (taken in tops or min(logprobs) == max(logprobs))


def counting_prompts(count: int) -> list[str]:
    """Prompts that any language model goes on with by counting, each from another number."""
    return [" ".join(str(100 * (index + 1) + step) for step in range(9)) for index in range(count)]


def question_prompts(path: str, count: int) -> list[str]:
    """The first `count` questions of a GSM8K file."""
    return [question_text(line) for line in read_lines(path)[:count]]


def through_each_load_balancer(test: Callable[[Any, Client], None]) -> Callable[[Any], None]:
    """`test(self, client)` as a test method: once a load balancer; skipped if it skips through all of them."""

    @wraps(test)
    def method(self: "LoadBalancerChecks") -> None:
        skips = []
        for client in self.clients:
            with self.subTest(load_balancer=client.name):
                try:
                    test(self, client)
                except unittest.SkipTest as skip:
                    skips.append(str(skip))
                    print(f"not through the {client.name}: {skip}", flush=True)
        if len(skips) == len(self.clients):
            self.skipTest(skips[0])

    vars(method)["scenario"] = test
    return method


class LoadBalancerChecks(Checks):
    """What all of these checks share: a client of each load balancer, references, and idle servers after each test.

    bitwise                   an answer is the same to the bit whoever else is served; else near ties are left out
    near_tie                  log-odds below which two tokens are near a tie
    prefix_cache_tokens       shared prefixes of this many tokens are kept by the prefill server; None: it has no cache
    request_timeout           seconds for one answer
    settle_seconds            within which a server has forgotten a request that ended or was left
    unending_tokens           more than a server generates in twice `settle_seconds`
    """

    needs: tuple[str, ...] = ("lb_url", "router_url", "prefill_url", "decode_url", "model", "launch_lb")

    bitwise = False
    near_tie = 2.0
    prefix_cache_tokens = 1024
    request_timeout = 120
    settle_seconds = 15
    unending_tokens = 8192
    clients: Sequence[Client] = ()
    known_references: dict[tuple[str, int], Reference]

    prompts = staticmethod(counting_prompts)

    @classmethod
    def launch_lb(cls) -> None:
        super().launch_lb()
        cls.known_references = {}
        cls.clients = [
            Client(MINI_LB, cls.lb_url, cls.model, cls.request_timeout),
            Client(RUST_ROUTER, cls.router_url, cls.model, cls.request_timeout),
        ]
        for client in cls.clients:
            cls.addClassCleanup(client.close)

    def tearDown(self) -> None:
        self.assertIdle()
        super().tearDown()

    # What is compared with what.

    @classmethod
    def reference(cls, prompt: str, max_tokens: int = 24) -> Reference:
        """How the servers go on after `prompt` when nobody else asks."""
        key = prompt, max_tokens
        if key not in cls.known_references:
            margin = 0 if cls.bitwise else cls.near_tie
            alone = Client(MINI_LB, cls.lb_url, cls.model, cls.request_timeout)
            cls.known_references[key] = ask_reference(alone, prompt, max_tokens, margin)
            alone.close()
            assert cls.known_references[key].certain > 0, f"nothing is certain after {prompt!r}"
        return cls.known_references[key]

    def assertGoesOn(self, text: str, reference: Reference) -> None:
        """`text` is the answer to the prompt of `reference`."""
        self.assertEqual(text[: len(reference.certain_text)], reference.certain_text, reference.prompt[-60:])
        if self.bitwise:
            self.assertEqual(text, reference.text)

    def assertSame(self, answer: Mapping[str, Any], reference: Reference) -> None:
        """`answer`, of /generate with logprobs, is that to the prompt of `reference`; a text may be right by luck."""
        ids, said = tuple(answer["output_ids"]), answer["meta_info"]["output_token_logprobs"]
        count = len(ids) if self.bitwise else reference.certain
        self.assertEqual(ids[:count], reference.ids[:count], reference.prompt[-60:])
        if self.bitwise:
            self.assertEqual(len(said), len(reference.logprobs), reference.prompt[-60:])
            for (logprob, *_), right in zip(said, reference.logprobs):
                self.assertAlmostEqual(logprob, right, delta=REWRITTEN, msg=f"logprobs of {reference.prompt[-60:]!r}")

    def assertIdle(self) -> None:
        """Prefill and decode have let go of every request, and of what they kept for it."""
        for name, url in (("prefill", self.prefill_url), ("decode", self.decode_url)):
            if not wait_until(partial(self.is_idle, url), self.settle_seconds):
                self.fail(f"{name} still holds a request: its /flush_cache answers {self.flush(url)}")
        info = requests.get(f"{self.prefill_url}/get_server_info", timeout=self.request_timeout).json()
        self.assertEqual(info.get("rooms", 0), 0, "bootstrap rooms that prefill still holds")

    def is_idle(self, url: str) -> bool:
        return self.flush(url) == 200

    def assertServes(self, client: Client) -> None:
        """The load balancer of `client` serves, and rightly."""
        reference = self.reference(self.prompts(1)[0])
        self.assertGoesOn(client.complete(reference.prompt, 24).choices[0].text, reference)

    def shared_prefix(self) -> str:
        """A text that is long enough for the prefix cache to keep."""
        one = self.clients[0].complete(self.prompts(1)[0], 1).usage.prompt_tokens
        return " ".join(self.prompts(-(-(self.prefix_cache_tokens or 256) // one) + 1))

    def flush(self, url: str) -> int:
        """The status of /flush_cache: 400 from a server that is at work."""
        return post(url, "/flush_cache", timeout=self.request_timeout).status_code
