"""SGLang's native HTTP surface: health, information, /generate, cache and abort."""

import asyncio
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, HTTPException, Query
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict

from pdkit.engine import openai_api
from pdkit.engine.fields import GENERATE, BadRequest, Body, Fields
from pdkit.engine.request import SamplingParams
from pdkit.engine.sequences import Ask, fan_out
from pdkit.engine.service import WEIGHT_VERSION, Service, error_body, result, sse
from pdkit.engine.streams import interleave, run_to_end

HEALTH_TIMEOUT = 20.0
SPREAD = (
    "rid", "return_logprob", "logprob_start_len", "top_logprobs_num", "bootstrap_host", "bootstrap_port",
    "bootstrap_room", "extra_key",
)  # fmt: skip


class GenerateBody(Body):
    """The body of /generate; a list of texts or of id lists is a batch. Types are strict, as in SGLang's contract."""

    model_config = ConfigDict(strict=True)
    others: ClassVar[Fields] = GENERATE

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool = False
    stream: bool = False
    bootstrap_host: str | list[str] | None = None
    bootstrap_port: int | list[int | None] | None = None
    bootstrap_room: int | list[int] | None = None
    extra_key: str | list[str] | None = None
    # Without effect on an answer, as in SGLang started with the flags that this engine has.
    log_metrics: bool = True
    no_logs: bool = False
    custom_labels: dict[str, str] | None = None
    conversation_id: str | None = None
    external_trace_header: dict[str, Any] | None = None
    received_time: float | None = None
    routing_key: str | None = None
    priority: int | None = None
    session_id: str | None = None
    bootstrap_pair_key: str | list[str | None] | None = None
    decode_tp_size: int | list[int | None] | None = None

    @property
    def prompts(self) -> Any:
        return self.text if self.text is not None else self.input_ids

    @property
    def is_batch(self) -> bool:
        prompts = self.prompts
        return isinstance(prompts, list) and not (prompts and isinstance(prompts[0], int))

    def asks(self) -> list[Ask]:
        """One Ask a sequence. Raises BadRequest."""
        self.refuse_unsupported()
        if (self.text is None) == (self.input_ids is None):
            raise BadRequest("either text or input_ids must be given, and not both")
        given = self.sampling_params
        return fan_out(
            self.prompts if self.is_batch else [self.prompts],
            [SamplingParams.parse(each) for each in given] if isinstance(given, list) else SamplingParams.parse(given),
            self.is_batch,
            **{name: getattr(self, name) for name in SPREAD},
        )


class AbortBody(BaseModel):
    """The body of /abort_request."""

    rid: str | None = None
    abort_all: bool = False


def create_app(service: Service) -> FastAPI:
    """The FastAPI application of one server."""
    app = FastAPI(title="pdkit.engine")
    started = time.time()

    @app.exception_handler(HTTPException)
    async def on_http_error(_: HttpRequest, error: HTTPException) -> Response:
        return JSONResponse(error_body(error.detail, error.status_code), error.status_code)

    @app.exception_handler(BadRequest)
    async def on_bad_request(request: HttpRequest, error: BadRequest) -> Response:
        body: dict[str, Any] = {"error": {"message": str(error)}}
        if request.url.path.startswith("/v1/"):
            body = error_body(str(error), 400, "BadRequestError", error.field)
        return JSONResponse(body, HTTPStatus.BAD_REQUEST)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: HttpRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return JSONResponse(error_body(f"{place}: {first['msg']}", 400, "Bad Request"), HTTPStatus.BAD_REQUEST)

    @app.get("/health")
    @app.get("/health_generate")
    async def health() -> Response:
        try:
            await asyncio.wait_for(service.forward_one_token(), HEALTH_TIMEOUT)
        except asyncio.TimeoutError:
            return Response(status_code=HTTPStatus.SERVICE_UNAVAILABLE)
        return Response()

    @app.get("/model_info")
    @app.get("/get_model_info")
    async def model_info() -> dict[str, Any]:
        options = service.options
        return {
            "model_path": options.model_path,
            "served_model_name": options.model_name,
            "tokenizer_path": options.model_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": WEIGHT_VERSION,
            "load_format": options.load_format,
            "reasoning_parser": None,
            "tool_call_parser": None,
            "disaggregation_mode": options.disaggregation_mode,
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": service.config.model_type,
            "architectures": service.config.architectures,
        }

    @app.get("/server_info")
    @app.get("/get_server_info")
    async def server_info() -> dict[str, Any]:
        return service.server_info()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        name = service.options.model_name
        card = {
            "id": name, "object": "model", "created": int(started), "owned_by": "pdkit", "root": name, "parent": None,
            "max_model_len": service.context_length,
        }  # fmt: skip
        return {"object": "list", "data": [card]}

    @app.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache(timeout: float = Query(0.0, ge=0.0)) -> Response:
        if await service.flush_cache(timeout):
            return PlainTextResponse("Cache flushed.\n")
        return PlainTextResponse("Cache not flushed: requests are running.\n", HTTPStatus.BAD_REQUEST)

    @app.post("/abort_request")
    async def abort_request(body: AbortBody) -> Response:
        service.abort([each for each in service.running.values() if body.abort_all or each.rid == body.rid])
        return Response()

    @app.api_route("/generate", methods=["POST", "PUT"])
    async def generate(body: GenerateBody, http_request: HttpRequest) -> Any:
        arrived, with_text = time.time(), body.return_text_in_logprobs
        if not body.stream:
            requests = await run_to_end(service, body.asks(), http_request)
            results = [result(request, arrived, with_text) for request in requests]
            return results if body.is_batch or len(results) > 1 else results[0]

        async def events() -> AsyncIterator[str]:
            try:
                asks = body.asks()
                requests = [service.make_request(ask) for ask in asks]
                alone = len(requests) == 1 and not body.is_batch

                def chunk(index: int) -> str:
                    shown = result(requests[index], arrived, with_text)
                    return sse(shown if alone else {"index": index, **shown})

                async for event in interleave(service, asks, requests, chunk):
                    yield event
            except BadRequest as error:
                detail = {"message": str(error), "type": "invalid_request_error", "code": 400, "retryable": False}
                yield sse({"error": detail})
            yield sse("[DONE]")

        return StreamingResponse(events(), media_type="text/event-stream")

    openai_api.add_routes(app, service)
    return app
