"""Whole and streamed answers of each endpoint: text, usage, stops, logprobs, samples, batches, schemas."""

import json
from collections.abc import Sequence
from typing import Any

import openai

from pdkit.checks.http import Client, greedy
from pdkit.checks.protocol.reference import LoadBalancerChecks, Reference, Taken, is_best, through_each_load_balancer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
}
"""Bounded: a small model would not end a name or a number by itself."""


class AnswerChecks(LoadBalancerChecks):
    """What clients get is what was asked for.

    parallel_samples          n > 1 works. In SGLang, `TokenizerManager._handle_batch_request` gives all samples of a
                              prompt its bootstrap room, so that only one of them can be transferred
    json_schema               the engine has constrained decoding; else it must refuse
    prompt_logprobs_are_fatal why no logprobs of a prompt are asked for, where they end a server
    rendered_chat             text that the chat template makes of a user's message, with {}; None: not known
    """

    parallel_samples = False
    json_schema = True
    rendered_chat: str | None = None
    prompt_logprobs_are_fatal: str | None = None

    def assertBest(self, taken: Taken, tops: Sequence[Taken]) -> None:
        self.assertTrue(is_best(taken, tops), f"greedy takes the best, not {taken} of {tops}")

    def require_prompt_logprobs(self) -> None:
        if self.prompt_logprobs_are_fatal:
            self.skipTest(self.prompt_logprobs_are_fatal)

    @through_each_load_balancer
    def test_streamed_equals_whole(self, client: Client) -> None:
        prompt = self.prompts(1)[0]
        for ask in (client.complete, client.chat):
            whole, streamed = ask(prompt, 24), ask(prompt, 24, stream=True)
            choice = whole.choices[0]
            text = choice.text if hasattr(choice, "text") else choice.message.content
            self.assertEqual(streamed.text, text)
            self.assertGreater(len(streamed.texts), 4, "a stream that comes in few pieces")
            self.assertEqual(len(streamed.ids), 1)
            self.assertEqual(streamed.finish_reasons, [choice.finish_reason], "a stream ends once")
            self.assertEqual(choice.finish_reason, "length")
            self.assertEqual(streamed.usage, whole.usage)
        self.assertGoesOn(client.complete(prompt, 24).choices[0].text, self.reference(prompt))

    @through_each_load_balancer
    def test_chat_equals_completion_of_its_template(self, client: Client) -> None:
        if self.rendered_chat is None:
            self.skipTest("the chat template is not known; set rendered_chat")
        prompt = self.prompts(1)[0]
        chat, completion = client.chat(prompt, 24), client.complete(self.rendered_chat.format(prompt), 24)
        self.assertEqual(chat.choices[0].message.content, completion.choices[0].text)
        self.assertEqual(chat.usage, completion.usage)

    @through_each_load_balancer
    def test_usage_counts(self, client: Client) -> None:
        prompt, other = self.prompts(2)
        one, two = client.complete(prompt, 5).usage, client.complete(other, 5).usage
        both = client.complete([prompt, other], 5).usage
        counted = client.generate(text=prompt, sampling_params={"max_new_tokens": 1})["meta_info"]["prompt_tokens"]
        self.assertEqual((one.prompt_tokens, one.completion_tokens, one.total_tokens), (counted, 5, counted + 5))
        self.assertEqual((both.prompt_tokens, both.completion_tokens), (counted + two.prompt_tokens, 10))
        self.assertEqual(client.complete(prompt, 5, stream=True).usage, one)
        self.assertEqual(client.chat(prompt, 7).usage.completion_tokens, 7)
        if client.balancer.token_prompts:
            self.assertEqual(client.complete([11, 12, 13], 4).usage.prompt_tokens, 3)

    @through_each_load_balancer
    def test_stop_strings(self, client: Client) -> None:
        reference = self.reference(self.prompts(1)[0])
        for stop in self._stop_strings(reference):
            before = reference.text[: reference.text.index(stop)]
            for given in (stop, ["never said", stop]):
                whole = client.complete(reference.prompt, 24, stop=given).choices[0]
                streamed = client.complete(reference.prompt, 24, stop=given, stream=True)
                said = f"stop {given!r} in {reference.text!r}"
                self.assertEqual((whole.text, whole.finish_reason, whole.matched_stop), (before, "stop", stop), said)
                self.assertEqual((streamed.text, streamed.finish_reasons, streamed.matched_stop),
                                 (before, ["stop"], stop), said)  # fmt: skip
        unstopped = client.complete(reference.prompt, 24, stop=["never said"]).choices[0]
        self.assertEqual((unstopped.finish_reason, unstopped.matched_stop), ("length", None))
        self.assertGoesOn(unstopped.text, reference)

    def _stop_strings(self, reference: Reference) -> list[str]:
        """One across two tokens and one of a whole token; neither stands earlier in the text."""
        tokens, found = reference.tokens[: reference.certain], dict[str, str]()
        for index in range(2, len(tokens) - 1):
            end, token = len("".join(tokens[: index + 1])), tokens[index]
            across = token[-2:] + tokens[index + 1][:2]
            if reference.text.find(across) == end - len(token[-2:]):
                found.setdefault("across", across)
            if reference.text.find(token) == end - len(token):
                found.setdefault("whole", token)
        self.assertEqual(len(found), 2, f"no stop strings in {tokens}")
        return list(found.values())

    @through_each_load_balancer
    def test_stop_tokens(self, client: Client) -> None:
        reference = self.reference(self.prompts(1)[0])
        place = next(i for i in range(2, reference.certain) if reference.ids.index(reference.ids[i]) == i)
        stop, before = reference.ids[place], "".join(reference.tokens[:place])
        ask: dict[str, Any] = {"ignore_eos": False, "extra": {"stop_token_ids": [stop]}}
        whole = client.complete(reference.prompt, 24, **ask)
        choice = whole.choices[0]
        self.assertEqual((choice.text, choice.finish_reason, choice.matched_stop), (before, "stop", stop))
        self.assertEqual(whole.usage.completion_tokens, place + 1)
        streamed = client.complete(reference.prompt, 24, stream=True, **ask)
        self.assertEqual((streamed.text, streamed.finish_reasons), (before, ["stop"]))

    @through_each_load_balancer
    def test_first_token_is_the_last(self, client: Client) -> None:
        """What prefill makes is all there is: decode must not add to it."""
        reference = self.reference(self.prompts(1)[0])
        first = reference.tokens[0]
        for options, text, reason in (
            ({"max_tokens": 1}, first, "length"),
            ({"max_tokens": 24, "stop": first}, "", "stop"),
            ({"max_tokens": 24, "ignore_eos": False, "extra": {"stop_token_ids": [reference.ids[0]]}}, "", "stop"),
        ):
            whole = client.complete(reference.prompt, **options)
            choice = whole.choices[0]
            self.assertEqual((choice.text, choice.finish_reason), (text, reason), options)
            self.assertEqual(whole.usage.completion_tokens, 1, options)
            streamed = client.complete(reference.prompt, stream=True, **options)
            self.assertEqual((streamed.text, streamed.finish_reasons), (text, [reason]), options)

    @through_each_load_balancer
    def test_first_token_is_the_end_of_text(self, client: Client) -> None:
        self.require_prompt_logprobs()
        params = {"temperature": 0, "max_new_tokens": 96}
        ask = {"sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
        answer = client.generate(text=(self.rendered_chat or "{}").format(self.prompts(1)[0]), **ask)
        if answer["meta_info"]["finish_reason"]["type"] != "stop":
            self.skipTest("the model does not end its answer")
        prompt = [token for _, token, _ in answer["meta_info"]["input_token_logprobs"]]
        *said, end = answer["output_ids"]
        result = client.generate(input_ids=prompt + said, sampling_params=params)
        self.assertEqual(result["meta_info"]["finish_reason"], {"type": "stop", "matched": end})
        self.assertEqual((result["text"], result["meta_info"]["completion_tokens"]), ("", 1))

    @through_each_load_balancer
    def test_logprobs_of_completions_and_chat(self, client: Client) -> None:
        prompt = self.prompts(1)[0]
        whole = client.complete(prompt, 12, logprobs=3).choices[0]
        tokens, chosen, tops = whole.logprobs.tokens, whole.logprobs.token_logprobs, whole.logprobs.top_logprobs
        self.assertEqual([len(tokens), len(chosen), len(tops)], [12] * 3)
        self.assertEqual("".join(tokens), whole.text)
        for token, logprob, top in zip(tokens, chosen, tops):
            self.assertLessEqual(logprob, 0)
            self.assertIn(len(top), range(2, 4), "of 3 alternatives two may read the same")
            if len(top) == 3:
                self.assertBest((logprob, token), [(p, t) for t, p in top.items()])
            else:
                self.assertGreaterEqual(logprob, max(top.values()), "greedy takes the best")
        streamed = client.complete(prompt, 12, logprobs=3, stream=True)
        self.assertEqual(streamed.tokens, tokens)
        self.assertIsNone(client.complete(prompt, 2).choices[0].logprobs)

        content = client.chat(prompt, 12, logprobs=True, top_logprobs=3).choices[0].logprobs.content
        self.assertEqual(len(content), 12)
        for entry in content:
            self.assertEqual(len(entry.top_logprobs), 3)
            self.assertBest((entry.logprob, entry.token), [(top.logprob, top.token) for top in entry.top_logprobs])

    @through_each_load_balancer
    def test_input_logprobs_are_merged(self, client: Client) -> None:
        """Prefill has those of the prompt, decode those of the output; the client gets both."""
        self.require_prompt_logprobs()
        ask = {"text": self.prompts(1)[0], "sampling_params": greedy(6), "return_logprob": True, "top_logprobs_num": 3}
        whole = client.generate(**ask, logprob_start_len=0)
        answers = [whole["meta_info"]]
        if client.balancer.merges_streams:
            answers.append(client.generate_stream(**ask, logprob_start_len=0)[-1]["meta_info"])
        for meta in answers:
            inputs, outputs = meta["input_token_logprobs"], meta["output_token_logprobs"]
            self.assertEqual((len(inputs), len(outputs)), (meta["prompt_tokens"], 6))
            self.assertIsNone(inputs[0][0], "nothing precedes the first token")
            self.assertTrue(all(logprob <= 0 for logprob, *_ in inputs[1:] + outputs))
            self.assertEqual([token for _, token, _ in outputs], whole["output_ids"])
            self.assertEqual([len(top) for top in meta["output_top_logprobs"]], [3] * 6)
            for tops, taken in zip(meta["output_top_logprobs"], outputs):
                self.assertBest(tuple(taken[:2]), [tuple(top[:2]) for top in tops])
        tail = client.generate(**ask, logprob_start_len=whole["meta_info"]["prompt_tokens"] - 4)["meta_info"]
        ids = [token for _, token, _ in whole["meta_info"]["input_token_logprobs"]]
        self.assertEqual([token for _, token, _ in tail["input_token_logprobs"]], ids[-4:])

    @through_each_load_balancer
    def test_several_samples(self, client: Client) -> None:
        if not self.parallel_samples:
            self.skipTest("this engine gives the samples of a prompt one bootstrap room")
        reference = self.reference(self.prompts(1)[0])
        one, three = client.complete(reference.prompt, 24), client.complete(reference.prompt, 24, n=3)
        self.assertEqual([choice.index for choice in three.choices], [0, 1, 2])
        for choice in three.choices:
            self.assertGoesOn(choice.text, reference)
        self.assertEqual(three.usage.prompt_tokens, one.usage.prompt_tokens)
        self.assertEqual(three.usage.completion_tokens, 3 * one.usage.completion_tokens)
        chats = client.chat(reference.prompt, 24, n=2).choices
        self.assertEqual(len(chats), 2)
        self.assertEqual(chats[0].message, chats[1].message)

    @through_each_load_balancer
    def test_batch_of_mixed_lengths(self, client: Client) -> None:
        texts = self.prompts(3)
        prompts = [texts[0], " ".join(texts), texts[1], " ".join(texts * 2), texts[2]]
        batch = client.complete(prompts, 8)
        self.assertEqual([choice.index for choice in batch.choices], list(range(len(prompts))))
        for choice, prompt in zip(batch.choices, prompts):
            self.assertGoesOn(choice.text, self.reference(prompt, 8))
        self.assertEqual(batch.usage.completion_tokens, 8 * len(prompts))

    @through_each_load_balancer
    def test_json_schema(self, client: Client) -> None:
        format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        if not self.json_schema:
            with self.assertRaisesRegex(openai.BadRequestError, "response_format|json_schema"):
                client.chat("Who?", 64, response_format=format_)
            return
        choice = client.chat("Who are you?", 256, ignore_eos=False, response_format=format_).choices[0]
        person = json.loads(choice.message.content)
        self.assertEqual((type(person["name"]), type(person["age"])), (str, int))

    @through_each_load_balancer
    def test_greedy_is_deterministic(self, client: Client) -> None:
        reference = self.reference(self.prompts(1)[0])
        choices = [client.complete(reference.prompt, 24, logprobs=1).choices[0] for _ in range(4)]
        for choice in choices:
            self.assertGoesOn(choice.text, reference)
        if self.bitwise:
            logprobs = {tuple(choice.logprobs.token_logprobs) for choice in choices}
            self.assertEqual(len(logprobs), 1, "logprobs of one prompt asked again and again")
