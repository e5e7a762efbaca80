"""OpenAI's completions and chat completions, in the shapes that SGLang answers with."""

import time
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from typing import Any, ClassVar, Literal

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from pydantic import Field, field_validator, model_validator

from pdkit.engine.fields import CHAT, COMPLETION, MESSAGE, SGLANG_CPU, STREAM_OPTIONS, BadRequest, Body, Fields
from pdkit.engine.openai_logprobs import chat_logprobs, completion_logprobs
from pdkit.engine.request import Request, SamplingParams
from pdkit.engine.sequences import Ask, fan_out
from pdkit.engine.service import WEIGHT_VERSION, Service, error_body, result, sse
from pdkit.engine.streams import interleave, run_to_end

SAMPLING = (
    "temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos", "skip_special_tokens", "no_stop_trim", "n",
)  # fmt: skip
ROUTING = ("rid", "extra_key", "bootstrap_host", "bootstrap_port", "bootstrap_room")
ROLES = ("user", "system", "assistant", "tool", "function", "developer", "latest_reminder", "root")


class StreamOptions(Body):
    others: ClassVar[Fields] = STREAM_OPTIONS

    include_usage: bool | None = False


class OpenAIBody(Body):
    """What both endpoints share."""

    model: str = "default"
    n: int = 1
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    rid: str | list[str] | None = None
    extra_key: str | list[str] | None = None
    bootstrap_host: str | list[str] | None = None
    bootstrap_port: int | list[int | None] | None = None
    bootstrap_room: int | list[int] | None = None
    # Without effect on an answer, as in SGLang started with the flags that this engine has; so are those below.
    user: str | None = None
    priority: int | None = None
    session_id: str | None = None

    def check(self, served_model: str) -> None:
        """Raises BadRequest for what this engine would have to ignore; `base:adapter` is a model with a LoRA."""
        self.refuse_unsupported()
        if self.stream_options is not None:
            self.stream_options.refuse_unsupported("stream_options.")
        if self.model != served_model and self.model.partition(":")[2].strip():
            raise BadRequest(
                f"the embedded engine does not support a LoRA adapter, as in model={self.model!r}; {SGLANG_CPU}",
                "model",
            )

    def asks(self, prompts: Sequence[Any], is_batch: bool, max_new_tokens: int | None, **logprobs: Any) -> list[Ask]:
        """One Ask a choice, in OpenAI's order."""
        given = {name: getattr(self, name) for name in SAMPLING}
        more = {"max_new_tokens": max_new_tokens, "stop": self.stop, "sampling_seed": self.seed}
        routing = {name: getattr(self, name) for name in ROUTING}
        return fan_out(prompts, SamplingParams.parse(given | more), is_batch, **routing, **logprobs)


class CompletionBody(OpenAIBody):
    others: ClassVar[Fields] = COMPLETION

    prompt: list[int] | list[list[int]] | str | list[str]
    max_tokens: int = Field(16, gt=0)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    custom_labels: dict[str, str] | None = None

    @property
    def is_batch(self) -> bool:
        return not isinstance(self.prompt, str) and not isinstance(self.prompt[0], int)

    def prompts(self) -> list[Any]:
        prompt = self.prompt
        if not prompt or (isinstance(prompt, list) and not all(each or each == 0 for each in prompt)):
            raise BadRequest("Prompt cannot be empty")
        return list(prompt) if self.is_batch else [prompt]

    @property
    def echo_logprobs(self) -> bool:
        """Whether the prompt's logprobs are asked for, too."""
        return self.echo and bool(self.logprobs)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    others: ClassVar[Fields] = MESSAGE

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None

    @field_validator("role")
    @classmethod
    def _known_role(cls, role: str) -> str:
        if role.lower() not in ROLES:
            raise ValueError(f"must be one of {', '.join(ROLES)}, not {role!r}")
        return role.lower()

    @model_validator(mode="after")
    def _user_says_something(self) -> "Message":
        if self.role == "user" and self.content is None:
            raise ValueError("content of a user's message is missing")
        return self

    def plain(self, place: int) -> dict[str, Any]:
        """As the chat template gets it. Raises BadRequest."""
        self.refuse_unsupported(f"messages.{place}.")
        content = self.content or ""
        if isinstance(content, list):
            content = " ".join(part.text for part in content)
        return self.model_dump() | {"content": content}


class ChatBody(OpenAIBody):
    others: ClassVar[Fields] = CHAT

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    return_meta_info: bool = False
    parallel_tool_calls: bool = True
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    return_flat_raw_top_logprobs_b64: bool = True


def usage(requests: Sequence[Request], samples: int, cache_report: bool) -> dict[str, Any]:
    """OpenAI's usage of the choices of one call; `samples` choices share a prompt."""
    prompt = sum(len(request.ids) for request in requests[::samples])
    completion = sum(len(request.output_ids) for request in requests)
    cached = sum(request.cached_tokens for request in requests[::samples])
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached} if cache_report else None,
        "reasoning_tokens": 0,
        "completion_tokens_details": None,
    }


class _Completion:
    """A streamed choice ends with its last text."""

    name = chunk_name = "text_completion"
    no_usage: dict[str, Any] = {"usage": None}
    logprobs = staticmethod(completion_logprobs)

    @staticmethod
    def whole(text: str) -> dict[str, Any]:
        return {"text": text}

    @staticmethod
    def chunks(request: Request, index: int, text: str, first: bool, logprobs: Any) -> list[dict[str, Any]]:
        return [_choice(index, {"text": text}, logprobs, request.finish_reason)]

    @staticmethod
    def endings(requests: Sequence[Request]) -> list[dict[str, Any]]:
        return []

    @staticmethod
    def last_usage(counts: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in counts.items() if value is not None}


class _Chat:
    """A streamed choice begins with its role; all end together, after the last text of any."""

    name, chunk_name = "chat.completion", "chat.completion.chunk"
    no_usage: dict[str, Any] = {}
    logprobs = staticmethod(chat_logprobs)

    @staticmethod
    def whole(text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "reasoning_content": None}}

    @staticmethod
    def chunks(request: Request, index: int, text: str, first: bool, logprobs: Any) -> list[dict[str, Any]]:
        opening = [_choice(index, _delta(role="assistant", content=""))] if first else []
        return opening + ([_choice(index, _delta(content=text), logprobs)] if text else [])

    @staticmethod
    def endings(requests: Sequence[Request]) -> list[dict[str, Any]]:
        return [_choice(index, _delta(), reason=each.finish_reason) for index, each in enumerate(requests)]

    @staticmethod
    def last_usage(counts: dict[str, Any]) -> dict[str, Any]:
        return counts


def _delta(**news: str) -> dict[str, Any]:
    return {"delta": {"reasoning_content": None, **news}}


def _choice(index: int, content: dict[str, Any], logprobs: Any = None, reason: dict[str, Any] | None = None) -> Any:
    reason = reason or {}
    return {
        "index": index,
        **content,
        "logprobs": logprobs,
        "finish_reason": reason.get("type"),
        "matched_stop": reason.get("matched"),
    }


def _echo(service: Service, body: Any, index: int) -> str:
    if not getattr(body, "echo", False):
        return ""
    prompt = body.prompts()[index // body.n]
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt, skip_special_tokens=True)


async def _answer(
    service: Service, kind: type[_Completion] | type[_Chat], body: Any, asks: list[Ask], http_request: HttpRequest
) -> Any:
    arrived, cache_report = time.time(), service.options.enable_cache_report
    created = int(arrived)
    with_prompt = getattr(body, "echo_logprobs", False)

    def frame(request: Request, name: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {"id": request.rid, "object": name, "created": created, "model": body.model, "choices": choices, **more}

    if not body.stream:
        requests = await run_to_end(service, asks, http_request)
        choices = [
            _choice(
                index,
                kind.whole(_echo(service, body, index) + request.text),
                kind.logprobs(request, 0, with_prompt) if request.return_logprob else None,
                request.finish_reason,
            )
            for index, request in enumerate(requests)
        ]
        if getattr(body, "return_meta_info", False):
            for choice, request in zip(choices, requests):
                choice["meta_info"] = result(request, arrived, with_text=True)["meta_info"]
        counts, metadata = usage(requests, body.n, cache_report), {"weight_version": WEIGHT_VERSION}
        return frame(requests[0], kind.name, choices, usage=counts, metadata=metadata)
    requests = [service.make_request(ask) for ask in asks]

    sent_text: dict[int, int] = {}
    sent_tokens: dict[int, int] = {}

    def event(index: int) -> list[dict[str, Any]]:
        request = requests[index]
        reason = request.finish_reason or {}
        if "status_code" in reason:
            status = HTTPStatus(reason["status_code"])
            return [{"error": error_body(reason["message"], status, status.name)}]
        first = index not in sent_text
        text = request.text[sent_text.get(index, 0) :]
        if first:
            text = _echo(service, body, index) + text
        sent_text[index] = len(request.text)
        known, logprobs = sent_tokens.get(index, 0), None
        sent_tokens[index] = len(request.output_logprobs)
        if known < sent_tokens[index]:
            logprobs = kind.logprobs(request, known, with_prompt and first)
        chunks = kind.chunks(request, index, text, first, logprobs)
        return [frame(request, kind.chunk_name, [each], **kind.no_usage) for each in chunks]

    async def events() -> AsyncIterator[str]:
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
                    counts = kind.last_usage(usage(requests, body.n, cache_report))
                    yield sse(frame(requests[0], kind.chunk_name, [], usage=counts))
        except BadRequest as error:
            yield sse({"error": error_body(str(error), 400, "BadRequestError")})
        yield sse("[DONE]")

    return StreamingResponse(events(), media_type="text/event-stream")


def add_routes(app: FastAPI, service: Service) -> None:
    """Mount both endpoints."""

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http_request: HttpRequest) -> Any:
        body.check(service.options.model_name)
        if body.echo_logprobs and service.mode != "null":
            raise BadRequest(
                f"a {service.mode} server does not support echo with logprobs: the prompt's logprobs stay with prefill, "
                "and SGLang's answer would omit them; use /generate with logprob_start_len=0 through the load balancer, or a monolithic server",
                "echo",
            )
        asks = body.asks(
            body.prompts(),
            body.is_batch,
            body.max_tokens,
            return_logprob=body.logprobs is not None,
            top_logprobs_num=body.logprobs or 0,
            logprob_start_len=0 if body.echo_logprobs else -1,
        )
        return await _answer(service, _Completion, body, asks, http_request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http_request: HttpRequest) -> Any:
        body.check(service.options.model_name)
        if body.stream and body.return_meta_info:
            raise BadRequest("return_meta_info is not supported with streaming", "return_meta_info")
        messages = [message.plain(place) for place, message in enumerate(body.messages)]
        try:
            text = service.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise BadRequest(f"messages do not fit the chat template: {error}", "messages") from None
        asks = body.asks(
            [text],
            False,
            body.max_completion_tokens or body.max_tokens,
            return_logprob=body.logprobs,
            top_logprobs_num=body.top_logprobs or 0,
        )
        return await _answer(service, _Chat, body, asks, http_request)
