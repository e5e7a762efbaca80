"""A mixin that ends or freezes each part of a deployment and watches its clients, its other parts, and its return.

    class TestDisaggregationDSV4Recovery(RecoveryMixin, FleetMixin, TestDisaggregationDSV4Embedded):
        test_gsm8k = None

An event strikes while requests are in flight in each phase, through each router, or while nothing is. Every client
must hear an error or the right answer within a bound, requests that the survivors can serve must be served, and after
the restart on the same port, or the thaw, service must resume with nobody else restarted.

What bounds a client of a part that is gone: its connection breaks, at once. Of a part that is frozen: the router's
--request-timeout-secs (1800 unless set; it counts from the request to the end of the answer), and if the router itself
is frozen, nothing but the client's own timeout. What bounds a server whose peer keeps quiet:
SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT on prefill, SGLANG_DISAGGREGATION_WAITING_TIMEOUT on decode (300 each).
"""

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import requests

from pdkit.core import events
from pdkit.recovery import held, table
from pdkit.recovery.clients import Ask, Client, Fate, judge_answer, token_ids

BEFORE, DURING, STREAMING, IDLE, GONE, FROZEN = (
    "before the hand-over", "during it", "streaming", "idle", "sent while it is gone", "sent while it is frozen",
)  # fmt: skip
IN_FLIGHT = (BEFORE, DURING, STREAMING)
POLL_S, RETURN_POLL_S = 0.02, 0.3
REACH_S = 0.1
BLINK_S = 0.5
ATTEMPTS = 3
HELD_TRANSFER = ["--disaggregation-transfer-backend", "pdkit.recovery.held:HeldTransfer"]


class RecoveryMixin:
    """Put it before FleetMixin.

    impatience  seconds that a client waits whose router is frozen
    bitwise     an answer is the same to the bit whoever else is served; else streams are judged by how they end
    """

    impatience = 3
    bitwise = True
    recovery_rows = None

    # How requests are kept in a phase until the event strikes; None where the engine offers no way.
    valve = None

    @classmethod
    def asks(cls):
        """What is in flight in each phase."""
        return {
            BEFORE: Ask(token_ids(held.HELD_BEFORE), 4),
            DURING: Ask(token_ids(held.HELD_DURING), 4),
            STREAMING: Ask("one two three", 80, stream=True),
            IDLE: Ask(token_ids(70), 8),
        }

    @classmethod
    def configure(cls):
        super().configure()
        cls.recovery_rows = []

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        try:
            cls.right_asks = {phase: cls.answered(ask) for phase, ask in cls.asks().items()}
        except BaseException:
            cls.tearDownClass()
            raise

    @classmethod
    def answered(cls, ask):
        """`ask` with its right answer: what all routers say while all is well."""
        outcomes = [Client(url, ask, cls.returning).result() for url in cls.routers().values()]
        assert all(outcome.fate is Fate.SERVED for outcome in outcomes), f"before any event: {outcomes}"
        if ask.stream and not cls.bitwise:
            return ask
        assert len({outcome.text for outcome in outcomes}) == 1, f"the routers do not agree: {outcomes}"
        return replace(ask, right=outcomes[0].text)

    def setUp(self):
        """What an earlier scenario left dead is started again: it is not this one's."""
        super().setUp()
        for name in self.names():
            if self.process(name).poll() is not None:
                self.start_again(name)
        for url in self.routers().values():
            self.until_served(url, time.monotonic())

    @classmethod
    def tearDownClass(cls):
        rows, cls.recovery_rows = cls.recovery_rows, None
        if rows:
            bound = cls.router_timeout + cls.slack
            about = {"rung": cls.rung, "engine": cls.engine, "bound_s": bound}
            path = os.path.join(cls.log_dir, table.FILE_NAME)
            table.save(rows, path, **about)
            print(f"{table.markdown(rows)}\nbound of a client: {bound} s; {path}", flush=True)
            for title, part in table.parts(rows):
                events.table(title, *table.grid(part), note=f"no client waits longer than {bound} s")
        super().tearDownClass()

    # The events

    def test_decode_is_killed(self):
        self.kill(["decode"], served=())

    def test_prefill_is_killed(self):
        self.kill(["prefill"], served=(STREAMING,))

    def test_routers_are_killed(self):
        self.kill(["load balancer", "router"], served=())

    def test_decode_is_killed_while_idle(self):
        self.kill_idle(["decode"])

    def test_prefill_is_killed_while_idle(self):
        self.kill_idle(["prefill"])

    def test_routers_are_killed_while_idle(self):
        self.kill_idle(["load balancer", "router"])

    def test_decode_freezes(self):
        self.freeze_longer(["decode"], served=())

    def test_decode_freezes_while_idle(self):
        self.freeze_idle(["decode"])

    def test_prefill_freezes(self):
        self.freeze_longer(["prefill"], served=(STREAMING,))

    def test_prefill_freezes_while_idle(self):
        self.freeze_idle(["prefill"])

    def test_routers_freeze(self):
        self.freeze_longer(["load balancer", "router"], served=(), patience=self.impatience)

    def test_routers_freeze_while_idle(self):
        self.freeze_idle(["load balancer", "router"], patience=self.impatience)

    def test_decode_freezes_for_a_moment(self):
        self.freeze_shortly(["decode"])

    def test_prefill_freezes_for_a_moment(self):
        self.freeze_shortly(["prefill"])

    def test_routers_freeze_for_a_moment(self):
        self.freeze_shortly(["load balancer", "router"])

    # What a kind of event does

    def kill(self, victims, served):
        event = f"{self.title(victims)} killed"
        clients = self.in_flight()
        struck = time.monotonic()
        for victim in victims:
            self.end(victim)
        self.turn_valve(None)
        rows = self.account(event, clients, struck, served)
        rows += self.while_away(event, GONE, victims)
        self.back(victims, rows, self.start_again)

    def kill_idle(self, victims):
        event = f"{self.title(victims)} killed"
        self.wait_idle(self.servers())
        for victim in victims:
            self.end(victim)
        self.back(victims, self.while_away(event, IDLE, victims), self.start_again)

    def freeze_longer(self, victims, served, patience=None):
        event = f"{self.title(victims)} frozen"
        clients = self.in_flight(patience)
        struck = time.monotonic()
        self.freeze_all(victims)
        self.turn_valve(None)
        late = self.send(IDLE, patience)
        rows = self.account(event, clients, struck, served, may_hang=patience is not None)
        rows += self.account(event, {FROZEN: late}, None, (), may_hang=patience is not None)
        self.survivors_serve(victims)
        self.back(victims, rows, self.thaw)

    def freeze_idle(self, victims, patience=None):
        event = f"{self.title(victims)} frozen"
        self.wait_idle(self.servers())
        self.freeze_all(victims)
        rows = self.account(event, {IDLE: self.send(IDLE, patience)}, None, (), may_hang=patience is not None)
        self.survivors_serve(victims)
        self.back(victims, rows, self.thaw)

    def freeze_shortly(self, victims):
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

    def while_away(self, event, phase, victims):
        """Requests that come while `victims` are gone get an error, and the others serve what they can."""
        rows = self.account(event, {phase: self.send(IDLE)}, None, ())
        self.survivors_serve(victims)
        return rows

    def back(self, victims, rows, bring):
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
            for _ in range(ATTEMPTS):
                clients = [client for phase in self.right_asks for client in self.send(phase).values()]
                unserved = [outcome for client in clients if (outcome := client.result()).fate is not Fate.SERVED]
                if not unserved or any(outcome.seconds < self.router_timeout - 1 for outcome in unserved):
                    break
                print(f"{rows[0].event}: given up by the router, on a starved machine perhaps: {unserved}", flush=True)
            self.assertEqual(unserved, [])

    # Clients

    def send(self, phase, patience=None):
        """A client at each router, by name."""
        timeout = patience or self.router_timeout + self.slack
        return {name: Client(url, self.right_asks[phase], timeout) for name, url in self.routers().items()}

    def in_flight(self, patience=None):
        """Clients of each phase, each of them in it: phase -> router -> Client."""
        self.addCleanup(self.turn_valve, None)
        for _ in range(ATTEMPTS):
            self.wait_idle(self.servers())
            self.turn_valve(held.Valve.HOLD)
            if self.valve is None:  # what only waits for prefill is soon served: it comes last
                clients, staged = {STREAMING: self.streams(patience)}, True
                clients |= {phase: self.send(phase, patience) for phase in (DURING, BEFORE)}
                time.sleep(REACH_S)
            else:
                clients = {phase: self.send(phase, patience) for phase in (BEFORE, DURING)}
                staged = self.wait_in_phase(clients)
                clients[STREAMING] = self.streams(patience)
            every = [client for by_router in clients.values() for client in by_router.values()]
            if staged and all(client.outcome is None for client in every):
                return clients
            self.turn_valve(None)
            outcomes = [client.result() for client in every]
        self.fail(f"requests do not stay in flight until the event strikes: {outcomes}")

    def streams(self, patience):
        """Clients of STREAMING, each with the first piece of its answer."""
        clients = self.send(STREAMING, patience)
        for client in clients.values():
            client.begun.wait(self.router_timeout)
        return clients

    def turn_valve(self, word):
        if self.valve is not None:
            self.valve.turn(word)

    def wait_in_phase(self, clients):
        """True once prefill holds a room for each, and those of DURING are half sent; False if that does not come."""
        deadline = time.monotonic() + self.waiting_timeout
        rooms, sending = sum(map(len, clients.values())), len(clients[DURING])
        while time.monotonic() < deadline:
            info = requests.get(f"{self.prefill_url}/server_info", timeout=self.settling).json()
            if (info["rooms"], info["sending"]) == (rooms, sending):
                return True
            time.sleep(POLL_S)
        return False

    def account(self, event, clients, struck, served, may_hang=False):
        """Rows of clients by phase and router, once all have ended. Phases of `served` must get their answers.

        struck: monotonic seconds of the event; None if the requests were sent after it.
        """
        rows = []
        for phase, by_router in clients.items():
            for router, client in by_router.items():
                outcome = client.result()
                seconds = (
                    outcome.seconds if struck is None else max(0.0, (client.ended_at or time.monotonic()) - struck)
                )
                rows.append(table.Row.of(event, phase, router, [outcome], [seconds]))
                about = f"{event}, {phase}, through {router}: {outcome}"
                with self.subTest(event=event, phase=phase, router=router):
                    self.assertIsNot(outcome.fate, Fate.WRONG, about)
                    if phase in served:
                        self.assertIs(outcome.fate, Fate.SERVED, about)
                    elif outcome.fate is Fate.SERVED and struck is not None and seconds < BLINK_S:
                        continue  # its last word was under way when the event struck
                    elif not (may_hang and outcome.fate is Fate.HUNG):
                        self.assertIs(outcome.fate, Fate.FAILED, about)
                        self.assertTrue(outcome.is_clear, about)
        return rows

    def recoveries(self, begun):
        """`until_served` of each router, by name."""
        with ThreadPoolExecutor(len(self.routers())) as pool:
            waits = {name: pool.submit(self.until_served, url, begun) for name, url in self.routers().items()}
        return {name: wait.result() for name, wait in waits.items()}

    def until_served(self, url, begun):
        """Seconds from `begun` to the first right answer."""
        deadline = time.monotonic() + self.returning
        outcome = None
        while time.monotonic() < deadline:
            client = Client(url, self.right_asks[IDLE], self.router_timeout + self.slack)
            outcome = client.result()
            self.assertIsNot(outcome.fate, Fate.WRONG, f"on the way back: {outcome}")
            if outcome.fate is Fate.SERVED:
                return client.ended_at - begun
            time.sleep(RETURN_POLL_S)
        self.fail(f"{url} does not serve {self.returning} s after the return: {outcome}")

    # Survivors

    def survivors_serve(self, victims):
        """What is left says that it is well, holds nothing for the dead, and does what needs no dead part."""
        alive = [name for name in self.servers() if name not in victims]
        for name in alive:
            url = self.servers()[name]
            self.assertEqual(requests.get(f"{url}/health", timeout=self.settling).status_code, 200, name)
        self.wait_idle({name: self.servers()[name] for name in alive})
        if len(alive) == len(self.servers()):
            outcome = self.pair_by_hand(self.right_asks[IDLE])
            self.assertIs(outcome[0], Fate.SERVED, f"prefill and decode without a router: {outcome}")

    def pair_by_hand(self, ask, room=None):
        """(fate, text, error) of what decode says to a request that goes to prefill and decode as a router sends it."""
        ask = replace(ask, more=self.bootstrap(room or time.monotonic_ns()))
        with ThreadPoolExecutor(2) as pool:
            prefill, decode = (pool.submit(self.post, url, ask) for url in self.servers().values())
            prefill.result()
            answer = decode.result()
        return judge_answer(answer.status_code, answer.content, ask.right)

    def post(self, url, ask):
        return requests.post(f"{url}/generate", json=ask.generate_body(), timeout=self.waiting_timeout + self.slack)

    def bootstrap(self, room):
        host, port = self.base_host, int(self.bootstrap_port)
        return {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": room}

    def wait_idle(self, servers):
        """Until none of `servers` (name -> url) holds a room or a request; only where an engine tells."""
        deadline, held_now = time.monotonic() + self.settling, {}
        while time.monotonic() < deadline:
            held_now = {name: self.held_by(url) for name, url in servers.items()}
            if not any(any(counts) for counts in held_now.values()):
                return
            time.sleep(POLL_S)
        self.fail(f"{self.settling} s later, (rooms, requests) are still held: {held_now}")

    def held_by(self, url):
        info = requests.get(f"{url}/server_info", timeout=self.settling).json()
        if "rooms" not in info:
            return ()
        return info["rooms"], sum(state.get("running_requests", 0) for state in info.get("internal_states", ()))

    @classmethod
    def servers(cls):
        return {"prefill": cls.prefill_url, "decode": cls.decode_url}

    @classmethod
    def names(cls):
        return [*cls._slots, *cls.fleet]

    @staticmethod
    def title(victims):
        return victims[0] if len(victims) == 1 else "routers"

    def freeze_all(self, victims):
        for victim in victims:
            self.addCleanup(self.thaw, victim)
            self.freeze(victim)

    def add(self, rows, to_recovery):
        self.recovery_rows.extend(replace(row, to_recovery=to_recovery[row.router]) for row in rows)


class HandoverValveMixin:
    """For the embedded engine: `valve` rules the servers whose transfer backend is `HELD_TRANSFER`."""

    @classmethod
    def configure(cls):
        super().configure()
        directory = tempfile.TemporaryDirectory(prefix="hand-overs-")
        cls.addClassCleanup(directory.cleanup)
        cls.valve = held.Valve(os.path.join(directory.name, "valve"))
        cls.valve.turn(None)
        cls.server_env = {**cls.server_env, held.VARIABLE: str(cls.valve.path)}


class HeldHandoversMixin(HandoverValveMixin):
    """Hand-overs wait until the event strikes. Put it between RecoveryMixin and the rung."""

    @classmethod
    def prefill_args(cls):
        return super().prefill_args() + HELD_TRANSFER
