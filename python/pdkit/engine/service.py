"""From a parsed HTTP request to results: tokenization, limits, and the roles of prefill and decode."""

import asyncio
import concurrent.futures
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, replace
from socket import socket
from typing import Any

from pdkit.engine import prefix_cache, state
from pdkit.engine.fields import BadRequest
from pdkit.engine.model_runner import ModelRunner
from pdkit.engine.options import EngineOptions
from pdkit.engine.prefix_cache import PrefixCache
from pdkit.engine.request import Request, Scored, finish
from pdkit.engine.scheduler import Scheduler
from pdkit.engine.sequences import Ask
from pdkit.engine.transfer import (
    DecodeReceiver,
    KVTransfer,
    OpenRoom,
    PrefillSender,
    TransferCounters,
    TransferError,
    load_backend,
)

ABORTED = "the request was aborted"
WEIGHT_VERSION = "default"


class Service:
    """Everything of one server but HTTP. `model`, `tokenizer`: transformers'; `options`: EngineOptions."""

    def __init__(self, options: EngineOptions, model: Any, tokenizer: Any) -> None:
        self.options, self.config, self.tokenizer = options, model.config, tokenizer
        self.context_length = options.context_length or self.config.max_position_embeddings
        self.eos_ids = _eos_ids(self.config, tokenizer)
        cached = not (options.disable_radix_cache or self.mode == "decode")
        cache = PrefixCache(options.chunked_prefill_size) if cached else None
        self.scheduler = Scheduler(ModelRunner(model, options.chunked_prefill_size), cache)
        backend = load_backend(options.disaggregation_transfer_backend)
        self.sender = PrefillSender(backend, options.bootstrap_timeout, options.transfer_timeout)
        self.receiver = DecodeReceiver(backend, options.transfer_timeout)
        self.running: dict[str, Request] = {}

    @property
    def mode(self) -> str:
        return self.options.disaggregation_mode

    async def start(self, bootstrap_socket: socket | None = None) -> None:
        self.scheduler.start()
        if bootstrap_socket is not None:
            await self.sender.start(bootstrap_socket)

    async def on_torch_thread(self, action: Callable[[], Any]) -> Any:
        """The result of action(), run between two steps of the model."""
        future, deliver = _result_of_another_thread()
        self.scheduler.call(action, deliver)
        return await future

    async def forward_one_token(self) -> None:
        """A minimal forward pass, outside every counter and cache: is the model alive?"""
        cache = state.new_cache(self.config)
        await self.on_torch_thread(lambda: self.scheduler.runner.prefill_step([0], cache, 0))

    async def flush_cache(self, timeout: float) -> bool:
        """True once the prefix cache is empty; False if requests are still running after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.running:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        if self.scheduler.prefix_cache is not None:
            await self.on_torch_thread(self.scheduler.prefix_cache.clear)
        return True

    def abort(self, requests: Sequence[Request]) -> None:
        """End running requests, then free their rooms: all at the next step of the model, for which nobody waits."""
        loop = asyncio.get_running_loop()

        def free_rooms(_: Any) -> None:
            for request in requests:
                loop.call_soon_threadsafe(self.sender.close, request.room, ABORTED)

        def end() -> None:
            for request in requests:
                request.abort(ABORTED)

        self.scheduler.call(end, free_rooms)

    def server_info(self) -> dict[str, Any]:
        """SGLang's keys where it has the key, then this engine's own.

        page_size: the tokens that the prefix cache counts in. max_total_num_tokens: of how many tokens it keeps the
        state at most; running requests have no limit.
        """
        counters = self.sender.counters if self.mode == "prefill" else self.receiver.counters
        return {
            **asdict(self.options),
            "context_length": self.context_length,
            "page_size": self.options.chunked_prefill_size,
            "max_total_num_tokens": self.options.chunked_prefill_size * prefix_cache.CAPACITY,
            "internal_states": [{"running_requests": len(self.running)}],
            "engine": {"name": "pdkit.engine", **asdict(self.scheduler.counters)},
            "transfer": asdict(counters if self.mode != "null" else TransferCounters()),
            "rooms": len(self.sender.rooms),
            "sending": self.sender.sending,
            "received_from": dict(self.receiver.received_from),
        }

    def make_request(self, ask: Ask) -> Request:
        """A Request, checked against the limits of the model. Raises BadRequest."""
        ids = ask.ids if ask.ids is not None else self.tokenizer(ask.text)["input_ids"]
        if not ids:
            raise BadRequest("the prompt is empty")
        if not all(isinstance(token, int) and 0 <= token < self.config.vocab_size for token in ids):
            raise BadRequest(f"input_ids must be token ids from 0 to {self.config.vocab_size - 1}")
        if len(ids) >= self.context_length:
            raise BadRequest(
                f"The input ({len(ids)} tokens) is longer than the model's context length "
                f"({self.context_length} tokens)."
            )
        params = ask.params
        room_left = self.context_length - len(ids)
        if params.max_new_tokens is None:
            params = replace(params, max_new_tokens=room_left)
        elif params.max_new_tokens > room_left:
            raise BadRequest(
                f"Requested token count exceeds the model's maximum context length of {self.context_length} tokens: "
                f"{len(ids)} in the prompt and {params.max_new_tokens} to generate."
            )
        if self.mode == "prefill":
            params = replace(params, max_new_tokens=1)
        if ask.top_logprobs_num < 0:
            raise BadRequest(f"top_logprobs_num must be at least 0, got {ask.top_logprobs_num}")
        start = ask.logprob_start_len
        if not -1 <= start <= len(ids):
            raise BadRequest(f"logprob_start_len {start} is outside the prompt of {len(ids)} tokens")
        request = Request(
            ids=ids,
            params=params,
            tokenizer=self.tokenizer,
            eos_ids=self.eos_ids,
            return_logprob=ask.return_logprob,
            logprob_start_len=len(ids) if start == -1 else start,
            top_logprobs_num=ask.top_logprobs_num,
            extra_key=ask.extra_key,
            room=ask.bootstrap_room,
        )
        if ask.rid:
            request.rid = ask.rid
        if request.rid in self.running:
            raise BadRequest(f"a request with id {request.rid!r} is already running")
        return request

    async def generate(self, request: Request, ask: Ask, is_streamed: bool = True) -> AsyncIterator[None]:
        """Yields whenever `request` has something new; the last time, or where not `is_streamed` once, it is finished.

        Leaving the generator early (the client went away) aborts the request and frees its room.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        if is_streamed:
            request.notify = lambda: loop.call_soon_threadsafe(news.set)
        self.running[request.rid] = request
        serve = {"null": self._monolithic, "prefill": self._prefill, "decode": self._decode}[self.mode]
        work = asyncio.ensure_future(serve(request, ask))
        work.add_done_callback(lambda _: news.set())
        try:
            while True:
                await news.wait()
                news.clear()
                if work.done():
                    work.result()
                    yield
                    return
                if request.finish_reason is None:
                    yield
        finally:
            if not work.done():
                work.cancel()
                self.scheduler.call(lambda: request.abort(ABORTED))
            self.running.pop(request.rid, None)

    async def _finished(self, request: Request) -> None:
        done = asyncio.Event()
        loop, notify = asyncio.get_running_loop(), request.notify

        def wake() -> None:
            notify()
            if request.finish_reason is not None:
                loop.call_soon_threadsafe(done.set)

        request.notify = wake
        if request.finish_reason is None:
            await done.wait()

    async def _monolithic(self, request: Request, ask: Ask) -> None:
        waiting = asyncio.ensure_future(self._finished(request))
        await asyncio.sleep(0)
        self.scheduler.generate(request)
        await waiting

    async def _prefill(self, request: Request, ask: Ask) -> None:
        if ask.bootstrap_room is None:
            raise BadRequest("a prefill server needs a bootstrap_room: send requests through the load balancer")
        opened = await self._open_room(ask.bootstrap_room)
        try:
            kv_transfer = await self._compute_transfer(request, ask.bootstrap_room)
            if kv_transfer is None:
                return
            await self.sender.deliver(kv_transfer)
            request.finish_reason = finish("length", length=0)
        except TransferError as error:
            message = ABORTED if request.is_aborted else str(error)
            request.finish_reason = finish("abort", message=message, status_code=500)
        finally:
            self.sender.close(ask.bootstrap_room, ABORTED, opened)

    async def _open_room(self, room: int) -> OpenRoom:
        try:
            return await self.sender.open(room)
        except TransferError as error:
            raise BadRequest(str(error)) from None

    async def _compute_transfer(self, request: Request, room: int) -> KVTransfer | None:
        """The KVTransfer, or None if the request was aborted meanwhile."""
        future, deliver = _result_of_another_thread()
        self.scheduler.prefill(request, lambda _, cache: deliver(cache))
        cache = await future
        if cache is None:
            return None
        tensors, counts = state.tensors_of(cache)
        logprob, _ = request.output_logprobs[0] if request.return_logprob else (None, None)
        return KVTransfer(
            room=room,
            prompt_tokens=len(request.ids),
            first_token=request.output_ids[0],
            cached_tokens=request.cached_tokens,
            counts=counts,
            tensors=tensors,
            first_logprob=logprob,
            first_top_logprobs=request.output_top_logprobs[0] if request.return_logprob else [],
        )

    async def _decode(self, request: Request, ask: Ask) -> None:
        if ask.bootstrap_room is None or not ask.bootstrap_host:
            raise BadRequest(
                "a decode server needs bootstrap_host and bootstrap_room: send requests through the load balancer"
            )

        def accept(kv_transfer: KVTransfer) -> None:
            if kv_transfer.prompt_tokens != len(request.ids):
                raise TransferError(
                    f"the transfer is of a prompt of {kv_transfer.prompt_tokens} tokens, this one has {len(request.ids)}"
                )
            if not (isinstance(kv_transfer.first_token, int) and 0 <= kv_transfer.first_token < self.config.vocab_size):
                raise TransferError(
                    f"the first token of the KV transfer is {kv_transfer.first_token!r}, which is no token"
                )
            state.check(self.config, len(request.ids), kv_transfer.tensors, kv_transfer.counts)

        fetching = asyncio.ensure_future(
            self.receiver.fetch(
                ask.bootstrap_host.strip("[]"),
                ask.bootstrap_port or self.options.disaggregation_bootstrap_port,
                ask.bootstrap_room,
                accept,
            )
        )
        waiting = asyncio.ensure_future(self._finished(request))
        try:
            await asyncio.wait({fetching, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not fetching.done():
                return
            kv_transfer = fetching.result()
            self.scheduler.call(lambda: self._continue(request, kv_transfer))
            await waiting
        except TransferError as error:
            request.finish_reason = finish("abort", message=f"KV transfer failed: {error}", status_code=500)
        finally:
            fetching.cancel()
            waiting.cancel()
            await asyncio.gather(fetching, waiting, return_exceptions=True)

    def _continue(self, request: Request, kv_transfer: KVTransfer) -> None:
        """On the torch thread: take the first token and the state, and step on from there."""
        if request.finish_reason is None:
            request.cached_tokens = kv_transfer.cached_tokens
            request.add_output(kv_transfer.first_token, kv_transfer.first_logprob, kv_transfer.first_top_logprobs)
        self.scheduler.decode(request, state.restore(self.config, kv_transfer.tensors, kv_transfer.counts))


def _result_of_another_thread() -> tuple[asyncio.Future[Any], Callable[[Any], None]]:
    """A future of this loop, and what another thread calls to give it its result: also where nobody waits any more."""
    result: concurrent.futures.Future[Any] = concurrent.futures.Future()
    result.set_running_or_notify_cancel()
    return asyncio.wrap_future(result), result.set_result


def _eos_ids(config: Any, tokenizer: Any) -> frozenset[int]:
    eos = config.eos_token_id
    ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    return frozenset(ids - {None})


def result(request: Request, arrived: float, with_text: bool = False) -> dict[str, Any]:
    """SGLang's answer to /generate. arrived: time.time() of the request; with_text: logprobs name their tokens."""
    info: dict[str, Any] = {
        "id": request.rid,
        "finish_reason": request.finish_reason,
        "prompt_tokens": len(request.ids),
        "weight_version": WEIGHT_VERSION,
        "num_retractions": 0,
        "reasoning_tokens": 0,
        "completion_tokens": len(request.output_ids),
        "cached_tokens": request.cached_tokens,
    }
    if request.finish_reason is not None:
        info["e2e_latency"] = time.time() - arrived
    if request.return_logprob:

        def told(pairs: Sequence[Scored] | None) -> list[tuple[float | None, int, str | None]] | None:
            if pairs is None:
                return None
            tokens = [token for _, token in pairs]
            texts = request.tokenizer.batch_decode([[token] for token in tokens]) if with_text else [None] * len(tokens)
            return [(logprob, token, text) for (logprob, token), text in zip(pairs, texts)]

        info["input_token_logprobs"] = told(request.input_logprobs)
        info["output_token_logprobs"] = told(request.output_logprobs)
        info["output_token_logprobs_length"] = len(request.output_logprobs)
        if request.top_logprobs_num:
            info["input_top_logprobs"] = [told(row) for row in request.input_top_logprobs]
            info["output_top_logprobs"] = [told(row) for row in request.output_top_logprobs]
    return {"text": request.text, "output_ids": list(request.output_ids), "meta_info": info}


def error_body(message: str, status: int, kind: str | None = None, param: str | None = None) -> dict[str, Any]:
    """SGLang's error object."""
    return {"object": "error", "message": message, "type": kind or str(status), "param": param, "code": status}


def sse(data: Any) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"
