"""Requests to servers and load balancers, and clients as users have them."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import requests
from requests.adapters import HTTPAdapter

# An open connection that idles is not used again after so many seconds. By default that is 5 in httpx as in uvicorn:
# a request may then be sent just when the server closes.
IDLE_S = 1.0

ERROR_LIMIT = 300
ABORT_AGAIN_S = 0.2

# SGLang's router reads an answer's numbers and writes them anew: the last digit of a logprob may differ, by 4e-15.
REWRITTEN = 1e-12


class RequestFailed(AssertionError):
    """A request got no answer that can be used; the message says which, and why, in one line."""


def bootstrap(host: str, port: int | str, room: int | None = None) -> dict[str, Any]:
    """What a load balancer adds to a request that goes to prefill and decode; the room is a new one by default."""
    return {"bootstrap_host": host, "bootstrap_port": int(port), "bootstrap_room": room or random.getrandbits(62)}


def greedy(new_tokens: int, **more: Any) -> dict[str, Any]:
    """Sampling parameters of /generate for exactly `new_tokens` tokens, always the most likely one."""
    return {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True, **more}


def post(
    url: str,
    path: str,
    body: object = None,
    timeout: float | tuple[float, float] | None = None,
    session: requests.Session | None = None,
    **options: Any,
) -> requests.Response:
    """The answer of `url` to a POST, whatever its status. Raises requests.RequestException.

    body     what becomes JSON; text and bytes are sent as they stand
    timeout  seconds; or those to connect, and those without a word
    """
    if isinstance(body, (str, bytes)):
        options |= {"data": body, "headers": {"Content-Type": "application/json"}}
    else:
        options["json"] = body
    return (session or requests).post(f"{url}{path}", timeout=timeout, **options)


def post_or_fail(
    url: str, path: str, body: Any, timeout: float, session: requests.Session | None = None, **options: Any
) -> requests.Response:
    """The same; raises RequestFailed for a status other than 200, too."""
    try:
        response = post(url, path, body, timeout, session, **options)
        if response.status_code != 200:
            raise RequestFailed(f"status {response.status_code}: {' '.join(response.text.split())[:ERROR_LIMIT]}")
    except requests.RequestException as error:
        raise RequestFailed(f"{type(error).__name__}: {error}") from None
    return response


def generate(url: str, body: Mapping[str, Any], timeout: float, session: requests.Session | None = None) -> Any:
    """The JSON that /generate answers. Raises RequestFailed."""
    try:
        return post_or_fail(url, "/generate", body, timeout, session).json()
    except ValueError as error:
        raise RequestFailed(f"{type(error).__name__}: {error}") from None


def abort_until_ended(asked: Future[Any], urls: Sequence[str], rid: str, timeout: float) -> None:
    """Aborts the request `rid` until it has ended, again and again: an abort may overtake its request."""
    while not asked.done():
        for url in urls:
            post(url, "/abort_request", {"rid": rid}, timeout)
        wait([asked], ABORT_AGAIN_S)


def session_of(connections: int) -> requests.Session:
    """A session that keeps as many connections to a server open; to be closed."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=connections))
    return session


def status_of(url: str, timeout: float) -> int:
    """The status of a GET. Raises requests.RequestException."""
    return requests.get(url, timeout=timeout).status_code


def flush_caches(urls: Sequence[str], timeout: float) -> None:
    """Empties the caches of servers that are idle or about to be. Raises RequestFailed."""
    for url in urls:
        try:
            answer = requests.post(f"{url}/flush_cache", params={"timeout": 30}, timeout=timeout)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise RequestFailed(f"flush_cache of {url}: {error}") from None


def events_of(response: requests.Response) -> list[bytes]:
    """The data of each event of a stream, its closing b"[DONE]" included."""
    return [line.removeprefix(b"data: ") for line in response.iter_lines() if line]


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


Prompt = str | Sequence[str] | Sequence[int]  # a text, several, or token ids

# Read in sglang_router/mini_lb.py, which itself fails with 500 on {"text": 5} and {"input_ids": []}.
MINI_LB = LoadBalancer("mini LB", True, keeps_status=False, merges_streams=True, tells_of_leaving=False)
# A binary: found by asking sglang-router 0.3.2.
RUST_ROUTER = LoadBalancer("Rust router", False, keeps_status=True, merges_streams=False, tells_of_leaving=True)


@dataclass
class Streamed:
    """A stream of one choice, put together. `texts`: the pieces that were not empty."""

    ids: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    matched_stop: object = None
    usage: object = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @classmethod
    def of(cls, chunks: Iterable[Any]) -> "Streamed":
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

    def __init__(self, balancer: LoadBalancer, url: str, model: str, timeout: float) -> None:
        self.balancer, self.url, self.model, self.timeout = balancer, url, model, timeout

    @property
    def name(self) -> str:
        return self.balancer.name

    @cached_property
    def openai(self) -> Any:
        import httpx  # with openai, most of a second that only this client needs
        import openai

        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=self.timeout,
            http_client=openai.DefaultHttpxClient(limits=httpx.Limits(keepalive_expiry=IDLE_S)),
        )  # fmt: skip

    def complete(self, prompt: Prompt, max_tokens: int, stream: bool = False, **options: Any) -> Any:
        """A completion, or its Streamed. Options: of `_create`, and parameters of OpenAI's."""
        return self._create(self.openai.completions, stream, prompt=prompt, max_tokens=max_tokens, **options)

    def chat(self, content: str, max_tokens: int, stream: bool = False, **options: Any) -> Any:
        """A chat completion, or its Streamed; `content` is what the user says. Options: as of `complete`."""
        messages = [{"role": "user", "content": content}]
        return self._create(self.openai.chat.completions, stream, messages=messages, max_tokens=max_tokens, **options)

    def _create(
        self,
        endpoint: Any,
        stream: bool,
        ignore_eos: bool = True,
        extra: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """`extra`: parameters of SGLang that OpenAI's client does not know."""
        options = {
            "model": self.model,
            "temperature": 0,
            "extra_body": {"ignore_eos": ignore_eos, **(extra or {})},
        } | options
        if not stream:
            whole = endpoint.create(**options)
            assert whole.choices, f"an answer without choices: {whole.model_dump_json()}"
            return whole
        with endpoint.create(stream=True, stream_options={"include_usage": True}, **options) as chunks:
            return Streamed.of(chunks)

    def open_stream(self, prompt: Prompt, max_tokens: int) -> Any:
        """An open stream of chunks; `close()` it to leave."""
        return self.openai.completions.create(
            model=self.model, prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip

    def generate(self, **body: Any) -> Any:
        """The answer of /generate. Raises requests.HTTPError."""
        response = self.post("/generate", body)
        response.raise_for_status()
        return response.json()

    def generate_stream(self, **body: Any) -> list[Any]:
        with self.post("/generate", body | {"stream": True}, stream=True) as response:
            response.raise_for_status()
            events = events_of(response)
        assert events[-1] == b"[DONE]", events[-1]
        return [json.loads(event) for event in events[:-1]]

    def post(self, path: str, body: object = None, timeout: float | None = None, **options: Any) -> requests.Response:
        """body: as in `post`."""
        return post(self.url, path, body, timeout or self.timeout, **options)

    def close(self) -> None:
        self.openai.close()
