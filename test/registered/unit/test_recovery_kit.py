"""Each scenario of recovery and scale-out passes with a sound deployment, and fails with each that is broken.

The deployment is a stub: what is dead or frozen, and so what became of a request, is a set of names.
"""

import itertools
import math
import time
import unittest
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

from pdkit.checks import scale_out
from pdkit.checks.recovery import bootstrap_messages
from pdkit.checks.recovery import scenarios as recovery_scenarios
from pdkit.checks.recovery.bootstrap_messages import DuplicateMessageChecks
from pdkit.checks.recovery.clients import Fate, Outcome, Query
from pdkit.checks.recovery.in_flight import BEFORE, DURING, IDLE, STREAMING
from pdkit.checks.recovery.scenarios import IN_FLIGHT, RecoveryChecks
from pdkit.checks.scale_out import ScaleOutChecks
from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

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
    """`down`: parts that are dead or frozen. Subclasses are broken in one way each."""

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
            return Fate.FAILED, f"500: room {room} is in use", 0.1
        time.sleep(3 * bootstrap_messages.LATE_S)
        if not self.rooms[room, "decode" if side == "prefill" else "prefill"]:
            return Fate.FAILED, f"500: room {room} was lost", {"prefill": 6.1, "decode": 10.1}[side]
        return Fate.SERVED, "", 0.1


class AnswersOfOthers(Deployment):
    def outcome(self, phase, router):
        outcome = super().outcome(phase, router)
        return outcome if router == "mini LB" else replace(outcome, fate=Fate.WRONG)

    def timed_post(self, side, ask, room):
        fate, *rest = super().timed_post(side, ask, room)
        return (Fate.WRONG if fate is Fate.SERVED and side == "decode" else fate, *rest)


class WordlessErrors(Deployment):
    failed = WORDLESS

    def timed_post(self, side, ask, room):
        fate, error, seconds = super().timed_post(side, ask, room)
        return fate, error and "500: ", seconds


class HangingClients(Deployment):
    failed = HUNG

    def timed_post(self, side, ask, room):
        fate, error, seconds = super().timed_post(side, ask, room)
        return fate, error, seconds + 60


class NoReturn(Deployment):
    def until_served(self, url, begun):
        self.fail("does not serve after the return")


class LostAfterwards(Deployment):
    """What is asked once all should be as before fails."""

    def back(self, *args):
        self.outcome = lambda phase, router: FAILED
        super().back(*args)


class RankKeptOut(LostAfterwards):
    """The first request afterwards meets a rank that is not let in yet, and fails at once."""

    router_timeout, first = 60, FAILED

    def back(self, *args):
        outcomes = itertools.chain([self.first], itertools.repeat(SERVED))
        self.outcome = lambda phase, router: next(outcomes)
        super(LostAfterwards, self).back(*args)


class RanksLetInLate(RankKeptOut):
    def readmission(self):
        return 60.0


class WrongOnce(RanksLetInLate):
    first = replace(FAILED, fate=Fate.WRONG)


class RestartOfAll(Deployment):
    def start_again(self, name):
        for each in self.names():
            super().start_again(each)


class RoomsKept(Deployment):
    def wait_idle(self, servers):
        self.fail("rooms are still held")


class IllSurvivors(Deployment):
    def survivors_serve(self, victims):
        self.fail("a survivor is ill")


EVENTS = {name for name in dir(RecoveryChecks) if name.startswith("test_")}
KILLS = {name for name in EVENTS if "killed" in name}
MOMENTS = {name for name in EVENTS if "moment" in name}
MESSAGES = {name for name in dir(DuplicateMessageChecks) if name.startswith("test_")}
IMPATIENT = {"test_routers_freeze", "test_routers_freeze_while_idle"}
LATE = {"test_a_bootstrap_message_is_late"}
# What is broken: in which scenarios it must show.
BROKEN = {
    AnswersOfOthers: EVENTS | MESSAGES - {"test_a_bootstrap_message_is_lost"},
    WordlessErrors: (EVENTS - MOMENTS) | (MESSAGES - LATE),
    HangingClients: (EVENTS - MOMENTS - IMPATIENT) | (MESSAGES - LATE),
    NoReturn: EVENTS,
    LostAfterwards: EVENTS - MOMENTS,
    RankKeptOut: EVENTS - MOMENTS,
    WrongOnce: EVENTS - MOMENTS,
    RestartOfAll: KILLS,
    RoomsKept: EVENTS | (MESSAGES - LATE),
    IllSurvivors: EVENTS - MOMENTS,
}


class Scenarios:
    """`broken`: by deployment, in which of the `scenarios` it must show that it is not `sound`."""

    def test_a_sound_deployment_passes(self):
        for scenario in self.scenarios:
            with self.subTest(scenario):
                self.assertTrue(self.passes(self.sound, scenario))

    def test_a_broken_one_fails(self):
        for broken, scenarios in self.broken.items():
            for scenario in scenarios:
                with self.subTest(scenario, broken=broken.__name__):
                    self.assertFalse(self.passes(broken, scenario))


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
                self.assertTrue(self.passes(RanksLetInLate, scenario))

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


class PairsMixUp(Pairs):
    def outcome(self, url, number):
        outcome = super().outcome(url, number)
        return replace(outcome, fate=Fate.WRONG) if number == 6 else outcome


class PairsHang(Pairs):
    failed = HUNG


class PairsFailWithoutAWord(Pairs):
    failed = WORDLESS


class PairsFailTogether(Pairs):
    def outcome(self, url, number):
        return FAILED if self.down else SERVED


class PairsDoNotReturn(Pairs):
    def outcome(self, url, number):
        self.broken = getattr(self, "broken", False) or bool(self.down)
        return FAILED if self.broken and number % 2 else SERVED


class PairsOnlyStraight(Pairs):
    """No prefill server works with the decode server of the other pair."""

    def kv_transfers(self):
        sent, received, failed = super().kv_transfers()
        return sent, Counter({("1", "a"): sent["1"], ("2", "b"): sent["2"]}), failed


class PairsLoseTransfers(Pairs):
    def kv_transfers(self):
        sent, received, failed = super().kv_transfers()
        received["1", "a"] -= received["1", "a"] > 0
        return sent, received, failed


class PairsStartTwice(Pairs):
    def started(self):
        return super().started() | {"decode": {"1": self.served["pair"], "2": self.served["pair"] // 8}}


class PairsOfOneServer(Pairs):
    asks = Pairs.asks * 4

    def started(self):
        return super().started() | {"prefill": {"1": self.served["pair"], "2": 0}}


class PairsKeepRooms(Pairs):
    def wait_idle(self):
        raise AssertionError("rooms are still held")


LOAD, DEAD, BAD = (
    "test_pairs_are_right_under_load",
    "test_one_dead_pair_does_not_take_the_rest_down",
    "test_one_bad_decode_server_does_not_spoil_the_others",
)
BROKEN_PAIRS = {
    PairsMixUp: {LOAD, DEAD, BAD},
    PairsHang: {DEAD, BAD},
    PairsFailWithoutAWord: {DEAD, BAD},
    PairsFailTogether: {DEAD, BAD},
    PairsDoNotReturn: {DEAD, BAD},
    PairsOnlyStraight: {LOAD},
    PairsLoseTransfers: {LOAD},
    PairsStartTwice: {LOAD},
    PairsOfOneServer: {LOAD},
    PairsKeepRooms: {LOAD, BAD},
}


class TestScaleOut(Scenarios, unittest.TestCase):
    sound, scenarios, broken = Pairs, {LOAD, DEAD, BAD}, BROKEN_PAIRS

    def passes(self, pairs, scenario):
        case = type("Case", (pairs, ScaleOutChecks, unittest.TestCase), {})(scenario)
        with mock.patch.object(scale_out, "QueryThread", case.client), mock.patch("builtins.print"):
            return case.run().wasSuccessful()

    def test_all_scenarios_are_here(self):
        self.assertEqual(self.scenarios, {name for name in dir(ScaleOutChecks) if name.startswith("test_")})


if __name__ == "__main__":
    unittest.main()
