"""SGLang's mini load balancer with a switch: `python3 -m pdkit.faults.load_balancer`, options of `launch_router`.

The balancer is the real one. Only its HTTP session is ours, one a request, and it may change what goes to prefill and
decode and what comes back (streams are passed on as they are).
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import aiohttp
from sglang_router import launch_router, mini_lb
from tokenizers import Tokenizer

from pdkit.faults.fault import Where
from pdkit.faults.messages import CONTRADICTIONS, LOST, Exchange, asks_for, first_token_repeated, of_each, without
from pdkit.faults.switch import Switch

DELAY_S = 0.05
CHANGES = ("answers-swapped", "first-token-repeated", *CONTRADICTIONS)


class Response:
    """An aiohttp response whose JSON is ours."""

    def __init__(self, response: Any, result: Any) -> None:
        self._response, self._result = response, result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._response, name)

    async def json(self) -> Any:
        return self._result


class StreamWithoutPiece:
    """An aiohttp response whose stream lacks its second event."""

    def __init__(self, response: Any) -> None:
        self._response, self.content = response, self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._response, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        kept, number = b"", 0
        async for chunk in self._response.content.iter_chunked(size):
            *whole, kept = (kept + chunk).split(b"\n\n")
            for event in whole:
                number += 1
                if number != 2:
                    yield event + b"\n\n"
        if kept:
            yield kept


class FaultySession:
    """An aiohttp session of one request: `post` is called for prefill first, then for decode."""

    switch: Switch
    rooms, answers = Exchange(), Exchange()
    background: ClassVar[set[asyncio.Task[None]]] = set()
    tokenizers: ClassVar[dict[str, Tokenizer]] = {}

    in_flight = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._session = aiohttp.ClientSession(*args, **kwargs)
        self._trick: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def __aenter__(self) -> Any:
        FaultySession.in_flight += 1
        await self._session.__aenter__()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        FaultySession.in_flight -= 1
        await self._session.__aexit__(*exception)

    async def post(self, url: str, *, json: Any = None, headers: Any = None) -> Any:
        side = "prefill" if url.startswith(tuple(mini_lb.lb.prefill_urls)) else "decode"
        if side == "prefill":
            self._trick = self._choose_trick()
        body = await self._request(side, url, json)
        response = await self._session.post(url, json=body, headers=headers)
        if side == "prefill" or self._trick is None:
            return response
        if self._trick == "failed-retried" and response.status >= 500:
            return (await self._again(self._session, url, body, headers))[1]
        if self._trick == "stream-piece-lost" and body.get("stream"):
            return StreamWithoutPiece(response)
        if self._trick in CHANGES and not body.get("stream"):
            return Response(response, await self._answer(await response.json()))
        return response

    def _choose_trick(self) -> str | None:
        """What is done to this request, or None. Swaps need two in a row."""
        injection = self.switch.injection(Where.LB)
        if injection is None:
            return None
        injection.is_met()
        pair = 2 if "swapped" in injection.fault.trick else 1
        begun = injection.seen - 1 - injection.fault.after
        if begun < 0 or begun % (pair * injection.fault.every) >= pair:
            return None
        self.switch.record()
        return injection.fault.trick

    async def _request(self, side: str, url: str, body: Any) -> Any:
        if side == "prefill":
            if self._trick == "prefill-late":
                await asyncio.sleep(DELAY_S)
            if self._trick == "request-retried":
                await self._duplicate(mini_lb.lb.decode_urls[0] + url.removeprefix(mini_lb.lb.prefill_urls[0]), body)
            return body
        if self._trick is not None and self._trick in LOST:
            return without(body, LOST[self._trick])
        if self._trick and "-lost-with-" in self._trick:
            lost, _, beside = self._trick.partition("-lost-with-")
            return without(body, LOST[f"{lost}-lost"]) if asks_for(body, beside) else body
        if self._trick == "rooms-swapped":
            room = body["bootstrap_room"]
            if isinstance(room, list):
                return body | {"bootstrap_room": room[::-1]}
            return body | {"bootstrap_room": await self.rooms.swap(room) if self.in_flight > 1 else room}
        if self._trick == "request-duplicated":
            task = asyncio.create_task(self._duplicate(url, body))
            self.background.add(task)
            task.add_done_callback(self.background.discard)
        return body

    async def _duplicate(self, decode_url: str, body: Any) -> None:
        body = {name: value for name, value in body.items() if name not in ("rid", "stream")}
        async with aiohttp.ClientSession() as session:
            for response in await self._again(session, decode_url, body):
                await response.read()

    @staticmethod
    async def _again(session: aiohttp.ClientSession, decode_url: str, body: Any, headers: Any = None) -> list[Any]:
        """What prefill and decode answer to the same request in another room."""
        room = body["bootstrap_room"]
        body = body | {"bootstrap_room": [each ^ 1 for each in room] if isinstance(room, list) else room ^ 1}
        endpoint = next(decode_url.removeprefix(url) for url in mini_lb.lb.decode_urls if decode_url.startswith(url))
        urls = mini_lb.lb.prefill_urls[0] + endpoint, decode_url
        return await asyncio.gather(*(session.post(url, json=body, headers=headers) for url in urls))

    async def _answer(self, result: Any) -> Any:
        if self._trick == "answers-swapped":
            return await self.answers.swap(result) if self.in_flight > 1 else result
        if self._trick is not None and self._trick in CONTRADICTIONS:
            return of_each(result, CONTRADICTIONS[self._trick])
        first_text = await self._first_text()
        return first_token_repeated(result, first_text)

    async def _first_text(self) -> Callable[[str], str]:
        """A function from a text to the text of its first token, by the tokenizer of the model that is served."""
        server = mini_lb.lb.prefill_urls[0]
        if server not in self.tokenizers:
            async with self._session.get(f"{server}/model_info") as response:
                path = Path((await response.json())["tokenizer_path"], "tokenizer.json")
            self.tokenizers[server] = Tokenizer.from_file(str(path))
        tokenizer = self.tokenizers[server]
        return lambda text: text[slice(*tokenizer.encode(text, add_special_tokens=False).offsets[0])]


def main(argv: Sequence[str] | None = None) -> None:
    FaultySession.switch = Switch.of_environment()
    mini_lb.aiohttp = SimpleNamespace(**{**vars(aiohttp), "ClientSession": FaultySession})
    launch_router.launch_router(launch_router.parse_router_args(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
