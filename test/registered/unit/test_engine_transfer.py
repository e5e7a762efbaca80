"""The KV transfer on real sockets: what arrives is what was sent, or both sides say why not, and the room is free."""

import asyncio
import gc
import hashlib
import json
import socket
import time
import unittest
from dataclasses import replace
from unittest import mock

import torch
from pdkit.core.ci_register import register_cpu_ci
from pdkit.engine.transfer import (
    DecodeReceiver,
    KVTransfer,
    PrefillSender,
    TransferBackend,
    TransferCounters,
    TransferError,
    load_backend,
)

register_cpu_ci(est_time=7, suite="stage-a-test-cpu")

SOON = 0.3
LARGE = 8 << 20  # bytes that fit in no socket's buffers


def kv_transfer(room=1, size=64):
    return KVTransfer(
        room=room,
        prompt_tokens=5,
        first_token=17,
        cached_tokens=3,
        counts={"layers.0.cumulative_length": 5},
        tensors={"some": torch.arange(size, dtype=torch.uint8), "none": torch.zeros(1, 0, 4)},
        first_logprob=-0.1,
        first_top_logprobs=[[-0.1, 17], [-3.4028234663852886e38, 18]],
    )


class FlipOneBit(TransferBackend):
    def wire(self, data):
        return data[:-1] + bytes([data[-1] ^ 1])


def backend(**does):
    """A transfer backend whose methods are those given."""
    made = TransferBackend()
    vars(made).update(does)
    return made


class TransferTestCase(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.unhandled = []
        loop = asyncio.get_running_loop()
        loop.set_debug(False)
        loop.set_exception_handler(lambda _, seen: self.unhandled.append((seen["message"], seen.get("exception"))))

    async def asyncTearDown(self):
        gc.collect()
        await asyncio.sleep(0.01)
        self.assertEqual(self.unhandled, [])

    async def sender(self, backend=None, bootstrap_timeout=SOON, transfer_timeout=2.0):
        sender = PrefillSender(backend or TransferBackend(), bootstrap_timeout, transfer_timeout)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        await sender.start(sock)
        self.addCleanup(sender._server.close)
        return sender

    async def opened(self, *backend, **timeouts):
        """The same, with room 1 open."""
        sender = await self.sender(*backend, **timeouts)
        await sender.open(1)
        return sender

    def delivery(self, sender, **of):
        """That a KV transfer is being sent."""
        return asyncio.ensure_future(sender.deliver(kv_transfer(**of)))

    async def waiting(self, **of):
        """That a decode server has asked for a room, 1 unless another is given, and waits."""
        fetching = asyncio.ensure_future(self.fetch(**of))
        await asyncio.sleep(0.02)
        return fetching

    async def fetch(self, room=1, receiver=None, accept=lambda kv_transfer: None):
        receiver = receiver or DecodeReceiver(TransferBackend(), timeout=5.0)
        return await receiver.fetch("127.0.0.1", self.port, room, accept)

    async def connect(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.addCleanup(writer.close)
        return reader, writer

    async def fake_prefill(self, answer):
        """A prefill server that runs answer(reader, writer) on every connection and closes it."""

        async def serve(reader, writer):
            try:
                await answer(reader, writer)
            except ConnectionError:
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.addCleanup(server.close)
        self.port = server.sockets[0].getsockname()[1]

    async def assertFails(self, pattern, awaitable):
        with self.assertRaisesRegex(TransferError, pattern):
            await awaitable

    def assertArrived(self, arrived, sent):
        for name in ("room", "prompt_tokens", "first_token", "cached_tokens", "counts", "first_logprob"):
            self.assertEqual(getattr(arrived, name), getattr(sent, name))
        self.assertEqual([*map(tuple, arrived.first_top_logprobs)], [*map(tuple, sent.first_top_logprobs)])
        self.assertEqual(set(arrived.tensors), set(sent.tensors))
        for name, tensor in sent.tensors.items():
            self.assertEqual(arrived.tensors[name].dtype, tensor.dtype)
            self.assertEqual(arrived.tensors[name].shape, tensor.shape)
            self.assertTrue(torch.equal(arrived.tensors[name], tensor))


class TestKVTransfer(TransferTestCase):
    def test_is_packed_and_unpacked_bit_for_bit(self):
        sent = kv_transfer()
        sent.tensors |= {"float": torch.tensor([float("nan"), -0.0, 1e-45]), "half": torch.ones(2, 3).bfloat16()}
        arrived = KVTransfer.unpack(sent.pack())
        bits = [each.tensors.pop("float").view(torch.int32).tolist() for each in (arrived, sent)]
        self.assertEqual(*bits)
        self.assertArrived(arrived, sent)

    def test_anything_else_is_a_transfer_error(self):
        data = kv_transfer().pack()
        header = len(data) - 64
        cut = b"", b"\0", data[:20], data[:header], data[:8] + data[9:]
        for other in (*cut, b"\xff" * len(data), b"\x02" + b"\0" * 7 + b"[]"):
            with self.subTest(other=other[:12]), self.assertRaisesRegex(TransferError, "cannot be read"):
                KVTransfer.unpack(other)


class TestOrder(TransferTestCase):
    async def test_the_room_may_be_opened_delivered_and_fetched_in_any_order(self):
        for order in (("open", "deliver", "fetch"), ("open", "fetch", "deliver"), ("fetch", "open", "deliver")):
            with self.subTest(order=order):
                sender, receiver = await self.sender(), DecodeReceiver(TransferBackend(), 5.0)
                sent, tasks = kv_transfer(), {}
                for step in order:
                    if step == "open":
                        await sender.open(1)
                    elif step == "deliver":
                        tasks[step] = asyncio.ensure_future(sender.deliver(sent))
                    else:
                        tasks[step] = asyncio.ensure_future(self.fetch(receiver=receiver))
                    await asyncio.sleep(0.02)
                await tasks["deliver"]
                self.assertArrived(await tasks["fetch"], sent)
                self.assertEqual(sender.rooms, {})
                size = len(sent.pack())
                self.assertEqual(sender.counters, TransferCounters(sent=1, bytes=size))
                self.assertEqual(receiver.counters, TransferCounters(received=1, bytes=size))
                self.assertGreater(receiver.counters.seconds, 0)
                self.assertGreater(sender.counters.seconds, 0.01 if order[-1] == "fetch" else 0)

    async def test_many_rooms_at_once_each_get_their_own(self):
        patient = {"bootstrap_timeout": 60.0, "transfer_timeout": 60.0}
        sender, rooms = await self.sender(**patient), [2**63 - 1 - index for index in range(40)]
        receiver = DecodeReceiver(TransferBackend(), timeout=60.0)
        fetches = [asyncio.ensure_future(self.fetch(room, receiver)) for room in rooms]
        for room in rooms:
            await sender.open(room)
        await asyncio.gather(*(sender.deliver(kv_transfer(room, size=room % 7919)) for room in reversed(rooms)))
        for room, arrived in zip(rooms, await asyncio.gather(*fetches)):
            self.assertArrived(arrived, kv_transfer(room, size=room % 7919))
        self.assertEqual((sender.rooms, sender.counters.sent), ({}, 40))

    async def test_a_state_larger_than_any_buffer_arrives(self):
        sender = await self.opened(bootstrap_timeout=5.0)
        sent = kv_transfer(size=LARGE)
        _, arrived = await asyncio.gather(sender.deliver(sent), self.fetch())
        self.assertArrived(arrived, sent)

    async def test_a_room_can_be_used_again_once_it_is_free(self):
        sender = await self.sender()
        for _ in range(3):
            await sender.open(1)
            await asyncio.gather(sender.deliver(kv_transfer()), self.fetch())


class TestRooms(TransferTestCase):
    async def test_an_unknown_room_is_refused_after_the_transfer_timeout(self):
        await self.sender(transfer_timeout=SOON)
        receiver, start = DecodeReceiver(TransferBackend(), 5.0), time.monotonic()
        await self.assertFails("room 7 is unknown to prefill after 0.3 s", self.fetch(7, receiver))
        self.assertGreaterEqual(time.monotonic() - start, SOON)
        self.assertEqual(receiver.counters, TransferCounters(failed=1))

    async def test_decode_gives_up_a_room_that_does_not_come(self):
        await self.sender()
        await self.assertFails("did not arrive.* within 0.3 s", self.fetch(7, DecodeReceiver(TransferBackend(), SOON)))

    async def test_a_decode_server_that_left_before_the_room_opened_is_forgotten(self):
        sender = await self.sender()
        early = await self.waiting()
        early.cancel()
        await asyncio.wait({early})
        await asyncio.sleep(0.02)
        await sender.open(1)
        delivery = self.delivery(sender)
        self.assertArrived(await self.fetch(), kv_transfer())
        await delivery

    async def test_a_room_in_use_cannot_be_opened(self):
        sender = await self.opened()
        await self.assertFails("room 1 is in use", sender.open(1))
        await asyncio.gather(sender.deliver(kv_transfer()), self.fetch())

    async def test_a_room_is_taken_once(self):
        sender = await self.opened()
        first = await self.waiting()
        await self.assertFails("room 1 was already taken", self.fetch())
        await sender.deliver(kv_transfer())
        self.assertArrived(await first, kv_transfer())

    async def test_an_aborted_room_tells_the_decode_server_that_waits_and_ends_its_delivery(self):
        for waits in (True, False):
            sender = await self.opened()
            task = await self.waiting() if waits else self.delivery(sender)
            await asyncio.sleep(0.02)
            sender.close(1, "the request was aborted")
            await self.assertFails("gave up bootstrap room 1: the request was aborted", task)
            self.assertEqual(sender.rooms, {})
            await self.assertFails("room 1 is not open", sender.deliver(kv_transfer()))

    async def test_a_room_that_nobody_asks_for_is_freed_after_the_bootstrap_timeout(self):
        sender = await self.sender(bootstrap_timeout=SOON, transfer_timeout=5.0)
        start = time.monotonic()
        await sender.open(1)
        late = "no decode server asked for bootstrap room 1 within 0.3 s"
        await self.assertFails(late, sender.deliver(kv_transfer()))
        self.assertGreaterEqual(time.monotonic() - start, SOON)
        self.assertEqual((sender.rooms, sender.counters), ({}, TransferCounters(failed=1)))

    async def test_the_bootstrap_timeout_counts_from_the_opening(self):
        sender = await self.opened(bootstrap_timeout=SOON)
        await asyncio.sleep(1.5 * SOON)
        await self.assertFails("no decode server asked for bootstrap room 1", self.fetch())
        one_more = asyncio.ensure_future(asyncio.sleep(SOON))
        delivery = self.delivery(sender)
        done, _ = await asyncio.wait({one_more, delivery}, return_when=asyncio.FIRST_COMPLETED)
        self.assertIn(delivery, done, "it waits once more")
        await self.assertFails("no decode server asked for bootstrap room 1", delivery)
        await one_more

    async def test_a_room_that_was_asked_for_does_not_expire(self):
        sender = await self.opened(bootstrap_timeout=SOON)
        waiting = asyncio.ensure_future(self.fetch())
        await asyncio.sleep(1.5 * SOON)
        await sender.deliver(kv_transfer())
        self.assertArrived(await waiting, kv_transfer())

    async def test_the_end_of_a_request_leaves_a_room_that_was_opened_again_alone(self):
        sender = await self.sender()
        first = await sender.open(1)
        delivery = self.delivery(sender)
        await asyncio.sleep(0)
        sender.close(1, "the request was aborted")
        await sender.open(1)
        await self.assertFails("the request was aborted", delivery)
        sender.close(1, "its end", first)
        again = self.delivery(sender)
        self.assertArrived(await self.fetch(), kv_transfer())
        await again

    async def test_a_cancelled_delivery_frees_its_room(self):
        sender = await self.opened()
        delivery = self.delivery(sender)
        await asyncio.sleep(0.02)
        delivery.cancel()
        await asyncio.wait({delivery})
        self.assertEqual(sender.rooms, {})

    async def test_closing_a_room_that_is_not_there_does_nothing(self):
        (await self.sender()).close(1, "no reason")


class TestDecodeDies(TransferTestCase):
    async def ask(self):
        reader, writer = await self.connect()
        writer.write(b'{"room": 1}\n')
        await writer.drain()
        await asyncio.sleep(0.02)
        return reader, writer

    async def test_before_the_state_is_ready(self):
        sender = await self.opened()
        _, writer = await self.ask()
        writer.close()
        await asyncio.sleep(0.02)
        await self.assertFails("decode left bootstrap room 1", sender.deliver(kv_transfer()))
        self.assertEqual((sender.rooms, sender.counters), ({}, TransferCounters(failed=1)))

    async def test_with_half_of_the_bytes(self):
        sender = await self.opened()
        delivery = self.delivery(sender, size=LARGE)
        reader, writer = await self.ask()
        await reader.readexactly(LARGE // 2)
        writer.transport.abort()
        await self.assertFails("room 1", delivery)
        self.assertEqual((sender.rooms, sender.counters), ({}, TransferCounters(failed=1)))

    async def test_with_all_of_the_bytes_but_without_a_word(self):
        sender = await self.opened()
        delivery = self.delivery(sender)
        reader, writer = await self.ask()
        await reader.readexactly(json.loads(await reader.readline())["bytes"])
        writer.close()
        await self.assertFails("room 1.*closed the connection", delivery)

    async def test_it_freezes_and_the_connection_does_not_outlive_the_timeout(self):
        for size, read in ((LARGE, False), (64, True)):
            with self.subTest(size=size):
                sender = await self.opened(transfer_timeout=SOON)
                delivery = self.delivery(sender, size=size)
                reader, _ = await self.ask()
                await self.assertFails("room 1", delivery)
                await asyncio.sleep(2 * SOON)
                if not read:
                    with self.assertRaises((asyncio.IncompleteReadError, ConnectionError)):
                        await reader.readexactly(LARGE)
                else:
                    await asyncio.wait_for(reader.read(), 1.0)
                self.assertEqual(sender.rooms, {})

    async def test_a_word_that_is_not_understood_fails_the_kv_transfer(self):
        for word in (b"garbage\n", b"[]\n", b"\xff\xfe\n", b"x" * (1 << 17)):
            with self.subTest(word=word[:8]):
                sender = await self.opened()
                delivery = self.delivery(sender)
                reader, writer = await self.ask()
                await reader.readexactly(json.loads(await reader.readline())["bytes"])
                writer.write(word)
                await self.assertFails("room 1", delivery)


class TestPrefillDies(TransferTestCase):
    NOT_UNDERSTOOD = (
        b"HTTP/1.1 400 Bad Request\r\n", b"[]\n", b"{}\n", b'{"bytes": 5}\n', b'{"sha256": "0"}\n', b"\xff\n",
        b'{"bytes": -1, "sha256": "0"}\n', b'{"bytes": "5", "sha256": "0"}\n', b'{"bytes": null, "sha256": "0"}\n',
        b'{"bytes": 1.5, "sha256": "0"}\n', b"x" * (1 << 17),
    )  # fmt: skip

    async def assertFetchFails(self, pattern, answer, timeout):
        await self.fake_prefill(answer)
        receiver = DecodeReceiver(TransferBackend(), timeout)
        await self.assertFails(pattern, self.fetch(1, receiver))
        self.assertEqual(receiver.counters, TransferCounters(failed=1))

    async def test_it_was_never_there(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        await self.assertFails(f"room 1 from 127.0.0.1:{self.port}.*refused|Connect call failed", self.fetch())

    async def test_there_is_no_such_place(self):
        for host, port in (("x" * 100, 1), ("127.0.0.1", 99999), ("\0", 1), ("host.invalid", 1)):
            with self.subTest(host=host[:9], port=port):
                fetch = DecodeReceiver(TransferBackend(), 5.0).fetch(host, port, 1, print)
                await self.assertFails("room 1", fetch)

    async def test_what_it_does_instead(self):
        def says(words, waits=True):
            async def answer(reader, writer):
                writer.write(words)
                await writer.drain()
                if waits:
                    await reader.read()

            return answer

        data = kv_transfer(size=LARGE).pack()
        head = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        half = json.dumps(head).encode() + b"\n" + data[: len(data) // 2]
        for name, answer, pattern, timeout in (
            ("leaves", lambda reader, writer: reader.readline(), "room 1.*closed the connection", 5.0),
            ("leaves amid the bytes", says(half, waits=False), "room 1.*bytes", 5.0),
            ("freezes", says(b""), "room 1 did not arrive from 127.0.0.1:.* within 0.3 s", SOON),
            *((words[:40], says(words), "room 1", 5.0) for words in self.NOT_UNDERSTOOD),
        ):
            with self.subTest(name):
                await self.assertFetchFails(pattern, answer, timeout)


class TestWhatArrivesIsChecked(TransferTestCase):
    async def fail_both(self, pattern, backend=None, incoming=None, accept=lambda kv_transfer: None):
        sender = await self.sender(backend)
        receiver = DecodeReceiver(incoming or TransferBackend(), 5.0)
        await sender.open(1)
        delivery = self.delivery(sender)
        await self.assertFails(pattern, self.fetch(1, receiver, accept))
        await self.assertFails(f"decode refused bootstrap room 1: .*{pattern}", delivery)
        self.assertEqual((sender.rooms, sender.counters), ({}, TransferCounters(failed=1)))
        self.assertEqual(receiver.counters, TransferCounters(failed=1))

    async def test_one_wrong_bit_on_the_wire_is_refused_on_decode_and_reported_on_prefill(self):
        await self.fail_both("checksum mismatch", FlipOneBit())

    async def test_the_state_of_another_room_is_refused(self):
        await self.fail_both(
            "asked for bootstrap room 1, got room 2", backend(outgoing=lambda each: replace(each, room=2))
        )

    async def test_a_state_that_the_model_does_not_accept_is_refused(self):
        def accept(kv_transfer):
            raise ValueError("state of 5 tokens: tensor layers.0.window is missing")

        await self.fail_both("layers.0.window is missing", accept=accept)

    async def test_a_backend_sees_it_on_both_sides(self):
        seen = []
        noting = {
            name: lambda each, name=name: (seen.append(name), each)[1] for name in ("outgoing", "wire", "incoming")
        }
        sender = await self.opened(backend(**noting))
        await asyncio.gather(sender.deliver(kv_transfer()), self.fetch(1, DecodeReceiver(backend(**noting), 5.0)))
        self.assertEqual(seen, ["outgoing", "wire", "incoming"])

    async def test_a_backend_that_sends_nothing_leaves_both_sides_with_an_error(self):
        sender = await self.opened(backend(outgoing=lambda _: None), transfer_timeout=SOON)
        waiting = asyncio.ensure_future(self.fetch())
        await self.assertFails("room 1 was not transferred within 0.6 s", sender.deliver(kv_transfer()))
        await self.assertFails("gave up bootstrap room 1", waiting)
        self.assertEqual(sender.rooms, {})

    async def test_a_backend_that_raises_frees_the_room(self):
        sender = await self.opened(backend(outgoing=mock.Mock(side_effect=RuntimeError("out of order"))))
        waiting = await self.waiting()
        with self.assertRaisesRegex(RuntimeError, "out of order"):
            await sender.deliver(kv_transfer())
        await self.assertFails("gave up bootstrap room 1", waiting)
        self.assertEqual(sender.rooms, {})


class TestStrangers(TransferTestCase):
    GARBAGE = (
        b"", b"\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",
        b"null\n", b"[]\n", b"{}\n", b'{"room": null}\n', b'{"room": []}\n', b'{"room": {}}\n', b'{"room": "1"}\n',
        b'{"room": 1.5}\n',
        b'{"room": true}\n', b'{"rooms": 1}\n', b'{"room": 1', b"\xff" * 100 + b"\n", b"[" * 60000 + b"\n",
        b"x" * (1 << 20),
    )  # fmt: skip

    async def test_are_sent_away_and_disturb_nobody(self):
        sender = await self.opened(transfer_timeout=3.0)
        waiting = await self.waiting()
        for words in self.GARBAGE:
            with self.subTest(words=words[:30]):
                reader, writer = await self.connect()
                writer.write(words)
                if not words.endswith(b"\n"):
                    writer.write_eof()
                try:
                    answer = await asyncio.wait_for(reader.read(), 2.0)
                except ConnectionError:
                    answer = b""
                if answer:
                    self.assertIn("error", json.loads(answer))
        self.assertEqual(set(sender.rooms), {1})
        await sender.deliver(kv_transfer())
        self.assertArrived(await waiting, kv_transfer())

    async def test_one_that_says_nothing_is_sent_away_after_the_bootstrap_timeout(self):
        await self.sender()
        reader, _ = await self.connect()
        await asyncio.wait_for(reader.read(), 2.0)

    async def test_one_that_never_ends_is_sent_away(self):
        await self.sender()
        reader, writer = await self.connect()

        async def talk():
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
                await asyncio.sleep(0)

        with self.assertRaises(ConnectionError):
            await asyncio.wait_for(talk(), 2.0)


class TestLoadBackend(unittest.TestCase):
    def test_knows_tcp_and_any_subclass(self):
        self.assertIs(type(load_backend("tcp")), TransferBackend)
        self.assertEqual(type(load_backend(f"{__name__}:FlipOneBit")).__name__, "FlipOneBit")

    def test_says_what_is_wrong_in_one_line(self):
        here = f"{__name__}:NoSuchClass", f"{__name__}:LARGE"
        for name in ("mooncake", "", "no_such_module:Class", *here, "json:JSONDecoder"):
            with self.subTest(name=name), self.assertRaisesRegex(ValueError, f"transfer backend {name!r}") as caught:
                load_backend(name)
            self.assertEqual(len(str(caught.exception).splitlines()), 1)


if __name__ == "__main__":
    unittest.main()
