"""OpenAI's completions and chat completions, in the shapes that SGLang answers with."""

import time
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from pdkit.engine.openai_logprobs import chat_logprobs, completion_logprobs
from pdkit.engine.request import BadRequest, SamplingParams
from pdkit.engine.sequences import fan_out
from pdkit.engine.service import error_body, sse
from pdkit.engine.streams import interleave, run_to_end

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "stop_regex", "ignore_eos", "json_schema",
    "regex", "ebnf", "skip_special_tokens", "no_stop_trim", "n", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "logit_bias", "min_tokens",
)  # fmt: skip


ROUTING = ("rid", "extra_key", "bootstrap_host", "bootstrap_port", "bootstrap_room")


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Body(BaseModel):
    """What both endpoints share. Fields that this engine does not know are ignored, as SGLang does."""

    model_config = ConfigDict(extra="ignore")

    model: str = "default"
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
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
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int = 0
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    rid: str | list[str] | None = None
    extra_key: str | list[str] | None = None
    bootstrap_host: str | list[str] | None = None
    bootstrap_port: int | list[int | None] | None = None
    bootstrap_room: int | list[int] | None = None

    def sampling_params(self, max_new_tokens):
        if self.response_format and self.response_format.get("type", "text") != "text":
            raise BadRequest("this engine does not support response_format other than text")
        given = {name: getattr(self, name) for name in SAMPLING}
        given["min_new_tokens"] = given.pop("min_tokens")
        return SamplingParams.parse(given | {"max_new_tokens": max_new_tokens, "sampling_seed": self.seed})

    def asks(self, prompts, is_batch, max_new_tokens, **logprobs):
        """One Ask a choice, in OpenAI's order."""
        routing = {name: getattr(self, name) for name in ROUTING}
        return fan_out(prompts, self.sampling_params(max_new_tokens), is_batch, **routing, **logprobs)


class CompletionBody(Body):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, gt=0)
    echo: bool = False
    logprobs: int | None = None

    @property
    def is_batch(self):
        return not isinstance(self.prompt, str) and not isinstance(self.prompt[0], int)

    def prompts(self):
        prompt = self.prompt
        if not prompt or (isinstance(prompt, list) and not all(each or each == 0 for each in prompt)):
            raise BadRequest("Prompt cannot be empty")
        return prompt if self.is_batch else [prompt]


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A chat message; what the template may want besides role and content is kept."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None

    def plain(self):
        content = self.content or ""
        if isinstance(content, list):
            content = " ".join(part.text for part in content)
        return self.model_dump() | {"content": content}


class ChatBody(Body):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


def usage(requests, samples, cache_report):
    """OpenAI's usage of the choices of one call; `samples` choices share a prompt."""
    prompt = sum(len(request.ids) for request in requests[::samples])
    completion = sum(len(request.output_ids) for request in requests)
    cached = sum(request.cached_tokens for request in requests[::samples])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached} if cache_report else None,
    }


class _Completion:
    """A streamed choice ends with its last text."""

    name = chunk_name = "text_completion"
    logprobs = staticmethod(completion_logprobs)

    @staticmethod
    def whole(text):
        return {"text": text}

    @staticmethod
    def chunks(request, index, text, first, logprobs):
        return [_choice(index, {"text": text}, logprobs, request.finish_reason)]

    @staticmethod
    def endings(requests):
        return []


class _Chat:
    """A streamed choice begins with its role; all end together, after the last text of any."""

    name, chunk_name = "chat.completion", "chat.completion.chunk"
    logprobs = staticmethod(chat_logprobs)

    @staticmethod
    def whole(text):
        return {"message": {"role": "assistant", "content": text, "reasoning_content": None, "tool_calls": None}}

    @staticmethod
    def chunks(request, index, text, first, logprobs):
        opening = [_choice(index, {"delta": {"role": "assistant", "content": ""}})] if first else []
        return opening + ([_choice(index, {"delta": {"content": text}}, logprobs)] if text else [])

    @staticmethod
    def endings(requests):
        return [_choice(index, {"delta": {}}, reason=each.finish_reason) for index, each in enumerate(requests)]


def _choice(index, content, logprobs=None, reason=None):
    reason = reason or {}
    return {
        "index": index,
        **content,
        "logprobs": logprobs,
        "finish_reason": reason.get("type"),
        "matched_stop": reason.get("matched"),
    }


def _echo(service, body, index):
    if not getattr(body, "echo", False):
        return ""
    prompt = body.prompts()[index // body.n]
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)


async def _answer(service, kind, body, asks, http_request):
    created, cache_report = int(time.time()), service.options.enable_cache_report

    def frame(request, name, choices, **more):
        return {"id": request.rid, "object": name, "created": created, "model": body.model, "choices": choices, **more}

    if not body.stream:
        requests = await run_to_end(service, asks, http_request)
        choices = [
            _choice(
                index,
                kind.whole(_echo(service, body, index) + request.text),
                kind.logprobs(request, 0) if request.return_logprob else None,
                request.finish_reason,
            )
            for index, request in enumerate(requests)
        ]
        return frame(requests[0], kind.name, choices, usage=usage(requests, body.n, cache_report))
    requests = [service.make_request(ask) for ask in asks]

    sent_text, sent_tokens = {}, {}

    def event(index):
        request = requests[index]
        reason = request.finish_reason or {}
        if "status_code" in reason:
            return [{"error": error_body(reason["message"], reason["status_code"])}]
        first = index not in sent_text
        text = request.text[sent_text.get(index, 0) :]
        if first:
            text = _echo(service, body, index) + text
        sent_text[index] = len(request.text)
        known, logprobs = sent_tokens.get(index, 0), None
        sent_tokens[index] = len(request.output_logprobs)
        if known < sent_tokens[index]:
            logprobs = kind.logprobs(request, known)
        return [frame(request, kind.chunk_name, [each]) for each in kind.chunks(request, index, text, first, logprobs)]

    async def events():
        try:
            async for frames in interleave(service, asks, requests, event):
                for data in frames:
                    yield sse(data)
                if any("error" in data for data in frames):
                    break
            else:
                for choice in kind.endings(requests):
                    yield sse(frame(requests[0], kind.chunk_name, [choice]))
                if body.stream_options and body.stream_options.include_usage:
                    counts = usage(requests, body.n, cache_report)
                    yield sse(frame(requests[0], kind.chunk_name, [], usage=counts))
        except BadRequest as error:
            yield sse({"error": error_body(str(error), 400, "BadRequestError")})
        yield sse("[DONE]")

    return StreamingResponse(events(), media_type="text/event-stream")


def add_routes(app, service):
    """Mount both endpoints."""

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http_request: Request):
        asks = body.asks(
            body.prompts(),
            body.is_batch,
            body.max_tokens,
            return_logprob=body.logprobs is not None,
            top_logprobs_num=body.logprobs or 0,
        )
        return await _answer(service, _Completion, body, asks, http_request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http_request: Request):
        messages = [message.plain() for message in body.messages]
        try:
            text = service.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise BadRequest(f"messages do not fit the chat template: {error}") from None
        asks = body.asks(
            [text],
            False,
            body.max_completion_tokens or body.max_tokens,
            return_logprob=body.logprobs,
            top_logprobs_num=body.top_logprobs or 0,
        )
        return await _answer(service, _Chat, body, asks, http_request)
