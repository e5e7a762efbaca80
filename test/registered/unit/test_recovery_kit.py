"""Recovery: what its clients are believed, and that each scenario fails with each deployment that is broken.

Clients ask real sockets of servers that answer as broken deployments do. The deployment of the scenarios is a stub: what is
dead or frozen, and so what became of a request, is a set of names.
"""

import asyncio
import contextlib
import itertools
import json
import math
import os
import tempfile
import time
import unittest
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from cases import FolderCase
from pdkit.checks import scale_out
from pdkit.checks.recovery import bootstrap_messages, table
from pdkit.checks.recovery import scenarios as recovery_scenarios
from pdkit.checks.recovery.bootstrap_messages import DuplicateMessageChecks
from pdkit.checks.recovery.clients import Fate, Outcome, Query, QueryThread, token_ids
from pdkit.checks.recovery.in_flight import BEFORE, DURING, IDLE, STREAMING
from pdkit.checks.recovery.scenarios import IN_FLIGHT, RecoveryChecks
from pdkit.checks.scale_out import ScaleOutChecks
from pdkit.core.ci_register import register_cpu_ci
from pdkit.engine import test_backends as held
from pdkit.engine.transfer import KVTransfer, TransferError, load_backend
from stub_server import JsonHandler, StubServer

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

ROUTERS = {"mini LB": "http://mini", "Rust router": "http://rust"}
SERVED = Outcome(Fate.SERVED, "right", "", 200, 0.1)
FAILED = Outcome(Fate.FAILED, "", "500: no room", 500, 0.1)
WORDLESS, HUNG = replace(FAILED, error="500: ", status=400), replace(FAILED, fate=Fate.HUNG)


@dataclass
class LateClient:
    """A client whose outcome is what `ask` returns once somebody wants to know."""

    ask: object
    outcome = None
    ended_at = math.inf

    def result(self):
        self.outcome, self.ended_at = self.ask(), time.monotonic() + 1.0
        return self.outcome


class Deployment:
    """`down`: parts that are dead or frozen."""

    failed = FAILED
    router_timeout = slack = settling = returning = 1
    bootstrap_timeout, waiting_timeout = 6, 10
    prefill_url = decode_url = base_host = bootstrap_port = target = engine = log_dir = configure = fleet = None
    right_asks = {phase: Query("1", 1, right="right") for phase in (*IN_FLIGHT, IDLE)}

    def setUp(self):
        self.down, self.recovery_rows, self.rooms = set(), [], Counter()
        self.processes = {name: SimpleNamespace(poll=lambda: None) for name in self.names()}

    def names(self):
        return ["prefill", "decode", "load balancer", "router"]

    def servers(self):
        return {"prefill": "http://prefill", "decode": "http://decode"}

    def routers(self):
        return ROUTERS

    def process(self, name):
        return self.processes[name]

    def freeze(self, name):
        self.down.add(name)

    def thaw(self, name):
        self.down.discard(name)

    end = freeze

    def start_again(self, name):
        self.down.discard(name)
        self.processes[name] = SimpleNamespace(poll=lambda: None)

    def outcome(self, phase, router):
        return self.failed if self.down and not (phase == STREAMING and self.down == {"prefill"}) else SERVED

    def send(self, phase, patience=None):
        return {name: LateClient(lambda name=name: self.outcome(phase, name)) for name in ROUTERS}

    def in_flight(self, patience=None):
        return {phase: self.send(phase) for phase in (BEFORE, DURING, STREAMING)}

    def until_served(self, url, begun):
        self.assertFalse(self.down, "does not serve after the return")
        return 0.5

    def wait_idle(self, servers):
        pass

    def readmission(self):
        return 0.0

    def survivors_serve(self, victims):
        self.assertTrue(self.down)

    def timed_post(self, side, ask, room):
        """A second one of a side is refused, as is one whose other side hears nothing."""
        self.rooms[room, side] += 1
        if self.rooms[room, side] > 1:
            return self.posted(side, Fate.FAILED, f"500: room {room} is in use", 0.1)
        time.sleep(3 * bootstrap_messages.LATE_S)
        if not self.rooms[room, "decode" if side == "prefill" else "prefill"]:
            return self.posted(side, Fate.FAILED, f"500: room {room} was lost", {"prefill": 6.1, "decode": 10.1}[side])
        return self.posted(side, Fate.SERVED, "", 0.1)

    def posted(self, side, fate, error, seconds):
        return fate, error, seconds

    afterwards = None

    def back(self, *args):
        """`afterwards`: what the first and all later requests meet once all should be as before."""
        if self.afterwards:
            first, later = self.afterwards
            outcomes = itertools.chain([first], itertools.repeat(later))
            self.outcome = lambda phase, router: next(outcomes)
        super().back(*args)


def fails(message):
    def method(self, *args):
        raise AssertionError(message)

    return method


def of_another(self, phase, router):
    outcome = Deployment.outcome(self, phase, router)
    return outcome if router == "mini LB" else replace(outcome, fate=Fate.WRONG)


def wrong_by_decode(self, side, fate, error, seconds):
    return Fate.WRONG if fate is Fate.SERVED and side == "decode" else fate, error, seconds


def all_start_again(self, name):
    for each in self.names():
        Deployment.start_again(self, each)


EVENTS = {name for name in dir(RecoveryChecks) if name.startswith("test_")}
KILLS = {name for name in EVENTS if "killed" in name}
MOMENTS = {name for name in EVENTS if "moment" in name}
MESSAGES = {name for name in dir(DuplicateMessageChecks) if name.startswith("test_")}
IMPATIENT = {"test_routers_freeze", "test_routers_freeze_while_idle"}
LATE = {"test_a_bootstrap_message_is_late"}
# The first request afterwards meets a rank that is not let in yet, and fails at once.
KEPT_OUT = {"router_timeout": 60, "afterwards": (FAILED, SERVED)}
LET_IN_LATE = {**KEPT_OUT, "readmission": lambda self: 60.0}
WRONG_ONCE = {**LET_IN_LATE, "afterwards": (replace(FAILED, fate=Fate.WRONG), SERVED)}
# How it is broken: the attributes of such a deployment, and in which scenarios it must show.
BROKEN = {
    "answers of others": (
        {"outcome": of_another, "posted": wrong_by_decode},
        EVENTS | MESSAGES - {"test_a_bootstrap_message_is_lost"},
    ),
    "errors without a word": (
        {"failed": WORDLESS, "posted": lambda self, side, fate, error, seconds: (fate, error and "500: ", seconds)},
        (EVENTS - MOMENTS) | (MESSAGES - LATE),
    ),
    "clients hang": (
        {"failed": HUNG, "posted": lambda self, side, fate, error, seconds: (fate, error, seconds + 60)},
        (EVENTS - MOMENTS - IMPATIENT) | (MESSAGES - LATE),
    ),
    "no return": ({"until_served": fails("does not serve after the return")}, EVENTS),
    "lost afterwards": ({"afterwards": (FAILED, FAILED)}, EVENTS - MOMENTS),
    "a rank is kept out": (KEPT_OUT, EVENTS - MOMENTS),
    "wrong once": (WRONG_ONCE, EVENTS - MOMENTS),
    "all start again": ({"start_again": all_start_again}, KILLS),
    "rooms are kept": ({"wait_idle": fails("rooms are still held")}, EVENTS | (MESSAGES - LATE)),
    "survivors are ill": ({"survivors_serve": fails("a survivor is ill")}, EVENTS - MOMENTS),
}


class Scenarios:
    """`broken`: by name, what is not as in the `sound` deployment, and in which of the `scenarios` it must show."""

    def test_a_sound_deployment_passes(self):
        for scenario in self.scenarios:
            with self.subTest(scenario):
                self.assertTrue(self.passes(self.sound, scenario))

    def test_a_broken_one_fails(self):
        for how, (attributes, scenarios) in self.broken.items():
            for scenario in scenarios:
                with self.subTest(scenario, broken=how):
                    self.assertFalse(self.passes(type("Broken", (self.sound,), attributes), scenario))


class TestRecovery(Scenarios, unittest.TestCase):
    sound, scenarios, broken = Deployment, EVENTS | MESSAGES, BROKEN

    def setUp(self):
        clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None)
        self.enterContext(mock.patch.object(recovery_scenarios, "time", clock))
        self.enterContext(mock.patch.object(bootstrap_messages, "LATE_S", 0.02))
        self.enterContext(mock.patch("builtins.print"))

    def test_ranks_of_a_sound_one_may_be_let_in_late(self):
        for scenario in EVENTS - MOMENTS:
            with self.subTest(scenario):
                self.assertTrue(self.passes(type("LetInLate", (Deployment,), LET_IN_LATE), scenario))

    def passes(self, deployment, scenario):
        case = type("Case", (deployment, RecoveryChecks, DuplicateMessageChecks, unittest.TestCase), {})
        return case(scenario).run().wasSuccessful()


class Pairs:
    """Two pairs behind each router: every other request goes to the second, until the Rust router knows that it is dead.

    `down`: the second pair is dead, or its decode server refuses.
    """

    failed = FAILED
    router_timeout = slack = settling = returning = 0
    prefill_url = decode_url = base_host = bootstrap_port = router_url = prefills = decodes = None
    asks = [Query((number,), 1, right="right") for number in range(8)]

    def setUp(self):
        self.down, self.known, self.served, self.fate_rows = set(), Counter(), Counter(), []

    def routers(self):
        return ROUTERS

    def process(self, name):
        return SimpleNamespace(poll=lambda: 9 if name in self.down else None)

    def end(self, name):
        self.down.add(name)

    def start_again(self, name):
        self.down.discard(name)

    def wait_server_ready(self, url):
        pass

    prefill_2_url = decode_2_url = None

    def spoil(self):
        self.down.add("KV transfers to decode 2")

    def mend(self):
        self.down.discard("KV transfers to decode 2")

    def wait_idle(self):
        pass

    def outcome(self, url, number):
        dead = self.down and number % 2
        if dead and url == ROUTERS["Rust router"] and self.known[url] >= len(self.asks) and "decode 2" in self.down:
            dead = False
        self.known[url] += 1
        return self.failed if dead else SERVED

    def client(self, url, ask, bound):
        outcome = self.outcome(url, ask.prompt[0])
        self.served["pair"] += outcome.fate is Fate.SERVED
        return SimpleNamespace(result=lambda: outcome)

    def started(self):
        half = self.served["pair"] // 2
        return {role: {"1": half, "2": self.served["pair"] - half} for role in ("prefill", "decode")}

    def kv_transfers(self):
        each, received = self.served["pair"] // 4, Counter()
        for prefill in ("1", "2"):
            for decode in ("a", "b"):
                received[prefill, decode] = each
        return Counter({"1": 2 * each, "2": 2 * each}), received, Counter()


def mixed_up(self, url, number):
    outcome = Pairs.outcome(self, url, number)
    return replace(outcome, fate=Fate.WRONG) if number == 6 else outcome


def without_return(self, url, number):
    self.broken = getattr(self, "broken", False) or bool(self.down)
    return FAILED if self.broken and number % 2 else SERVED


def only_straight(self):
    """No prefill server works with the decode server of the other pair."""
    sent, _, failed = Pairs.kv_transfers(self)
    return sent, Counter({("1", "a"): sent["1"], ("2", "b"): sent["2"]}), failed


def one_lost(self):
    sent, received, failed = Pairs.kv_transfers(self)
    received["1", "a"] -= received["1", "a"] > 0
    return sent, received, failed


def started_twice(self):
    return Pairs.started(self) | {"decode": {"1": self.served["pair"], "2": self.served["pair"] // 8}}


def started_by_one(self):
    return Pairs.started(self) | {"prefill": {"1": self.served["pair"], "2": 0}}


LOAD, DEAD, BAD = (
    "test_pairs_are_right_under_load",
    "test_one_dead_pair_does_not_take_the_rest_down",
    "test_one_bad_decode_server_does_not_spoil_the_others",
)
BROKEN_PAIRS = {
    "mixed up": ({"outcome": mixed_up}, {LOAD, DEAD, BAD}),
    "clients hang": ({"failed": HUNG}, {DEAD, BAD}),
    "errors without a word": ({"failed": WORDLESS}, {DEAD, BAD}),
    "pairs fail together": ({"outcome": lambda self, url, number: FAILED if self.down else SERVED}, {DEAD, BAD}),
    "no return": ({"outcome": without_return}, {DEAD, BAD}),
    "only straight": ({"kv_transfers": only_straight}, {LOAD}),
    "a KV transfer is lost": ({"kv_transfers": one_lost}, {LOAD}),
    "started twice": ({"started": started_twice}, {LOAD}),
    "one server does it all": ({"asks": Pairs.asks * 4, "started": started_by_one}, {LOAD}),
    "rooms are kept": ({"wait_idle": fails("rooms are still held")}, {LOAD, BAD}),
}


class TestScaleOut(Scenarios, unittest.TestCase):
    sound, scenarios, broken = Pairs, {LOAD, DEAD, BAD}, BROKEN_PAIRS

    def passes(self, pairs, scenario):
        case = type("Case", (pairs, ScaleOutChecks, unittest.TestCase), {})(scenario)
        with mock.patch.object(scale_out, "QueryThread", case.client), mock.patch("builtins.print"):
            return case.run().wasSuccessful()

    def test_all_scenarios_are_here(self):
        self.assertEqual(self.scenarios, {name for name in dir(ScaleOutChecks) if name.startswith("test_")})


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
