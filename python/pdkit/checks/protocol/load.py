"""Many clients at once, one prefix for many, a while of mixed load, and the first request after nobody asked."""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import cycle, islice
from typing import Any

import openai

from pdkit.checks.http import Client, generate, greedy
from pdkit.checks.protocol.reference import LoadBalancerChecks, Reference, through_each_load_balancer
from pdkit.checks.server_info import ServerInfoError, read_server_info


class LoadChecks(LoadBalancerChecks):
    """Answers under load are those of requests that are served alone.

    sustained_seconds         how long the sustained load lasts
    sustained_clients         how many clients it has
    idle_seconds              how long nobody asks before the first request after it
    """

    sustained_seconds = 60
    sustained_clients = 16
    idle_seconds = 60
    young: Sequence[Reference] = ()

    @through_each_load_balancer
    def test_32_at_once(self, client: Client) -> None:
        self.ask_at_once(client, 32)

    @through_each_load_balancer
    def test_128_at_once(self, client: Client) -> None:
        self.ask_at_once(client, 128)

    @classmethod
    def launch_lb(cls) -> None:
        """The references are those of servers that are young: what begins with age must not be in them."""
        super().launch_lb()
        cls.young = [cls.reference(prompt) for prompt in cls.prompts(8)]

    def ask_at_once(self, client: Client, count: int) -> None:
        """By turns completions, of which the text is compared, and /generate, with tokens and logprobs."""
        references = self.young
        asked = list(islice(cycle(references), count))
        with ThreadPoolExecutor(count) as pool:
            whole = [pool.submit(client.complete, each.prompt, 24) for each in asked[::2]]
            native = [pool.submit(self.native_answer, client, each.prompt) for each in asked[1::2]]
            answers = [*whole, *native]
            if late := wait(answers, self.request_timeout * 0.75).not_done:
                self.fail(f"{len(late)} of {count} wait for an answer, and the servers say: {self.held()}")
            for reference, answer in zip(asked[::2], whole):
                self.assertGoesOn(answer.result().choices[0].text, reference)
                self.assertEqual(answer.result().usage.completion_tokens, 24)
            for reference, answer in zip(asked[1::2], native):
                self.assertSame(answer.result(), reference)

    def native_answer(self, client: Client, prompt: str) -> Any:
        body = {"text": prompt, "sampling_params": greedy(24), "return_logprob": True}
        return generate(client.url, body, self.request_timeout)

    def held(self) -> list[object]:
        """What prefill and decode tell of themselves, but for their settings."""
        told = ("rooms", "sending", "internal_states", "engine", "transfer")
        held: list[object] = []
        for url in (self.prefill_url, self.decode_url):
            try:
                info = read_server_info(url, timeout=10)
                held.append({name: info.get(name) for name in told})
            except ServerInfoError as error:
                held.append(str(error))
        return held

    @through_each_load_balancer
    def test_one_prefix_from_many_clients(self, client: Client) -> None:
        """A tail of its own each; the prefix is computed once, and nobody gets another's tail."""
        tails = self.prompts(8)
        prefix = self.shared_prefix()
        references = [self.reference(f"{prefix} {tail}", 8) for tail in tails]
        self.assertIdle()
        with ThreadPoolExecutor(32) as pool:
            asked = list(islice(cycle(references), 32))
            for reference, whole in zip(asked, pool.map(lambda each: client.complete(each.prompt, 8), asked)):
                self.assertGoesOn(whole.choices[0].text, reference)
        if self.prefix_cache_tokens:
            meta = client.generate(text=f"{prefix} 1", sampling_params={"max_new_tokens": 1})["meta_info"]
            self.assertGreater(meta["cached_tokens"], 0, "prefill computed the shared prefix again")

    def test_sustained_load(self) -> None:
        """Completions and chat, whole and streamed, clients that leave and bad requests, all at once."""
        references = [self.reference(prompt) for prompt in self.prompts(8)]
        chats = {each.prompt: self.clients[0].chat(each.prompt, 8).choices[0].message.content for each in references}
        began, served = time.monotonic(), Counter[tuple[str, str]]()

        def chat(client: Client, reference: Reference, **options: Any) -> Any:
            return client.chat(reference.prompt, 8, **options)

        def whole_chat(client: Client, reference: Reference) -> None:
            self.assert_text(chat(client, reference).choices[0].message.content, chats[reference.prompt])

        def streamed_chat(client: Client, reference: Reference) -> None:
            self.assert_text(chat(client, reference, stream=True).text, chats[reference.prompt])

        def whole(client: Client, reference: Reference) -> None:
            self.assertGoesOn(client.complete(reference.prompt, 24).choices[0].text, reference)

        def streamed(client: Client, reference: Reference) -> None:
            self.assertGoesOn(client.complete(reference.prompt, 24, stream=True).text, reference)

        def left(client: Client, reference: Reference) -> None:
            with client.open_stream(reference.prompt, self.unending_tokens) as stream:
                next(iter(stream))

        def refused(client: Client, reference: Reference) -> None:
            with self.assertRaises(openai.BadRequestError):
                client.complete("", 4)

        kinds = (whole, streamed, whole_chat, streamed_chat, left, refused)

        def client_of_many(number: int) -> None:
            for step in range(number, 1_000_000):
                after = time.monotonic() - began
                if after > self.sustained_seconds:
                    return
                kind, client = kinds[step % len(kinds)], self.clients[(step + step // len(kinds)) % len(self.clients)]
                try:
                    kind(client, references[step % len(references)])
                except openai.APITimeoutError as error:
                    what = f"{kind.__name__} through the {client.name}, sent {after:.1f} s after the load began"
                    raise AssertionError(f"{what}: no answer in {self.request_timeout} s") from error
                served[kind.__name__, client.name] += 1

        with ThreadPoolExecutor(self.sustained_clients) as pool:
            list(pool.map(client_of_many, range(self.sustained_clients)))
        print(
            f"sustained load: {sum(served.values())} requests in {self.sustained_seconds} s, {dict(served)}", flush=True
        )
        self.assertEqual(len(served), len(kinds) * len(self.clients), "each kind through each load balancer")

    def assert_text(self, text: str, expected: str) -> None:
        if self.bitwise:
            self.assertEqual(text, expected)
        self.assertTrue(text)

    def test_first_request_after_idle(self) -> None:
        reference = self.reference(self.prompts(1)[0])
        for client in self.clients:
            self.assertServes(client)
        time.sleep(self.idle_seconds)
        for client in self.clients:
            self.assertGoesOn(client.complete(reference.prompt, 24).choices[0].text, reference)
