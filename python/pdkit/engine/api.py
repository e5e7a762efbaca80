"""SGLang's native HTTP surface: health, information, /generate, cache and abort."""

import asyncio
import time
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel

from pdkit.engine import openai_api
from pdkit.engine.request import BadRequest, SamplingParams
from pdkit.engine.sequences import fan_out
from pdkit.engine.service import error_body, meta_info, sse
from pdkit.engine.streams import interleave, run_to_end

HEALTH_TIMEOUT = 20.0
SPREAD = (
    "rid", "return_logprob", "logprob_start_len", "top_logprobs_num", "bootstrap_host", "bootstrap_port",
    "bootstrap_room", "extra_key",
)  # fmt: skip


class GenerateBody(BaseModel):
    """The body of /generate; a list of texts or of id lists is a batch."""

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

    @property
    def is_batch(self):
        prompts = self.text if self.text is not None else self.input_ids
        return isinstance(prompts, list) and not (prompts and isinstance(prompts[0], int))

    def asks(self):
        """One Ask a sequence. Raises BadRequest."""
        if (self.text is None) == (self.input_ids is None):
            raise BadRequest("either text or input_ids must be given, and not both")
        prompts = self.text if self.text is not None else self.input_ids
        given = self.sampling_params
        return fan_out(
            prompts if self.is_batch else [prompts],
            [SamplingParams.parse(each) for each in given] if isinstance(given, list) else SamplingParams.parse(given),
            self.is_batch,
            **{name: getattr(self, name) for name in SPREAD},
        )


class AbortBody(BaseModel):
    """The body of /abort_request."""

    rid: str | None = None
    abort_all: bool = False


def _result(request, started):
    return {"text": request.text, "output_ids": list(request.output_ids), "meta_info": meta_info(request, started)}


def create_app(service):
    """The FastAPI application of one server."""
    app = FastAPI(title="pdkit.engine")
    started = time.time()

    @app.exception_handler(HTTPException)
    async def on_http_error(_, error):
        return JSONResponse(error_body(error.detail, error.status_code), error.status_code)

    @app.exception_handler(BadRequest)
    async def on_bad_request(request: Request, error):
        body = {"error": {"message": str(error)}}
        if request.url.path.startswith("/v1/"):
            body = error_body(str(error), 400, "BadRequestError")
        return JSONResponse(body, HTTPStatus.BAD_REQUEST)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_, error):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return JSONResponse(error_body(f"{place}: {first['msg']}", 400, "Bad Request"), HTTPStatus.BAD_REQUEST)

    @app.get("/health")
    @app.get("/health_generate")
    async def health():
        try:
            await asyncio.wait_for(service.forward_one_token(), HEALTH_TIMEOUT)
        except asyncio.TimeoutError:
            return Response(status_code=HTTPStatus.SERVICE_UNAVAILABLE)
        return Response()

    @app.get("/model_info")
    @app.get("/get_model_info")
    async def model_info():
        options = service.options
        return {
            "model_path": options.model_path,
            "served_model_name": options.model_name,
            "tokenizer_path": options.model_path,
            "is_generation": True,
            "weight_version": "default",
            "load_format": options.load_format,
            "disaggregation_mode": options.disaggregation_mode,
            "model_type": service.config.model_type,
            "architectures": service.config.architectures,
        }

    @app.get("/server_info")
    @app.get("/get_server_info")
    async def server_info():
        return service.server_info()

    model_name = service.options.model_name
    card = {
        "id": model_name, "object": "model", "created": int(started), "owned_by": "pdkit", "root": model_name,
        "parent": None, "max_model_len": service.context_length,
    }  # fmt: skip

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str):
        if model == model_name:
            return card
        error = {
            "message": f"The model {model!r} does not exist", "type": "invalid_request_error", "param": "model",
            "code": "model_not_found",
        }  # fmt: skip
        return JSONResponse({"error": error}, HTTPStatus.NOT_FOUND)

    @app.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache(timeout: float = Query(0.0, ge=0.0)):
        if await service.flush_cache(timeout):
            return PlainTextResponse("Cache flushed.\n")
        return PlainTextResponse("Cache not flushed: requests are running.\n", HTTPStatus.BAD_REQUEST)

    @app.post("/abort_request")
    async def abort_request(body: AbortBody):
        service.abort([each for each in service.running.values() if body.abort_all or each.rid == body.rid])
        return Response()

    @app.api_route("/generate", methods=["POST", "PUT"])
    async def generate(body: GenerateBody, http_request: Request):
        arrived = time.time()
        if not body.stream:
            asks = body.asks()
            results = [_result(request, arrived) for request in await run_to_end(service, asks, http_request)]
            return results if body.is_batch or len(results) > 1 else results[0]

        async def events():
            try:
                asks = body.asks()
                requests = [service.make_request(ask) for ask in asks]

                def chunk(index):
                    result = _result(requests[index], arrived)
                    return sse(result if len(requests) == 1 and not body.is_batch else {"index": index, **result})

                async for event in interleave(service, asks, requests, chunk):
                    yield event
            except BadRequest as error:
                detail = {"message": str(error), "type": "invalid_request_error", "code": 400, "retryable": False}
                yield sse({"error": detail})
            yield sse("[DONE]")

        return StreamingResponse(events(), media_type="text/event-stream")

    openai_api.add_routes(app, service)
    return app
