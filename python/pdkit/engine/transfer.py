"""The KV transfer of a request's state from prefill to decode, over TCP.

Prefill listens on its bootstrap port. Decode connects, names a bootstrap room and waits; prefill answers when the
room's state is ready, decode verifies it and acknowledges. Every message is one JSON line; the state follows its line:

    decode  -> {"room": int}
    prefill -> {"bytes": int, "sha256": hex} + that many bytes | {"error": str}
    decode  -> {} | {"error": str}

The bytes are safetensors: the tensors of `state.tensors_of`, everything else as one JSON metadata entry.
`TransferBackend` is the one interface between servers and this module: a subclass named by
`--disaggregation-transfer-backend module:Class` sees every KV transfer before it is packed, as bytes, and after.
"""

import asyncio
import hashlib
import importlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from socket import socket
from typing import Any

import safetensors
import safetensors.torch
import torch

LINE_LIMIT = 1 << 16


class TransferError(Exception):
    """A KV transfer that did not happen; the message is for the client that waits for it."""


@dataclass
class KVTransfer:
    """What decode needs of a request: its state after the prompt and its first output token.

    tensors, counts: see `state.tensors_of`. first_logprob: log P of the first token (None unless asked for);
    first_top_logprobs: [(logprob, token id), ...]; cached_tokens: prompt tokens that prefill took from its cache.
    """

    room: int
    prompt_tokens: int
    first_token: int
    cached_tokens: int
    counts: dict[str, int]
    tensors: dict[str, torch.Tensor] = field(repr=False)
    first_logprob: float | None = None
    first_top_logprobs: list[tuple[float | None, int]] = field(default_factory=list)

    def pack(self) -> bytes:
        meta = asdict(replace(self, tensors={})) | {"tensors": None}
        return safetensors.torch.save(self.tensors, {"kv_transfer": json.dumps(meta)})

    @classmethod
    def unpack(cls, data: bytes) -> "KVTransfer":
        try:
            header_size = int.from_bytes(data[:8], "little")
            meta = json.loads(json.loads(data[8 : 8 + header_size])["__metadata__"]["kv_transfer"])
            tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}
            top = [tuple(item) for item in meta["first_top_logprobs"]]
            return cls(**meta | {"tensors": tensors, "first_top_logprobs": top})
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise TransferError(f"the KV transfer cannot be read: {error}") from None


class TransferBackend:
    """Plain TCP, and the places where a subclass can stand in the way of a KV transfer.

    `outgoing` sees it on prefill before it is packed (returning None sends nothing: the room never becomes ready),
    `wire` its bytes after the checksum was taken, `incoming` on decode after the checksum was verified. `pieces` says
    when they leave: it may wait before and between the pieces that it yields.
    """

    def outgoing(self, kv_transfer: KVTransfer) -> KVTransfer | None:
        return kv_transfer

    def wire(self, data: bytes) -> bytes:
        return data

    async def pieces(self, data: bytes) -> AsyncIterator[bytes]:
        yield self.wire(data)

    def incoming(self, kv_transfer: KVTransfer) -> KVTransfer:
        return kv_transfer


def load_backend(name: str) -> TransferBackend:
    """`tcp`, or a subclass of TransferBackend as `module:Class`. Raises ValueError with one line for the user."""
    if name == "tcp":
        return TransferBackend()
    module, _, attribute = name.partition(":")
    try:
        backend = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"unknown transfer backend {name!r} ({error}); use tcp or module:Class") from None
    if not isinstance(backend, TransferBackend):
        raise ValueError(f"transfer backend {name!r} is not a pdkit.engine.transfer.TransferBackend")
    return backend


@dataclass
class TransferCounters:
    """What happened to the KV transfers of one server.

    bytes, seconds: of those that arrived; from ready to acknowledged on prefill, from first byte to accepted on decode.
    """

    sent: int = 0
    received: int = 0
    failed: int = 0
    bytes: int = 0
    seconds: float = field(default=0.0, compare=False)


async def _read_message(reader: asyncio.StreamReader) -> dict[str, Any]:
    """Raises ConnectionError for anything but one line with a JSON object."""
    message = None
    try:
        line = await reader.readline()
        if not line:
            raise ConnectionError("the peer closed the connection")
        message = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        pass
    if not isinstance(message, dict):
        raise ConnectionError("the peer's message is not understood")
    return message


def _write_line(writer: asyncio.StreamWriter, **message: Any) -> None:
    writer.write(json.dumps(message).encode() + b"\n")


def _fail(future: asyncio.Future[Any], message: str) -> None:
    """Whoever waits for `future`, now or later, gets a TransferError; nobody has to."""
    if not future.done():
        future.set_exception(TransferError(message))
        future.exception()


class OpenRoom:
    """A bootstrap room that a decode server may fetch from, until `longest` seconds have gone by without one."""

    def __init__(self, room_id: int, longest: float) -> None:
        loop = asyncio.get_running_loop()
        self.id = room_id
        self.payload: asyncio.Future[bytes] = loop.create_future()
        self.outcome: asyncio.Future[None] = loop.create_future()
        self.taken = self.sending = False
        reason = f"no decode server asked for bootstrap room {room_id} within {longest:g} s"
        self.expiry = loop.call_later(longest, self.fail, reason)

    def fail(self, message: str) -> None:
        """Whoever waits for it, here or on a decode server, gets the reason."""
        self.expiry.cancel()
        _fail(self.payload, message)
        _fail(self.outcome, message)


async def _unless_left(reader: asyncio.StreamReader, awaited: Awaitable[Any], reason: str) -> Any:
    """The result of `awaited`. Raises TransferError if the peer leaves, or speaks, before it is there."""
    left, awaited = asyncio.ensure_future(reader.read(1)), asyncio.ensure_future(awaited)
    try:
        await asyncio.wait({left, awaited}, return_when=asyncio.FIRST_COMPLETED)
        if left.done():
            raise TransferError(reason)
        return awaited.result()
    finally:
        left.cancel()
        awaited.cancel()
        await asyncio.gather(left, awaited, return_exceptions=True)


class PrefillSender:
    """The prefill side: a TCP server of the rooms that are being prefilled or wait to be fetched.

    bootstrap_timeout: seconds from opening a room until a decode server must have asked for it; transfer_timeout:
    seconds for a KV transfer that has begun, and for a connection whose room is not open.
    """

    def __init__(self, backend: TransferBackend, bootstrap_timeout: float, transfer_timeout: float) -> None:
        self.backend, self.counters = backend, TransferCounters()
        self.bootstrap_timeout, self.transfer_timeout = bootstrap_timeout, transfer_timeout
        self.rooms: dict[int, OpenRoom] = {}
        self._opened = asyncio.Condition()

    async def start(self, sock: socket) -> None:
        self._server = await asyncio.start_server(self._serve, sock=sock, limit=LINE_LIMIT)

    async def open(self, room: int) -> OpenRoom:
        """Announce that `room` is being prefilled; returns what `close` knows it by. Raises TransferError if in use."""
        if room in self.rooms:
            raise TransferError(f"bootstrap room {room} is in use by another request")
        async with self._opened:
            opened = self.rooms[room] = OpenRoom(room, self.bootstrap_timeout)
            self._opened.notify_all()
        return opened

    async def deliver(self, kv_transfer: KVTransfer) -> None:
        """Offer the KV transfer of an open room and wait until decode has it. Raises TransferError; frees the room."""
        room = self.rooms.get(kv_transfer.room)
        if room is None:
            raise TransferError(f"bootstrap room {kv_transfer.room} is not open")
        begin, longest = time.perf_counter(), self.bootstrap_timeout + self.transfer_timeout
        try:
            outgoing = self.backend.outgoing(kv_transfer)
            if outgoing is not None and not room.payload.done():
                room.payload.set_result(outgoing.pack())
            await asyncio.wait_for(room.outcome, longest)
            self.counters.sent += 1
            self.counters.bytes += len(room.payload.result())
            self.counters.seconds += time.perf_counter() - begin
        except TransferError:
            self.counters.failed += 1
            raise
        except asyncio.TimeoutError:
            self.counters.failed += 1
            raise TransferError(f"bootstrap room {room.id} was not transferred within {longest:g} s") from None
        finally:
            self.close(room.id, "the request has ended", room)

    def close(self, room_id: int | None, reason: str, opened: OpenRoom | None = None) -> None:
        """Free a room, or only what `opened` returned; whoever waits for it is told why."""
        room = None if room_id is None else self.rooms.get(room_id)
        if room is not None and opened in (None, room):
            del self.rooms[room.id]
            room.fail(f"prefill gave up bootstrap room {room_id}: {reason}")

    @property
    def sending(self) -> int:
        """How many KV transfers are on the wire."""
        return sum(room.sending for room in self.rooms.values())

    async def _is_open(self, room_id: int) -> None:
        async with self._opened:
            await self._opened.wait_for(lambda: room_id in self.rooms)

    async def _take(self, room_id: Any, reader: asyncio.StreamReader) -> OpenRoom:
        if not isinstance(room_id, int):
            raise TransferError(f"a bootstrap room is a number, not {room_id!r}")
        try:
            opened = asyncio.wait_for(self._is_open(room_id), self.transfer_timeout)
            await _unless_left(reader, opened, f"decode left bootstrap room {room_id} before prefill opened it")
        except asyncio.TimeoutError:
            raise TransferError(
                f"bootstrap room {room_id} is unknown to prefill after {self.transfer_timeout:g} s"
            ) from None
        room = self.rooms.get(room_id)
        if room is None:
            raise TransferError(f"prefill gave up bootstrap room {room_id}")
        if room.taken:
            raise TransferError(f"bootstrap room {room_id} was already taken")
        room.taken = True
        room.expiry.cancel()
        return room

    async def _send(
        self, room: OpenRoom, data: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        async for piece in self.backend.pieces(data):
            if not room.sending:
                _write_line(writer, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
                room.sending = True
            writer.write(piece)
            await writer.drain()
        answer = await _read_message(reader)
        if "error" in answer:
            raise TransferError(f"decode refused bootstrap room {room.id}: {answer['error']}")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        room, sending = None, False
        try:
            message = await asyncio.wait_for(_read_message(reader), self.bootstrap_timeout)
            room = await self._take(message.get("room"), reader)
            reason = f"decode left bootstrap room {room.id} before the KV transfer"
            data = await _unless_left(reader, room.payload, reason)
            sending = True
            await asyncio.wait_for(self._send(room, data, reader, writer), self.transfer_timeout)
            if not room.outcome.done():
                room.outcome.set_result(None)
        except (TransferError, OSError, asyncio.TimeoutError) as error:
            reason = str(error) or "no word in time"
            if not isinstance(error, TransferError) and room is not None:
                reason = f"the KV transfer of bootstrap room {room.id} broke off: {reason}"
            if room is not None:
                _fail(room.outcome, reason)
            if sending:
                writer.transport.abort()
            else:
                _write_line(writer, error=reason)
        finally:
            writer.close()


class DecodeReceiver:
    """The decode side. timeout: seconds from asking for a room to having its state.

    received_from: KV transfers by prefill server, as `host:port`.
    """

    def __init__(self, backend: TransferBackend, timeout: float) -> None:
        self.backend, self.timeout, self.counters = backend, timeout, TransferCounters()
        self.received_from: Counter[str] = Counter()

    async def fetch(self, host: str, port: int, room: int, accept: Callable[[KVTransfer], None]) -> KVTransfer:
        """The verified KV transfer of `room` from the prefill server at host:port.

        accept: called with it before it is acknowledged; may raise ValueError. Raises TransferError.
        """
        try:
            kv_transfer = await asyncio.wait_for(self._fetch(host, port, room, accept), self.timeout)
        except asyncio.TimeoutError:
            self.counters.failed += 1
            raise TransferError(
                f"bootstrap room {room} did not arrive from {host}:{port} within {self.timeout:g} s"
            ) from None
        except TransferError:
            self.counters.failed += 1
            raise
        except (OSError, EOFError, ValueError, OverflowError) as error:
            self.counters.failed += 1
            raise TransferError(f"KV transfer of bootstrap room {room} from {host}:{port} failed: {error}") from None
        self.counters.received += 1
        self.received_from[f"{host}:{port}"] += 1
        return kv_transfer

    async def _fetch(self, host: str, port: int, room: int, accept: Callable[[KVTransfer], None]) -> KVTransfer:
        reader, writer = await asyncio.open_connection(host, port, limit=LINE_LIMIT)
        try:
            _write_line(writer, room=room)
            await writer.drain()
            head = await _read_message(reader)
            if "error" in head:
                raise TransferError(str(head["error"]))
            size, digest = head.get("bytes"), head.get("sha256")
            if not (isinstance(size, int) and isinstance(digest, str)):
                raise ConnectionError("the peer's message is not understood")
            begin = time.perf_counter()
            data = await reader.readexactly(size)
            try:
                kv_transfer = self.verify(data, digest, room)
                kv_transfer = self.backend.incoming(kv_transfer)
                accept(kv_transfer)
            except (TransferError, ValueError) as error:
                _write_line(writer, error=str(error))
                await writer.drain()
                raise TransferError(str(error)) from None
            _write_line(writer)
            await writer.drain()
            self.counters.bytes += len(data)
            self.counters.seconds += time.perf_counter() - begin
            return kv_transfer
        finally:
            writer.close()

    @staticmethod
    def verify(data: bytes, digest: str, room: int) -> KVTransfer:
        if hashlib.sha256(data).hexdigest() != digest:
            raise TransferError(f"checksum mismatch in the KV transfer of bootstrap room {room} ({len(data)} bytes)")
        kv_transfer = KVTransfer.unpack(data)
        if kv_transfer.room != room:
            raise TransferError(f"asked for bootstrap room {room}, got room {kv_transfer.room}")
        return kv_transfer
