"""Faults of a server itself, beside the transfer: wraps classes of the embedded engine in the process of a server."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from pdkit.engine import state
from pdkit.engine.options import EngineOptions
from pdkit.engine.prefix_cache import PrefixCache
from pdkit.engine.request import Request, finish
from pdkit.engine.scheduler import Scheduler
from pdkit.engine.sequences import ROOMS
from pdkit.engine.service import Service
from pdkit.engine.transfer import DecodeReceiver, PrefillSender, TransferError
from pdkit.faults.fault import Context, Injection, Where
from pdkit.faults.switch import Switch

CHUNK = EngineOptions.chunked_prefill_size

_kept: list[Any] = []  # what a server that leaks never lets go of


def _came(future: asyncio.Future[Any]) -> bool:
    """Whether a future has a result."""
    return future.done() and not future.cancelled() and future.exception() is None


class FaultyServer:
    """Asks `switch` at each request whether this server is to go wrong, and how."""

    _installed: ClassVar[FaultyServer | None] = None

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self.fetching = 0  # transfers that are awaited

    @classmethod
    def install(cls, switch: Switch) -> None:
        """From now on the engine's classes of this process ask `switch` first, in place of an earlier one."""
        if cls._installed is not None:
            cls._installed.switch = switch
            return
        server = cls._installed = cls(switch)
        PrefixCache._key = staticmethod(server._key(PrefixCache._key))  # type: ignore[method-assign]
        cls._wrap(Scheduler, "prefill", server._silent("prefill-silent"))
        cls._wrap(Scheduler, "decode", server._silent("decode-silent"))
        cls._wrap(DecodeReceiver, "fetch", server._fetch)
        cls._wrap(PrefillSender, "close", server._close)
        cls._wrap(Service, "_continue", server._continue)
        cls._wrap(Service, "_decode", server._decode)
        cls._wrap(Request, "_update_text_and_finish", server._finish)

    @staticmethod
    def _wrap(cls: type, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(cls, name)

        def method(instance: Any, *args: Any, **kwargs: Any) -> Any:
            return wrapper(original, instance, *args, **kwargs)

        setattr(cls, name, method)

    def _injection(self, trick: str) -> Injection | None:
        injection = self.switch.injection(Where.SERVER)
        return injection if injection and injection.fault.trick == trick else None

    def _met(self, trick: str) -> Injection | None:
        """The run of the fault, where this request is one that it meets."""
        injection = self._injection(trick)
        if injection is None or not injection.is_met():
            return None
        self.switch.record()
        return injection

    def _silent(self, trick: str) -> Callable[..., Any]:
        def wrapper(original: Callable[..., Any], scheduler: Scheduler, *args: Any) -> Any:
            return None if self._met(trick) else original(scheduler, *args)

        return wrapper

    def _key(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def key(ids: Sequence[int], length: int, extra_key: str | None) -> tuple[Any, ...]:
            injection = self._met("chunk-filed-early")
            if injection is None:
                return original(ids, length, extra_key)
            return (*original(ids, length - CHUNK + int(injection.fault.size), extra_key), length)

        return key

    async def _fetch(self, original: Callable[..., Any], receiver: DecodeReceiver, *args: Any) -> Any:
        if injection := self._met("memory-kept"):
            _kept.append(b"\1" * int(injection.fault.size))
        room = args[2]
        late = self._injection("samples-late")
        if late and room >= ROOMS and self.fetching >= late.fault.size and self._met("samples-late"):
            while self._injection("samples-late"):  # its harm ends with it: what comes next must not meet it
                await asyncio.sleep(0.1)
            raise TransferError("the fault that held this sample is over")
        self.fetching += 1
        shifts = self._injection("entries-shifted")
        try:
            kv_transfer = await original(receiver, *args)
        except asyncio.CancelledError:
            if shifts:
                shifts.is_met()  # what it counts are aborts
            raise
        finally:
            self.fetching -= 1
        if shifts and shifts.met and shifts.fault.change:
            self.switch.record()
            return shifts.fault.change(kv_transfer, Context(deque(), np.random.default_rng(0)))
        return kv_transfer

    def _close(
        self, original: Callable[..., Any], sender: PrefillSender, room_id: int, reason: str, opened: Any = None
    ) -> None:
        room = sender.rooms.get(room_id)
        if room is not None and not _came(room.outcome) and _came(room.payload) and self._met("failed-rooms-kept"):
            _kept.append(room.payload.result())
        original(sender, room_id, reason, opened)

    def _continue(self, original: Callable[..., Any], service: Service, request: Request, kv_transfer: Any) -> None:
        injection = self._injection("decode-computes")
        if injection and len(request.ids) >= injection.fault.size and self._met("decode-computes"):
            cache = state.new_cache(service.config)
            while cache.get_seq_length() < len(request.ids):
                logits = service.scheduler.runner.prefill_step(request.ids, cache, len(request.ids) - 1)
            tensors, counts = state.tensors_of(cache)
            kv_transfer = replace(kv_transfer, tensors=tensors, counts=counts, first_token=int(logits[-1].argmax()))
        original(service, request, kv_transfer)

    async def _decode(self, original: Callable[..., Any], service: Service, request: Request, ask: Any) -> None:
        try:
            await original(service, request, ask)
        finally:
            aborted = request.output_ids and (request.is_aborted or request.finish_reason is None)
            if aborted and (injection := self._met("aborted-kept")):
                _kept.append(b"\1" * int(injection.fault.size))
        failed = request.is_aborted and "KV transfer failed" in (request.finish_reason or {}).get("message", "")
        if failed and self._met("failed-receive-answered"):
            request.finish_reason = finish("stop", matched=None)

    def _finish(self, original: Callable[..., Any], request: Request, token: int) -> None:
        injection = self._injection("stop-ignored") if request.room is not None else None
        params = request.params
        ends = params.stop or not params.ignore_eos
        if injection and ends and params.max_new_tokens != 1 and len(request.output_ids) == injection.fault.size:
            self._met("stop-ignored")
            request.params = replace(params, stop=(), ignore_eos=True)
            try:
                original(request, token)
            finally:
                request.params = params
        else:
            original(request, token)
