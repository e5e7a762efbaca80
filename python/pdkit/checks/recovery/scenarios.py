"""Ends or freezes each part of a deployment and watches its clients, its other parts, and its return.

    class TestDisaggregationDSV4Recovery(RecoveryChecks, Fleet, EmbeddedServers):
        pass

An event strikes while requests are in flight in each phase, through each router, or while nothing is. Every client
must get an error or the right answer within a bound, requests that the survivors can serve must be served, and after
the restart on the same port, or the thaw, service must resume with nobody else restarted.
"""

import itertools
import time
from collections.abc import Callable, Sequence

from pdkit.checks.http import status_of
from pdkit.checks.recovery import table
from pdkit.checks.recovery.clients import Fate
from pdkit.checks.recovery.in_flight import ATTEMPTS, BEFORE, DURING, IDLE, RETURN_POLL_S, STREAMING, RequestsInFlight

GONE, FROZEN = "sent while it is gone", "sent while it is frozen"
IN_FLIGHT = (BEFORE, DURING, STREAMING)
ROUTERS = "load balancer", "router"


class RecoveryChecks(RequestsInFlight):
    """Put it before the fleet.

    impatience  seconds that a client waits whose router is frozen
    """

    needs: tuple[str, ...] = ("end", "freeze", "thaw")

    impatience = 3

    def test_decode_is_killed(self) -> None:
        self.kill(["decode"], served=())

    def test_prefill_is_killed(self) -> None:
        self.kill(["prefill"], served=(STREAMING,))

    def test_routers_are_killed(self) -> None:
        self.kill(ROUTERS, served=())

    def test_decode_is_killed_while_idle(self) -> None:
        self.kill(["decode"])

    def test_prefill_is_killed_while_idle(self) -> None:
        self.kill(["prefill"])

    def test_routers_are_killed_while_idle(self) -> None:
        self.kill(ROUTERS)

    def test_decode_freezes(self) -> None:
        self.freeze_longer(["decode"], served=())

    def test_decode_freezes_while_idle(self) -> None:
        self.freeze_longer(["decode"])

    def test_prefill_freezes(self) -> None:
        self.freeze_longer(["prefill"], served=(STREAMING,))

    def test_prefill_freezes_while_idle(self) -> None:
        self.freeze_longer(["prefill"])

    def test_routers_freeze(self) -> None:
        self.freeze_longer(ROUTERS, served=(), patience=self.impatience)

    def test_routers_freeze_while_idle(self) -> None:
        self.freeze_longer(ROUTERS, patience=self.impatience)

    def test_decode_freezes_for_a_moment(self) -> None:
        self.freeze_shortly(["decode"])

    def test_prefill_freezes_for_a_moment(self) -> None:
        self.freeze_shortly(["prefill"])

    def test_routers_freeze_for_a_moment(self) -> None:
        self.freeze_shortly(ROUTERS)

    def kill(self, victims: Sequence[str], served: Sequence[str] | None = None) -> None:
        """While requests are in flight, of which the phases `served` must be served; None: while nothing is."""
        event = f"{self.title(victims)} killed"
        self.wait_idle(self.servers())
        clients = {} if served is None else self.in_flight()
        struck = time.monotonic()
        for victim in victims:
            self.end(victim)
        self.turn_valve(None)
        rows = self.account(event, clients, struck, served or ())
        rows += self.while_away(event, GONE if clients else IDLE, victims)
        self.back(victims, rows, self.start_again)

    def freeze_longer(
        self, victims: Sequence[str], served: Sequence[str] | None = None, patience: float | None = None
    ) -> None:
        """As `kill`; clients wait for `patience` seconds, by default as long as the routers do."""
        event, may_hang = f"{self.title(victims)} frozen", patience is not None
        self.wait_idle(self.servers())
        clients = {} if served is None else self.in_flight(patience)
        struck = time.monotonic()
        self.freeze_all(victims)
        self.turn_valve(None)
        late = {FROZEN if clients else IDLE: self.send(IDLE, patience)}
        rows = self.account(event, clients, struck, served or (), may_hang)
        rows += self.account(event, late, None, (), may_hang)
        self.survivors_serve(victims)
        self.back(victims, rows, self.thaw)

    def freeze_shortly(self, victims: Sequence[str]) -> None:
        """A freeze that is over before anybody gives up costs time and nothing else."""
        event = f"{self.title(victims)} frozen for a moment"
        clients = self.in_flight()
        struck = time.monotonic()
        self.freeze_all(victims)
        self.turn_valve(None)
        late = self.send(IDLE)
        time.sleep(1.0)
        for victim in victims:
            self.thaw(victim)
        to_recovery = self.recoveries(time.monotonic())
        rows = self.account(event, clients, struck, IN_FLIGHT) + self.account(event, {FROZEN: late}, None, (FROZEN,))
        self.add(rows, to_recovery)
        self.wait_idle(self.servers())

    def while_away(self, event: str, phase: str, victims: Sequence[str]) -> list[table.Row]:
        """Requests that come while `victims` are gone get an error, and the others serve what they can."""
        rows = self.account(event, {phase: self.send(IDLE)}, None, ())
        self.survivors_serve(victims)
        return rows

    def back(self, victims: Sequence[str], rows: list[table.Row], bring: Callable[[str], None]) -> None:
        others = {name: self.process(name) for name in self.names() if name not in victims}
        begun = time.monotonic()
        for victim in victims:
            bring(victim)
        self.add(rows, self.recoveries(begun))
        kept = {name for name, process in others.items() if process is self.process(name) and process.poll() is None}
        restarted = sorted(others.keys() - kept)
        self.assertEqual(restarted, [], "had to be restarted, too")
        self.wait_idle(self.servers())
        with self.subTest("all is as before"):
            all_serve_by = time.monotonic() + self.readmission()
            for attempt in itertools.count(1):
                clients = [client for phase in self.right_asks for client in self.send(phase).values()]
                unserved = [outcome for client in clients if (outcome := client.result()).fate is not Fate.SERVED]
                starved = attempt < ATTEMPTS and all(each.seconds >= self.router_timeout - 1 for each in unserved)
                refused = time.monotonic() < all_serve_by and all(each.fate is Fate.FAILED for each in unserved)
                if not unserved or not (starved or refused):
                    break
                print(f"{rows[0].event}, asked again: {'given up' if starved else 'refused'}: {unserved}", flush=True)
                time.sleep(RETURN_POLL_S)
            self.assertEqual(unserved, [])

    def survivors_serve(self, victims: Sequence[str]) -> None:
        """What is left says that it is well, holds nothing for the dead, and does what needs no dead part."""
        alive = [name for name in self.servers() if name not in victims]
        for name in alive:
            url = self.servers()[name]
            self.assertEqual(status_of(f"{url}/health", self.settling), 200, name)
        self.wait_idle({name: self.servers()[name] for name in alive})
        if len(alive) == len(self.servers()):
            outcome = self.pair_by_hand(self.right_asks[IDLE])
            self.assertIs(outcome[0], Fate.SERVED, f"prefill and decode without a router: {outcome}")

    @staticmethod
    def title(victims: Sequence[str]) -> str:
        return victims[0] if len(victims) == 1 else "routers"

    def freeze_all(self, victims: Sequence[str]) -> None:
        for victim in victims:
            self.addCleanup(self.thaw, victim)
            self.freeze(victim)
