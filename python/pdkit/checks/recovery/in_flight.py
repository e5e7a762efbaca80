"""Requests in flight in each phase, through each router, and what became of them.

What bounds a client of a part that is gone: its connection breaks, at once. Of a part that is frozen: the router's
--request-timeout-secs (1800 unless set; it counts from the request to the end of the answer), and if the router itself
is frozen, nothing but the client's own timeout. What bounds a server whose peer keeps quiet:
SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT on prefill, SGLANG_DISAGGREGATION_WAITING_TIMEOUT on decode (300 each).
"""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import requests

from pdkit.checks.accounting.counters import still_held
from pdkit.checks.base import Checks
from pdkit.checks.http import bootstrap, post
from pdkit.checks.recovery import table
from pdkit.checks.recovery.clients import Fate, Query, QueryThread, judge_answer, token_ids
from pdkit.checks.server_info import data_parallel_ranks, read_server_info
from pdkit.core import events
from pdkit.core.processes import wait_until
from pdkit.engine import test_backends

if TYPE_CHECKING:
    from pdkit.deployment.fleet import Fleet
else:
    Fleet = object

BEFORE, DURING, STREAMING, IDLE = "before the KV transfer", "during it", "streaming", "idle"
RETURN_POLL_S = 0.3
REACH_S = 0.1
BLINK_S = 0.5
ATTEMPTS = 3


class RequestsInFlight(Checks, Fleet):
    """What recovery checks share; by itself it has no test.

    bitwise  an answer is the same to the bit whoever else is served; else streams are judged by how they end
    valve    how requests are kept in a phase until the event strikes; None where the engine offers no way

    Seconds are those of the fleet: see `router_timeout` and the others there.
    """

    needs: tuple[str, ...] = (
        "prefill_url", "decode_url", "base_host", "bootstrap_port", "target", "engine", "log_dir", "configure",
        "names", "routers", "process", "start_again",
        "router_timeout", "slack", "settling", "returning", "bootstrap_timeout", "waiting_timeout",
    )  # fmt: skip

    bitwise = True
    recovery_rows: list[table.Row] = []
    right_asks: dict[str, Query]
    valve: test_backends.Valve | None = None

    @classmethod
    def asks(cls) -> dict[str, Query]:
        """What is in flight in each phase."""
        return {
            BEFORE: Query(token_ids(test_backends.HELD_BEFORE), 4),
            DURING: Query(token_ids(test_backends.HELD_DURING), 4),
            STREAMING: Query("one two three", 80, stream=True),
            IDLE: Query(token_ids(70), 8),
        }

    @classmethod
    def configure(cls) -> None:
        super().configure()
        cls.recovery_rows = []

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.right_asks = {phase: cls.answered(ask) for phase, ask in cls.asks().items()}

    @classmethod
    def answered(cls, ask: Query) -> Query:
        """`ask` with its right answer: what all routers say while all is well."""
        outcomes = [QueryThread(url, ask, cls.returning).result() for url in cls.routers().values()]
        assert all(outcome.fate is Fate.SERVED for outcome in outcomes), f"before any event: {outcomes}"
        if ask.stream and not cls.bitwise:
            return ask
        assert len({outcome.text for outcome in outcomes}) == 1, f"the routers do not agree: {outcomes}"
        return replace(ask, right=outcomes[0].text)

    def setUp(self) -> None:
        """What an earlier scenario left dead is started again: it is not this one's."""
        super().setUp()
        for name in self.names():
            if self.process(name).poll() is not None:
                self.start_again(name)
        for url in self.routers().values():
            self.until_served(url, time.monotonic())

    @classmethod
    def tearDownClass(cls) -> None:
        rows, cls.recovery_rows = cls.recovery_rows, []
        if rows:
            bound = cls.router_timeout + cls.slack
            about = {"target": cls.target, "engine": cls.engine, "bound_s": bound}
            path = os.path.join(cls.log_dir or "", table.FILE_NAME)
            table.save(rows, path, **about)
            print(f"{table.markdown(rows)}\nbound of a client: {bound} s; {path}", flush=True)
            for title, part in table.parts(rows):
                events.table(title, *table.grid(part), note=f"no client waits longer than {bound} s")
        super().tearDownClass()

    def send(self, phase: str, patience: float | None = None) -> dict[str, QueryThread]:
        """A client at each router, by name."""
        timeout = patience or self.router_timeout + self.slack
        return {name: QueryThread(url, self.right_asks[phase], timeout) for name, url in self.routers().items()}

    def in_flight(self, patience: float | None = None) -> dict[str, dict[str, QueryThread]]:
        """Clients of each phase, each of them in it: phase -> router -> QueryThread."""
        self.addCleanup(self.turn_valve, None)
        for _ in range(ATTEMPTS):
            self.wait_idle(self.servers())
            self.turn_valve(test_backends.Valve.HOLD)
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

    def streams(self, patience: float | None) -> dict[str, QueryThread]:
        """Clients of STREAMING, each with the first piece of its answer."""
        clients = self.send(STREAMING, patience)
        for client in clients.values():
            client.begun.wait(self.router_timeout)
        return clients

    def turn_valve(self, word: str | None) -> None:
        if self.valve is not None:
            self.valve.turn(word)

    def wait_in_phase(self, clients: Mapping[str, Mapping[str, QueryThread]]) -> bool:
        """True once prefill holds a room for each, and those of DURING are half sent; False if that does not come."""
        wanted = sum(map(len, clients.values())), len(clients[DURING])

        def are_staged() -> bool:
            info = read_server_info(self.prefill_url, self.settling)
            return (info["rooms"], info["sending"]) == wanted

        return wait_until(are_staged, self.waiting_timeout)

    def account(
        self,
        event: str,
        clients: Mapping[str, Mapping[str, QueryThread]],
        struck: float | None,
        served: Sequence[str],
        may_hang: bool = False,
    ) -> list[table.Row]:
        """Rows of clients by phase and router, once all have ended. Phases of `served` must get their answers.

        struck: monotonic seconds of the event; None if the requests were sent after it.
        """
        rows = []
        for phase, by_router in clients.items():
            for router, client in by_router.items():
                outcome = client.result()
                seconds = (
                    outcome.seconds if struck is None else max(0.0, min(client.ended_at, time.monotonic()) - struck)
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

    def recoveries(self, begun: float) -> dict[str, float]:
        """`until_served` of each router, by name."""
        with ThreadPoolExecutor(len(self.routers())) as pool:
            waits = {name: pool.submit(self.until_served, url, begun) for name, url in self.routers().items()}
        return {name: wait.result() for name, wait in waits.items()}

    def until_served(self, url: str, begun: float) -> float:
        """Seconds from `begun` to the first right answer."""
        deadline = time.monotonic() + self.returning
        outcome = None
        while time.monotonic() < deadline:
            client = QueryThread(url, self.right_asks[IDLE], self.router_timeout + self.slack)
            outcome = client.result()
            self.assertIsNot(outcome.fate, Fate.WRONG, f"on the way back: {outcome}")
            if outcome.fate is Fate.SERVED:
                return client.ended_at - begun
            time.sleep(RETURN_POLL_S)
        self.fail(f"{url} does not serve {self.returning} s after the return: {outcome}")

    def readmission(self) -> float:
        """Seconds after the first right answer within which all ranks must serve; 0 where there is one.

        A rank of prefill blacklists the session of a decode rank to which a transfer failed, until a probe of its own
        succeeds (`MooncakeKVManager.failed_session_probes`; the first after SGLANG_FAILED_SESSION_PROBE_INTERVAL_S, 30 s,
        then after twice as long each time): the first right answer is of ranks that are not blacklisted.
        """
        return self.settling if data_parallel_ranks(read_server_info(self.prefill_url, self.settling)) > 1 else 0

    def pair_by_hand(self, ask: Query) -> tuple[Fate, str, str]:
        """(fate, text, error) of what decode says to a request that goes to prefill and decode as a router sends it."""
        ask = replace(ask, more=bootstrap(self.base_host, self.bootstrap_port))
        with ThreadPoolExecutor(2) as pool:
            prefill, decode = (pool.submit(self.post, url, ask) for url in self.servers().values())
            prefill.result()
            answer = decode.result()
        return judge_answer(answer.status_code, answer.content, ask.right)

    def post(self, url: str, ask: Query) -> requests.Response:
        return post(url, "/generate", ask.generate_body(), self.waiting_timeout + self.slack)

    def wait_idle(self, servers: Mapping[str, str]) -> None:
        """Until none of `servers` (name -> url) holds a room or a request; only where an engine tells."""
        if held := still_held(servers.values(), self.settling):
            self.fail(f"{self.settling} s later, (rooms, requests) are still held: {held}")

    @classmethod
    def servers(cls) -> dict[str, str]:
        return {"prefill": cls.prefill_url, "decode": cls.decode_url}

    def add(self, rows: list[table.Row], to_recovery: Mapping[str, float]) -> None:
        self.recovery_rows.extend(replace(row, to_recovery=to_recovery[row.router]) for row in rows)
