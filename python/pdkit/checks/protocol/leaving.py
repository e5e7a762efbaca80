"""Clients that leave before their answer is whole: the servers let go of what they kept for them."""

import time
from itertools import islice

import openai

from pdkit.checks.http import Client, Streamed, post
from pdkit.checks.protocol.reference import LoadBalancerChecks, through_each_load_balancer


class LeavingChecks(LoadBalancerChecks):
    """Streams that are closed, requests that are aborted, answers that are not waited for."""

    @through_each_load_balancer
    def test_stream_that_is_left(self, client: Client) -> None:
        stream = client.open_stream(self.prompts(1)[0], self.unending_tokens)
        self.assertEqual(len(list(islice(stream, 3))), 3)
        self.assertEqual(self.flush(self.decode_url), 400, "decode is at work")
        stream.close()
        self.assertIdle()
        self.assertServes(client)

    @through_each_load_balancer
    def test_abort_by_id(self, client: Client) -> None:
        stream = client.open_stream(self.prompts(1)[0], self.unending_tokens)
        first, told = next(iter(stream)), time.monotonic()
        post(self.decode_url, "/abort_request", {"rid": first.id}, self.request_timeout)
        rest = []
        for chunk in stream:
            self.assertLess(time.monotonic() - told, self.settle_seconds, "the stream goes on: it was not aborted")
            rest.append(chunk)
        self.assertEqual(Streamed.of(rest).finish_reasons, ["abort"])
        self.assertIdle()

    @through_each_load_balancer
    def test_whole_answer_that_is_not_waited_for(self, client: Client) -> None:
        if not client.balancer.tells_of_leaving:
            self.skipTest(f"{client.name} goes on for clients that left")
        with self.assertRaises(openai.APITimeoutError):
            client.openai.with_options(timeout=1.0).completions.create(
                model=self.model, prompt=self.prompts(1)[0], max_tokens=self.unending_tokens, temperature=0,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
        self.assertIdle()
