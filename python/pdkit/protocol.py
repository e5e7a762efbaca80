"""Clients of a load balancer in front of prefill and decode, and what they may count on."""

import json
from dataclasses import dataclass, field
from functools import cached_property

import httpx
import openai
import requests

# An open connection that idles is not used again after so many seconds. By default that is 5 in httpx as in uvicorn:
# a request may then be sent just when the server closes.
IDLE_S = 1.0


@dataclass(frozen=True)
class LoadBalancer:
    """What a client gets from a load balancer beside what the servers answer.

    token_prompts    prompts of completions as token ids, and batches of texts in /generate, are taken
    keeps_status     a stream that is refused has the status of the refusal; else it is 200 and the refusal its body
    merges_streams   prefill's input logprobs are merged into streams, too
    tells_of_leaving the servers are told when a client leaves that waits for a whole answer
    """

    name: str
    token_prompts: bool
    keeps_status: bool
    merges_streams: bool
    tells_of_leaving: bool


# Read in sglang_router/mini_lb.py, which itself fails with 500 on {"text": 5} and {"input_ids": []}.
MINI_LB = LoadBalancer("mini LB", True, keeps_status=False, merges_streams=True, tells_of_leaving=False)
# A binary: found by asking sglang-router 0.3.2.
RUST_ROUTER = LoadBalancer("Rust router", False, keeps_status=True, merges_streams=False, tells_of_leaving=True)


@dataclass
class Streamed:
    """A stream of one choice, put together. `texts`: the pieces that were not empty."""

    ids: set = field(default_factory=set)
    texts: list = field(default_factory=list)
    tokens: list = field(default_factory=list)
    finish_reasons: list = field(default_factory=list)
    matched_stop: object = None
    usage: object = None

    @property
    def text(self):
        return "".join(self.texts)

    @classmethod
    def of(cls, chunks):
        """From chunks of completions or chat completions."""
        streamed = cls()
        for chunk in chunks:
            streamed.ids.add(chunk.id)
            streamed.usage = chunk.usage or streamed.usage
            for choice in chunk.choices:
                text = choice.text if hasattr(choice, "text") else choice.delta.content
                streamed.texts += [text] if text else []
                if choice.logprobs and hasattr(choice.logprobs, "tokens"):
                    streamed.tokens += choice.logprobs.tokens
                if choice.finish_reason:
                    streamed.finish_reasons.append(choice.finish_reason)
                    streamed.matched_stop = choice.matched_stop
        return streamed


class Client:
    """One load balancer (or server) as its users see it. Answers are greedy unless told otherwise.

    timeout: seconds for one answer.
    """

    def __init__(self, balancer, url, model, timeout):
        self.balancer, self.url, self.model, self.timeout = balancer, url, model, timeout

    @property
    def name(self):
        return self.balancer.name

    @cached_property
    def openai(self):
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=self.timeout,
            http_client=openai.DefaultHttpxClient(limits=httpx.Limits(keepalive_expiry=IDLE_S)),
        )  # fmt: skip

    def complete(self, prompt, max_tokens, stream=False, ignore_eos=True, extra=None, **options):
        """A completion, or its Streamed. `extra`: parameters of SGLang that OpenAI's client does not know."""
        return self._create(
            self.openai.completions, stream, prompt=prompt, max_tokens=max_tokens,
            extra_body={"ignore_eos": ignore_eos, **(extra or {})}, **options,
        )  # fmt: skip

    def chat(self, content, max_tokens, stream=False, ignore_eos=True, extra=None, **options):
        """A chat completion, or its Streamed; `content` is what the user says."""
        return self._create(
            self.openai.chat.completions, stream, messages=[{"role": "user", "content": content}],
            max_tokens=max_tokens, extra_body={"ignore_eos": ignore_eos, **(extra or {})}, **options,
        )  # fmt: skip

    def _create(self, endpoint, stream, **options):
        options = {"model": self.model, "temperature": 0} | options
        if not stream:
            whole = endpoint.create(**options)
            assert whole.choices, f"an answer without choices: {whole.model_dump_json()}"
            return whole
        with endpoint.create(stream=True, stream_options={"include_usage": True}, **options) as chunks:
            return Streamed.of(chunks)

    def open_stream(self, prompt, max_tokens):
        """An open stream of chunks; `close()` it to leave."""
        return self.openai.completions.create(
            model=self.model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip

    def generate(self, **body):
        """The answer of /generate. Raises requests.HTTPError."""
        response = self.post("/generate", body)
        response.raise_for_status()
        return response.json()

    def generate_stream(self, **body):
        """The events of /generate as a stream."""
        with self.post("/generate", body | {"stream": True}, stream=True) as response:
            response.raise_for_status()
            events = [line.removeprefix("data: ") for line in response.iter_lines(decode_unicode=True) if line]
        assert events[-1] == "[DONE]", events[-1]
        return [json.loads(event) for event in events[:-1]]

    def post(self, path, body=None, timeout=None, **options):
        """body: what becomes JSON, or bytes as they are."""
        if isinstance(body, bytes):
            options |= {"data": body, "headers": {"Content-Type": "application/json"}}
        else:
            options["json"] = body
        return requests.post(f"{self.url}{path}", timeout=timeout or self.timeout, **options)

    def close(self):
        self.openai.close()


@dataclass(frozen=True)
class Reference:
    """How a server goes on after `prompt`, asked alone.

    tokens, ids: the text and the id of each output token. certain: how many of the first tokens are compared: where
    answers are not reproducible to the bit, those before the first near tie, and before a character in pieces.
    """

    prompt: str
    text: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    certain: int

    @property
    def certain_text(self):
        return "".join(self.tokens[: self.certain]) if self.certain < len(self.tokens) else self.text


def ask_reference(client, prompt, max_tokens, margin):
    """The Reference of `prompt`. margin: log-odds of the best over the second token below which they are near a tie."""
    params = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
    answer = client.generate(text=prompt, sampling_params=params, return_logprob=True, top_logprobs_num=2)
    completion = client.complete(prompt, max_tokens, logprobs=1).choices[0]
    tops = answer["meta_info"]["output_top_logprobs"]
    ties = [index for index, (best, second) in enumerate(tops) if best[0] - second[0] < margin]
    tokens = tuple(completion.logprobs.tokens)
    certain = min([len(tokens), *ties])
    while not completion.text.startswith("".join(tokens[:certain])):  # pieces of a character are spelled otherwise
        certain -= 1
    return Reference(prompt, completion.text, tokens, tuple(answer["output_ids"]), certain)


def is_best(taken, tops):
    """Whether greedy decoding may take `taken` where the best ones are `tops`.

    taken: (logprob in nats, token id or text); tops: one or more of the same. Of tokens whose logprobs are equal to the
    bit any may be taken, however they are listed; one that is not listed only if it is as good as all that are.
    """
    logprobs = [logprob for logprob, _ in tops]
    return taken[0] == max(logprobs) and (taken in tops or min(logprobs) == max(logprobs))


def counting_prompts(count):
    """Prompts that any language model goes on with by counting, each from another number."""
    return [" ".join(str(100 * (index + 1) + step) for step in range(9)) for index in range(count)]


def question_prompts(path, count):
    """The first `count` questions of a GSM8K file."""
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count))]
    return [f"Question: {row['question']}\nAnswer:" for row in rows]
