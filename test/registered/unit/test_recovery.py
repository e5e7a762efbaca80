"""What the recovery tests believe of a client: real sockets, and servers that answer as broken deployments do."""

import asyncio
import contextlib
import json
import os
import tempfile
import time
import unittest
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from cases import FolderCase
from pdkit.checks.recovery import table
from pdkit.checks.recovery.clients import Fate, Outcome, Query, QueryThread, token_ids
from pdkit.core.ci_register import register_cpu_ci
from pdkit.engine import test_backends as held
from pdkit.engine.transfer import KVTransfer, TransferError, load_backend
from stub_server import JsonHandler, StubServer

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

RIGHT = "one two three"
WHOLE = Query(token_ids(5), 3, right=RIGHT)
STREAM = Query("count", 3, stream=True, right=RIGHT)


def answered(text, reason="length"):
    return {"text": text, "meta_info": {"finish_reason": reason and {"type": reason}}}


def event(text, reason=None):
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
    body = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
    return f"data: {json.dumps(body)}\n\n".encode()


class Handler(JsonHandler):
    """Whole answers from the server's `whole` (status, body), streams from its `pieces`, whose end is b"" if clean."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.body()
        if self.path == "/generate":
            time.sleep(self.server.delay)
            with contextlib.suppress(BrokenPipeError):
                self.answer(*self.server.whole)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in self.server.pieces:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                time.sleep(self.server.delay)
        self.close_connection = True


class TestClient(unittest.TestCase):
    def setUp(self):
        self.server = StubServer(self, Handler)
        self.server.delay, self.server.whole, self.server.pieces = 0.0, (200, answered(RIGHT)), ()

    def outcome_of(self, ask, timeout=2.0, **server):
        for name, value in server.items():
            setattr(self.server, name, value)
        return QueryThread(self.server.url, ask, timeout).result()

    def assertFate(self, fate, outcome, clear=None):
        self.assertIs(outcome.fate, fate, outcome)
        if clear is not None:
            self.assertEqual(outcome.is_clear, clear, outcome)

    def test_the_right_answer_is_served(self):
        self.assertFate(Fate.SERVED, self.outcome_of(WHOLE, whole=(200, answered(RIGHT))))
        pieces = [event("one "), event("two three", "length"), b"data: [DONE]\n\n", b""]
        self.assertFate(Fate.SERVED, self.outcome_of(STREAM, pieces=pieces))

    def test_anything_else_that_looks_like_success_is_wrong(self):
        texts = (answered(text) for text in ("one two four", "one two", ""))
        for body in (*texts, {}, [], b"", b"Internal Server Error"):
            with self.subTest(body=body):
                self.assertFate(Fate.WRONG, self.outcome_of(WHOLE, whole=(200, body)))
        done = b"data: [DONE]\n\n"
        for pieces in (
            [event("one "), event("two four", "length"), done, b""],
            [event("one "), event("two", "length"), done, b""],
            [event("one "), event("two three"), done, b""],
            [event("one "), b""],
            [b""],
        ):
            with self.subTest(pieces=pieces):
                self.assertFate(Fate.WRONG, self.outcome_of(STREAM, pieces=pieces))

    def test_what_came_before_an_error_must_be_right(self):
        self.assertFate(Fate.WRONG, self.outcome_of(STREAM, pieces=[event("one "), event("four")]))

    def test_an_error_is_clear_if_it_blames_the_deployment_in_words(self):
        for status, body, clear in (
            (500, {"message": "no room"}, True),
            (503, b"Internal Server Error", True),
            (500, b"", False),
            (400, {"message": "no room"}, False),
            (404, b"Not Found", False),
        ):
            with self.subTest(status=status, body=body):
                self.assertFate(Fate.FAILED, self.outcome_of(WHOLE, whole=(status, body)), clear)
        self.assertFate(Fate.FAILED, self.outcome_of(WHOLE, whole=(200, answered("one", "abort"))))
        self.assertFate(Fate.FAILED, self.outcome_of(WHOLE, whole=(200, answered("one", None))))

    def test_a_stream_that_breaks_off_failed(self):
        self.assertFate(Fate.FAILED, self.outcome_of(STREAM, pieces=[event("one ")]), clear=True)
        error = b'data: {"error": {"message": "room 7 did not arrive"}}\n\n'
        self.assertFate(Fate.FAILED, self.outcome_of(STREAM, pieces=[event("one "), error, b""]), clear=True)

    def test_nobody_there(self):
        for ask in (WHOLE, STREAM):
            self.assertFate(Fate.FAILED, QueryThread("http://127.0.0.1:1", ask, 2.0).result(), clear=True)

    def test_a_client_that_waits_too_long_hangs(self):
        self.assertFate(Fate.HUNG, self.outcome_of(WHOLE, timeout=0.2, delay=0.5))
        self.assertFate(Fate.HUNG, self.outcome_of(STREAM, timeout=0.2, delay=0.5, pieces=[event("one "), b"", b""]))

    def test_a_client_that_is_trickled_at_for_ever_hangs(self):
        trickle = [event("")] * 100
        outcome = self.outcome_of(STREAM, timeout=0.3, delay=0.1, pieces=trickle)
        self.assertFate(Fate.HUNG, outcome)
        self.assertLess(outcome.seconds, 1.0)


class TestTable(FolderCase):
    def row(self, *fates):
        outcomes = [Outcome(fate, "", "", None, 1.0) for fate in fates]
        return table.Row.of("decode killed", "streaming", "mini LB", outcomes, range(1, len(fates) + 1))

    def test_counts_each_fate_and_the_longest_error(self):
        row = self.row(Fate.FAILED, Fate.HUNG, Fate.SERVED, Fate.WRONG)
        self.assertEqual((row.served, row.failed, row.wrong, row.to_error), (1, 2, 1, 2))
        self.assertIsNone(self.row(Fate.SERVED).to_error)

    def test_shows_a_line_for_each_event_and_phase(self):
        mini_lb = replace(self.row(Fate.FAILED, Fate.SERVED), router="mini LB")
        slow = replace(mini_lb, router="Rust router", to_error=8.25, to_recovery=3.0)
        shown = table.markdown([mini_lb, slow, replace(slow, event="decode frozen", wrong=1)])
        killed = "| decode killed | streaming | 2 | 2 | 0 | 1.0 s | 8.2 s | - | 3.0 s |"
        frozen = "| decode frozen | streaming | 1 | 1 | 1 | - | 8.2 s | - | 3.0 s |"
        self.assertEqual(shown.splitlines()[2:], [killed, frozen])

    def test_what_was_sent_by_hand_has_a_table_of_its_own(self):
        by_hand = replace(self.row(Fate.FAILED), router=table.BY_HAND)
        first, second = table.markdown([self.row(Fate.SERVED), by_hand]).split("\n\n")
        self.assertEqual(table.markdown([by_hand]), second)
        self.assertIn("time to error, mini LB", first)
        self.assertIn("time to error, by hand", second)

    def test_survives_its_file(self):
        rows = [self.row(Fate.FAILED), self.row(Fate.SERVED)]
        path = self.root / table.FILE_NAME
        table.save(rows, path, target="embedded")
        self.assertEqual(table.load(path), ({"target": "embedded"}, rows))
        path.write_text("{}")
        with self.assertRaisesRegex(ValueError, "is no recovery_table.json"):
            table.load(path)

    def test_stands_between_its_markers(self):
        document = f"before\n{table.BEGIN}\nold\n{table.END}\nafter"
        self.assertEqual(table.insert(document, "new"), f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter")
        for broken in ("", table.BEGIN, f"{table.END}{table.BEGIN}"):
            with self.assertRaises(ValueError):
                table.insert(broken, "new")


class TestHeldTransfer(unittest.IsolatedAsyncioTestCase):
    def setUp(self):
        self.valve = held.Valve(Path(self.enterContext(tempfile.TemporaryDirectory())) / "valve")
        self.valve.turn(held.Valve.HOLD)
        with mock.patch.dict(os.environ, {held.HOLD_FILE_VARIABLE: str(self.valve.path)}):
            self.backend = held.HeldTransfer()

    async def pieces(self, length, within=5.0):
        """(data, what left while the valve was shut, what left in all)."""
        data, left = KVTransfer(1, length, 17, 0, {}, {"some": torch.arange(64)}).pack(), []

        async def send():
            async for piece in self.backend.pieces(data):
                left.append(piece)

        sending = asyncio.ensure_future(send())
        await asyncio.sleep(0.1)
        shut = b"".join(left)
        self.valve.turn(None)
        await asyncio.wait_for(sending, within)
        return data, shut, b"".join(left)

    async def test_holds_by_length(self):
        for length, share in ((held.HELD_BEFORE, 0), (held.HELD_DURING, 0.5), (7, 1)):
            self.valve.turn(held.Valve.HOLD)
            data, shut, whole = await self.pieces(length)
            self.assertEqual(whole, data)
            self.assertEqual(len(shut), int(share * len(data)), length)

    def test_refuses_while_it_is_told_to(self):
        self.valve.turn(held.Valve.REFUSE)
        with self.assertRaises(TransferError):
            self.backend.incoming("a KV transfer")
        self.valve.turn(None)
        self.assertEqual(self.backend.incoming("a KV transfer"), "a KV transfer")

    def test_needs_its_file(self):
        with mock.patch.dict(os.environ):
            os.environ.pop(held.HOLD_FILE_VARIABLE, None)
            with self.assertRaisesRegex(ValueError, held.HOLD_FILE_VARIABLE):
                load_backend("pdkit.engine.test_backends:HeldTransfer")


if __name__ == "__main__":
    unittest.main()
