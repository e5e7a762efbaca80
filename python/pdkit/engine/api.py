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
from pdkit.engine.service import Ask, error_body, meta_info, sse
from pdkit.engine.streams import interleave, run_to_end

HEALTH_TIMEOUT = 20.0


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
    extra_key: str | None = None

    @property
    def is_batch(self):
        prompts = self.text if self.text is not None else self.input_ids
        return isinstance(prompts, list) and not (prompts and isinstance(prompts[0], int))

    def asks(self):
        """One Ask a sequence, `n` of each prompt. Raises BadRequest."""
        if (self.text is None) == (self.input_ids is None):
            raise BadRequest("either text or input_ids must be given, and not both")
        prompts = self.text if self.text is not None else self.input_ids
        prompts = prompts if self.is_batch else [prompts]
        if not prompts:
            raise BadRequest("the batch is empty")
        params = [SamplingParams.parse(given) for given in _spread("sampling_params", self.sampling_params, len(prompts))]
        if len({each.n for each in params}) > 1:
            raise BadRequest("n must be the same for every prompt of a batch")
        samples = params[0].n
        count = len(prompts) * samples
        fields = {
            name: [value for value in _spread(name, getattr(self, name), len(prompts)) for _ in range(samples)]
            for name in ("return_logprob", "logprob_start_len", "top_logprobs_num", "bootstrap_host", "bootstrap_port")
        }
        rooms = openai_api.rooms(self.bootstrap_room, count)
        rids = self.rid if isinstance(self.rid, list) else [self.rid] + [None] * (count - 1)
        kind = "text" if self.text is not None else "ids"
        return [
            Ask(
                params=params[index // samples],
                **{kind: prompts[index // samples]},
                rid=rids[index] if index < len(rids) else None,
                return_logprob=bool(fields["return_logprob"][index]),
                logprob_start_len=-1 if fields["logprob_start_len"][index] is None else fields["logprob_start_len"][index],
                top_logprobs_num=fields["top_logprobs_num"][index] or 0,
                bootstrap_host=fields["bootstrap_host"][index],
                bootstrap_port=fields["bootstrap_port"][index],
                bootstrap_room=rooms[index],
                extra_key=self.extra_key,
            )
            for index in range(count)
        ]


def _spread(name, value, count):
    """A scalar for each of `count` sequences, or a list that already holds one each."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadRequest(f"{name} has {len(value)} entries for {count} prompts")
    return value


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
        body = error_body(str(error), 400) if request.url.path.startswith("/v1/") else {"error": {"message": str(error)}}
        return JSONResponse(body, HTTPStatus.BAD_REQUEST)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_, error):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return JSONResponse(error_body(f"{place}: {first['msg']}", 400) | {"type": "Bad Request"}, HTTPStatus.BAD_REQUEST)

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

    @app.get("/v1/models")
    async def models():
        name = service.options.model_name
        card = {"id": name, "object": "model", "created": int(started), "owned_by": "pdkit", "root": name}
        return {"object": "list", "data": [card | {"max_model_len": service.context_length}]}

    @app.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache(timeout: float = Query(0.0, ge=0.0)):
        if await service.flush_cache(timeout):
            return PlainTextResponse("Cache flushed.\n")
        return PlainTextResponse("Cache not flushed: requests are running.\n", HTTPStatus.BAD_REQUEST)

    @app.post("/abort_request")
    async def abort_request(body: dict[str, Any]):
        rid = body.get("rid")
        if not rid and not body.get("abort_all"):
            raise BadRequest("abort_request needs a rid, or abort_all")
        await service.abort(None if body.get("abort_all") else rid)
        return Response()

    @app.api_route("/generate", methods=["POST", "PUT"])
    async def generate(body: GenerateBody, http_request: Request):
        arrived, asks = time.time(), body.asks()
        if not body.stream:
            results = [_result(request, arrived) for request in await run_to_end(service, asks, http_request)]
            return results if body.is_batch or len(results) > 1 else results[0]
        requests = [service.make_request(ask) for ask in asks]

        async def events():
            try:
                async for index in interleave(service, asks, requests):
                    result = _result(requests[index], arrived)
                    yield sse(result if len(requests) == 1 and not body.is_batch else {"index": index, **result})
            except BadRequest as error:
                yield sse({"error": {"message": str(error), "type": "invalid_request_error", "code": 400}})
            yield sse("[DONE]")

        return StreamingResponse(events(), media_type="text/event-stream")

    openai_api.add_routes(app, service)
    return app
