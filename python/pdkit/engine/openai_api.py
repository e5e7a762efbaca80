"""OpenAI's completions and chat completions, in the shapes that SGLang answers with."""

import time
import uuid
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from pdkit.engine.request import BadRequest, SamplingParams
from pdkit.engine.service import Ask, error_body, sse
from pdkit.engine.streams import interleave, run_to_end

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "stop_regex", "ignore_eos", "json_schema",
    "regex", "ebnf", "skip_special_tokens", "no_stop_trim", "n", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "logit_bias", "min_tokens",
)  # fmt: skip


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Body(BaseModel):
    """What both endpoints share. Fields that this engine does not know are ignored, as SGLang does."""

    model_config = ConfigDict(extra="ignore")

    model: str = "default"
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    response_format: dict[str, Any] | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] | None = None
    min_tokens: int = 0
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    rid: str | None = None
    extra_key: str | None = None
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    bootstrap_room: int | None = None

    def sampling_params(self, max_new_tokens):
        if self.response_format and self.response_format.get("type", "text") != "text":
            raise BadRequest("this engine does not support response_format other than text")
        given = {name: getattr(self, name) for name in SAMPLING}
        given["min_new_tokens"] = given.pop("min_tokens")
        return SamplingParams.parse(given | {"max_new_tokens": max_new_tokens, "sampling_seed": self.seed})

    def asks(self, prompts, params, **logprobs):
        """n Asks for each prompt (a text or a list of ids), in OpenAI's order of choices."""
        count = len(prompts) * params.n
        asks = []
        for index, room in enumerate(rooms(self.bootstrap_room, count)):
            prompt = prompts[index // params.n]
            asks.append(
                Ask(
                    params=params,
                    **({"text": prompt} if isinstance(prompt, str) else {"ids": prompt}),
                    rid=self.rid if count == 1 else None,
                    bootstrap_host=self.bootstrap_host,
                    bootstrap_port=self.bootstrap_port,
                    bootstrap_room=room,
                    extra_key=self.extra_key,
                    **logprobs,
                )
            )
        return asks


class CompletionBody(Body):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = 16
    echo: bool = False
    logprobs: int | None = None

    def prompts(self):
        prompt = self.prompt
        if not prompt or (isinstance(prompt, list) and not all(each or each == 0 for each in prompt)):
            raise BadRequest("Prompt cannot be empty")
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


class ChatBody(Body):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


def rooms(room, count):
    """The bootstrap rooms of `count` sequences: consecutive from a scalar, as SGLang numbers them."""
    if isinstance(room, list):
        if count % len(room):
            raise BadRequest(f"bootstrap_room has {len(room)} entries for {count} sequences")
        return room * (count // len(room))
    return [None if room is None else room + index for index in range(count)]


def usage(requests, samples):
    """OpenAI's usage of the choices of one call; `samples` choices share a prompt."""
    prompt = sum(len(request.ids) for request in requests[::samples])
    completion = sum(len(request.output_ids) for request in requests)
    cached = sum(request.cached_tokens for request in requests[::samples])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _token_text(tokenizer, token):
    return tokenizer.decode([token])


def completion_logprobs(request, start):
    """OpenAI's legacy logprobs object of the output tokens from index `start`."""
    decode = request.tokenizer
    texts = [_token_text(decode, token) for _, token in request.output_logprobs[start:]]
    return {
        "text_offset": [-1] * len(texts),
        "token_logprobs": [logprob for logprob, _ in request.output_logprobs[start:]],
        "tokens": texts,
        "top_logprobs": [
            {_token_text(decode, token): logprob for logprob, token in row}
            for row in request.output_top_logprobs[start:]
        ],
    }


def chat_logprobs(request, start):
    """OpenAI's chat logprobs object of the output tokens from index `start`."""

    def entry(logprob, token):
        text = _token_text(request.tokenizer, token)
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

    return {
        "content": [
            entry(*pair) | {"top_logprobs": [entry(*item) for item in top]}
            for pair, top in zip(request.output_logprobs[start:], request.output_top_logprobs[start:])
        ]
    }


class _Answer:
    """What differs between the two endpoints: names, and how a choice carries its text."""

    def __init__(self, prefix, name, chunk_name, logprobs):
        self.prefix, self.name, self.chunk_name, self.logprobs = prefix, name, chunk_name, logprobs

    def frame(self, body, name, choices, **more):
        return {"id": self.id, "object": name, "created": self.created, "model": body.model, "choices": choices, **more}

    def open(self):
        fresh = type(self)(self.prefix, self.name, self.chunk_name, self.logprobs)
        fresh.id, fresh.created = f"{self.prefix}{uuid.uuid4().hex}", int(time.time())
        return fresh

    def choice(self, request, index, content, logprobs):
        reason = request.finish_reason or {}
        return {
            "index": index,
            **content,
            "logprobs": logprobs,
            "finish_reason": reason.get("type"),
            "matched_stop": reason.get("matched"),
        }


class _Completion(_Answer):
    def whole(self, text):
        return {"text": text}

    def delta(self, text, first):
        return {"text": text}


class _Chat(_Answer):
    def whole(self, text):
        return {"message": {"role": "assistant", "content": text, "reasoning_content": None, "tool_calls": None}}

    def delta(self, text, first):
        return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}


COMPLETION = _Completion("cmpl-", "text_completion", "text_completion", completion_logprobs)
CHAT = _Chat("chatcmpl-", "chat.completion", "chat.completion.chunk", chat_logprobs)


def _echo(service, body, index):
    if not getattr(body, "echo", False):
        return ""
    prompt = body.prompts()[index // body.n]
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)


async def _answer(service, kind, body, asks, http_request):
    answer, wants_logprobs = kind.open(), asks[0].return_logprob
    if not body.stream:
        requests = await run_to_end(service, asks, http_request)
        choices = [
            answer.choice(
                request,
                index,
                answer.whole(_echo(service, body, index) + request.text),
                answer.logprobs(request, 0) if wants_logprobs else None,
            )
            for index, request in enumerate(requests)
        ]
        return answer.frame(body, answer.name, choices, usage=usage(requests, body.n))
    requests = [service.make_request(ask) for ask in asks]

    async def events():
        sent_text, sent_tokens = {}, {}
        try:
            async for index in interleave(service, asks, requests):
                request = requests[index]
                reason = request.finish_reason or {}
                if "status_code" in reason:
                    yield sse({"error": error_body(reason["message"], reason["status_code"])})
                    break
                first = index not in sent_text
                text = request.text[sent_text.get(index, 0) :]
                if first:
                    text = _echo(service, body, index) + text
                sent_text[index] = len(request.text)
                logprobs = answer.logprobs(request, sent_tokens.get(index, 0)) if wants_logprobs else None
                sent_tokens[index] = len(request.output_logprobs)
                choice = answer.choice(request, index, answer.delta(text, first), logprobs)
                yield sse(answer.frame(body, answer.chunk_name, [choice]))
            else:
                if body.stream_options and body.stream_options.include_usage:
                    yield sse(answer.frame(body, answer.chunk_name, [], usage=usage(requests, body.n)))
        except BadRequest as error:
            yield sse({"error": error_body(str(error), 400)})
        yield sse("[DONE]")

    return StreamingResponse(events(), media_type="text/event-stream")


def add_routes(app, service):
    """Mount both endpoints."""

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http_request: Request):
        asks = body.asks(
            body.prompts(),
            body.sampling_params(body.max_tokens),
            return_logprob=body.logprobs is not None,
            top_logprobs_num=body.logprobs or 0,
        )
        return await _answer(service, COMPLETION, body, asks, http_request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http_request: Request):
        try:
            text = service.tokenizer.apply_chat_template(body.messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise BadRequest(f"messages do not fit the chat template: {error}") from None
        asks = body.asks(
            [text],
            body.sampling_params(body.max_completion_tokens or body.max_tokens),
            return_logprob=body.logprobs,
            top_logprobs_num=body.top_logprobs or 0,
        )
        return await _answer(service, CHAT, body, asks, http_request)
