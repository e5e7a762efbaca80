"""Running the sequences of one HTTP request: all to their end, or as events in the order they happen."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi import Request as HttpRequest

from pdkit.engine.request import Request
from pdkit.engine.sequences import Ask
from pdkit.engine.service import Service

DISCONNECT_POLL = 0.25


async def run_to_end(service: Service, asks: Sequence[Ask], http_request: HttpRequest) -> list[Request]:
    """The finished requests of `asks`. Raises BadRequest, or HTTPException for one that ended with an error status.

    The first that fails ends the others.
    """
    requests = [service.make_request(ask) for ask in asks]

    async def drain(request: Request, ask: Ask) -> None:
        async for _ in service.generate(request, ask, is_streamed=False):
            pass
        raise_if_failed(request)

    work = [asyncio.ensure_future(drain(request, ask)) for request, ask in zip(requests, asks)]
    pending = set(work)
    try:
        while pending:
            done, pending = await asyncio.wait(pending, timeout=DISCONNECT_POLL, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            if pending and await http_request.is_disconnected():
                raise HTTPException(499, "the client closed the connection")
    finally:
        await _end(work)
    return requests


async def _end(tasks: Iterable[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def raise_if_failed(request: Request) -> None:
    """HTTPException for a request that ended with an error status."""
    reason = request.finish_reason or {}
    if "status_code" in reason:
        raise HTTPException(reason["status_code"], reason["message"])


async def interleave(
    service: Service, asks: Sequence[Ask], requests: Sequence[Request], render: Callable[[int], Any]
) -> AsyncIterator[Any]:
    """Yields render(index) whenever requests[index] has something new, until all are finished: once when it is.

    The request is locked meanwhile: the torch thread may be about to give it the next token.
    """
    news: asyncio.Queue[tuple[int | None, Exception | None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async for _ in service.generate(requests[index], asks[index]):
                news.put_nowait((index, None))
            news.put_nowait((None, None))
        except Exception as error:
            news.put_nowait((None, error))

    pumps = [asyncio.ensure_future(pump(index)) for index in range(len(requests))]
    try:
        open_pumps = len(pumps)
        finished: set[int] = set()
        while open_pumps:
            index, error = await news.get()
            if error is not None:
                raise error
            if index is None:
                open_pumps -= 1
            if index is None or index in finished:
                continue
            with requests[index].lock:
                event = render(index)
                if requests[index].finish_reason is not None:
                    finished.add(index)
            yield event
    finally:
        await _end(pumps)
