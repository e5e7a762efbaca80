"""What a router can get wrong between prefill and decode: lost, late and duplicate bootstrap messages.

A request goes to prefill and to decode with the same bootstrap room; here each is sent by hand.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pdkit.checks.http import bootstrap
from pdkit.checks.recovery import table
from pdkit.checks.recovery.clients import Fate, Outcome, Query, judge_answer
from pdkit.checks.recovery.in_flight import IDLE, RequestsInFlight

LATE_S = 1.0
Answered = tuple[Fate, str, float]  # error, seconds


class BootstrapMessageChecks(RequestsInFlight):
    """Lost and late messages."""

    def test_a_bootstrap_message_is_lost(self) -> None:
        """The side that waits for a peer that nobody told gives up by its own timeout."""
        ask = self.right_asks[IDLE]
        with ThreadPoolExecutor(2) as pool:
            waits = {
                "prefill": pool.submit(self.timed_post, "prefill", ask, self.new_room()),
                "decode": pool.submit(self.timed_post, "decode", ask, self.new_room()),
            }
        bounds = {"prefill": self.bootstrap_timeout, "decode": self.waiting_timeout}
        for side, wait in waits.items():
            fate, error, seconds = wait.result()
            self.note("bootstrap message lost", f"{side} waits", wait.result())
            with self.subTest(waits=side):
                self.assertIs(fate, Fate.FAILED, error)
                self.assertRegex(error, "^500: .*room")
                self.assertGreater(seconds, bounds[side] - 1)
                self.assertLess(seconds, bounds[side] + self.slack)
        self.assert_serves_on()

    def test_a_bootstrap_message_is_late(self) -> None:
        """Whoever comes second finds the first one waiting."""
        ask = self.right_asks[IDLE]
        for first, second in (("prefill", "decode"), ("decode", "prefill")):
            with self.subTest(late=second), ThreadPoolExecutor(2) as pool:
                room = self.new_room()
                early = pool.submit(self.timed_post, first, ask, room)
                time.sleep(LATE_S)
                late = pool.submit(self.timed_post, second, ask, room)
                answers = {first: early.result(), second: late.result()}
                self.note(f"bootstrap message {LATE_S:g} s late", f"{first} waits", *answers.values())
                self.assertIs(answers["decode"][0], Fate.SERVED, answers)

    def timed_post(self, side: str, ask: Query, room: int) -> Answered:
        """(fate, error, seconds); prefill's answer to a request that it transferred counts as the right one."""
        begun = time.monotonic()
        right, more = ask.right if side == "decode" else None, bootstrap(self.base_host, self.bootstrap_port, room)
        ask = replace(ask, right=right, more=more)
        answer = self.post(self.servers()[side], ask)
        fate, _, error = judge_answer(answer.status_code, answer.content, ask.right)
        return fate, error, time.monotonic() - begun

    def note(self, event: str, phase: str, *answers: Answered) -> None:
        """A row of the table; answers: of `timed_post`."""
        outcomes = [Outcome(fate, "", error, None, seconds) for fate, error, seconds in answers]
        spans = [outcome.seconds for outcome in outcomes]
        self.recovery_rows.append(table.Row.of(event, phase, table.BY_HAND, outcomes, spans))

    def new_room(self) -> int:
        return time.monotonic_ns()

    def assert_serves_on(self) -> None:
        self.wait_idle(self.servers())
        outcomes = [client.result() for client in self.send(IDLE).values()]
        self.assertEqual([outcome for outcome in outcomes if outcome.fate is not Fate.SERVED], [])


class DuplicateMessageChecks(BootstrapMessageChecks):
    """Duplicate ones, too, where the engine defines what becomes of them; SGLang's does not."""

    def test_a_bootstrap_message_is_duplicate(self) -> None:
        """One of the two is served, rightly; the other is refused, in words, at once."""
        ask = self.right_asks[IDLE]
        for twice, once in (("prefill", "decode"), ("decode", "prefill")):
            with self.subTest(twice=twice), ThreadPoolExecutor(3) as pool:
                room = self.new_room()
                doubles = [pool.submit(self.timed_post, twice, ask, room) for _ in range(2)]
                time.sleep(LATE_S)
                single = pool.submit(self.timed_post, once, ask, room).result()
                answers = [double.result() for double in doubles]
                self.note("bootstrap message duplicate", f"{twice} hears twice", single, *answers)
                refused = [error for fate, error, _ in answers if fate is Fate.FAILED]
                self.assertEqual(len(refused), 1, answers)
                self.assertRegex(refused[0], "^(4..|500): .*room.*(in use|already taken)")
                self.assertLess(max(seconds for _, _, seconds in answers), LATE_S + self.slack)
                decoded = single if once == "decode" else next(a for a in answers if a[0] is not Fate.FAILED)
                self.assertIs(decoded[0], Fate.SERVED, answers)
        self.assert_serves_on()
