"""Two prefill and two decode servers behind one router: pairs are right under load, and fail alone."""

import itertools
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import scipy

from pdkit.checks.accounting.counters import still_held
from pdkit.checks.base import Checks
from pdkit.checks.http import bootstrap, flush_caches
from pdkit.checks.recovery.clients import Fate, Outcome, Query, QueryThread, token_ids
from pdkit.checks.server_info import read_server_info
from pdkit.core import events, processes
from pdkit.deployment.router import healthy_workers

if TYPE_CHECKING:
    from pdkit.deployment.fleet import TwoPairs
else:
    TwoPairs = object

POLL_S = 0.05
UNFAIR = 1e-6  # the probability of a share that is no accident


class ScaleOutChecks(Checks, TwoPairs):
    """Put it before the servers.

    load     requests that are in flight at once, through each router
    lengths  of their prompts; tokens
    """

    needs: tuple[str, ...] = (
        "prefill_url", "decode_url", "prefill_2_url", "decode_2_url", "base_host", "bootstrap_port", "router_url",
        "prefills", "decodes", "routers", "process", "end", "start_again", "wait_server_ready",
        "router_timeout", "slack", "settling", "returning",
    )  # fmt: skip

    load = 32
    lengths = (20, 60, 100, 150, 250)
    new_tokens = 4
    fate_rows: list[list[str]] = []
    asks: list[Query]

    @classmethod
    def setUpClass(cls) -> None:
        cls.fate_rows = []
        super().setUpClass()
        cls.wait_until_all_are_known()
        cls.asks = cls.right_asks()

    @classmethod
    def wait_until_all_are_known(cls) -> None:
        """The Rust router is ready with one pair."""
        wanted = len(cls.prefills()) + len(cls.decodes())
        known = processes.wait_until(lambda: healthy_workers(cls.router_url) >= wanted, cls.settling)
        assert known, f"{cls.router_url} knows {healthy_workers(cls.router_url)} of {wanted} servers"

    @classmethod
    def tearDownClass(cls) -> None:
        rows, cls.fate_rows = cls.fate_rows, []
        if rows:
            events.table("scale-out", ["event", "router", *(fate.value for fate in Fate), "longest"], rows)
        super().tearDownClass()

    @classmethod
    def right_asks(cls) -> list[Query]:
        """The load, and what the first pair alone answers to each, one at a time."""
        lengths = itertools.islice(itertools.cycle(cls.lengths), cls.load)
        asks = [Query(token_ids(length, number), cls.new_tokens) for number, length in enumerate(lengths)]
        outcomes = [cls.answer_by_hand(ask, room) for room, ask in enumerate(asks, start=1)]  # SGLang: 0 is no room
        assert all(outcome.fate is Fate.SERVED for outcome in outcomes), f"before any load: {outcomes}"
        return [replace(ask, right=outcome.text) for ask, outcome in zip(asks, outcomes)]

    @classmethod
    def answer_by_hand(cls, ask: Query, room: int) -> Outcome:
        ask = replace(ask, more=bootstrap(cls.base_host, cls.bootstrap_port, room))
        clients = [QueryThread(url, ask, cls.returning) for url in (cls.prefill_url, cls.decode_url)]
        return [client.result() for client in clients][-1]

    def test_pairs_are_right_under_load(self) -> None:
        """Each decode server got from each prefill server as many KV transfers as that one sent it.

        Through each router by itself each request is started once on each side, and no server has a share that a
        router which draws among two would hardly ever give it.
        """
        before, count = self.kv_transfers(), 0
        for router, url in self.routers().items():
            started = self.started()
            clients = [QueryThread(url, ask, self.bound) for ask in self.asks]
            outcomes = [client.result() for client in clients]
            self.assertEqual([outcome for outcome in outcomes if outcome.fate is not Fate.SERVED], [])
            self.wait_idle()
            count += len(clients)
            shares = {role: {server: counts[server] - started[role][server] for server in counts}
                      for role, counts in self.started().items()}  # fmt: skip
            print(f"requests started through the {router}: {shares}", flush=True)
            for role, share in shares.items():
                self.assertEqual(sum(share.values()), len(clients), f"{role} started a request twice, or not: {router}")
                for server, got in share.items():
                    p_value = scipy.stats.binomtest(got, len(clients), 1 / len(share)).pvalue
                    self.assertGreater(p_value, UNFAIR, f"{router}: {got} of {len(clients)} requests went to {server}")
        if before is None:
            print("this engine does not count KV transfers: only the answers are compared", flush=True)
            return
        after = self.kv_transfers()
        assert after is not None
        sent, received, failed = after[0] - before[0], after[1] - before[1], after[2] - before[2]
        print(f"KV transfers by (prefill, decode): {dict(received)}; sent: {dict(sent)}", flush=True)
        self.assertEqual(failed.total(), 0)
        self.assertEqual(sent.total(), count)
        for prefill in sent:
            self.assertEqual(sum(count for pair, count in received.items() if pair[0] == prefill), sent[prefill])
        self.assertEqual(len(received), 4, "every prefill server works with every decode server")

    def test_one_dead_pair_does_not_take_the_rest_down(self) -> None:
        self.addCleanup(self.revive)
        for name in ("prefill 2", "decode 2"):
            self.end(name)
        fates = self.fates()
        self.assertEqual(fates["mini LB"].keys(), {Fate.SERVED, Fate.FAILED}, "it knows nothing of who lives")
        self.assertNotIn(Fate.WRONG, fates["Rust router"])
        self.wait_until_all_served("Rust router")
        self.revive()

    def test_one_bad_decode_server_does_not_spoil_the_others(self) -> None:
        """It says that it is well, and refuses what it is handed."""
        self.addCleanup(self.mend)
        self.spoil()
        fates = self.fates()
        for router in self.routers():
            self.assertIn(Fate.SERVED, fates[router], router)
            self.assertIn(Fate.FAILED, fates[router], router)
        self.wait_idle()
        self.mend()
        for router in self.routers():
            self.wait_until_all_served(router)

    def spoil(self) -> None:
        """Makes decode 2 refuse every KV transfer."""
        self.skipTest("this engine offers no way to refuse a KV transfer")

    def mend(self) -> None:
        """Makes decode 2 take them again."""

    @property
    def bound(self) -> float:
        return self.router_timeout + self.slack

    def fates(self) -> dict[str, Counter[Fate]]:
        """How many requests of the load had which fate, by router; none may be wrong, hang or fail without a word."""
        clients = {
            name: [QueryThread(url, ask, self.bound) for ask in self.asks] for name, url in self.routers().items()
        }
        fates = {}
        for router, each in clients.items():
            outcomes = [client.result() for client in each]
            fates[router] = Counter(outcome.fate for outcome in outcomes)
            longest = max(outcome.seconds for outcome in outcomes)
            counts = ", ".join(f"{count} {fate.value}" for fate, count in fates[router].items())
            print(f"{self._testMethodName}, {router}: {counts}; the longest took {longest:.1f} s", flush=True)
            event = self._testMethodName.removeprefix("test_").replace("_", " ")
            self.fate_rows.append([event, router, *(str(fates[router][fate]) for fate in Fate), f"{longest:.1f} s"])
            bad = [outcome for outcome in outcomes if outcome.fate in (Fate.WRONG, Fate.HUNG)]
            self.assertEqual(bad, [], router)
            unclear = [outcome for outcome in outcomes if outcome.fate is Fate.FAILED and not outcome.is_clear]
            self.assertEqual(unclear, [], router)
        return fates

    def wait_until_all_served(self, router: str) -> None:
        deadline, url = time.monotonic() + self.settling, self.routers()[router]
        while True:
            outcomes = [client.result() for client in [QueryThread(url, ask, self.bound) for ask in self.asks]]
            failed = [outcome for outcome in outcomes if outcome.fate is not Fate.SERVED]
            if not failed:
                return
            self.assertLess(time.monotonic(), deadline, f"{router} still fails: {failed[0]}")
            time.sleep(POLL_S)

    def revive(self) -> None:
        """Starts again what is dead, and waits until every router serves all."""
        dead = [name for name in ("prefill 2", "decode 2") if self.process(name).poll() is not None]
        for name in dead:
            self.start_again(name)
        for url in (self.prefill_2_url, self.decode_2_url) if dead else ():
            self.wait_server_ready(f"{url}/health")
        for router in self.routers() if dead else ():
            self.wait_until_all_served(router)

    def kv_transfers(self) -> tuple[Counter[str], Counter[tuple[str, str]], Counter[str]] | None:
        """(sent by prefill, received by (prefill, decode), failed by server), as the servers count them; None if not."""
        sent, failed = Counter[str](), Counter[str]()
        received = Counter[tuple[str, str]]()
        if "transfer" not in self.info(self.prefill_url):
            return None
        for url, bootstrap_port in self.prefills():
            transfer = self.info(url)["transfer"]
            sent[bootstrap_port], failed[url] = transfer["sent"], transfer["failed"]
        for url in self.decodes():
            info = self.info(url)
            failed[url] = info["transfer"]["failed"]
            for address, count in info["received_from"].items():
                received[address.rpartition(":")[2], url] = count
        return sent, received, failed

    def started(self) -> dict[str, dict[str, int]]:
        """Requests that each server has started, by role and URL; nothing where the engine does not count them."""
        urls = {"prefill": [url for url, _ in self.prefills()], "decode": self.decodes()}
        found = {role: {url: self.info(url).get("engine") for url in each} for role, each in urls.items()}
        if not all(isinstance(engine, dict) for each in found.values() for engine in each.values()):
            return {}
        return {
            role: {url: engine["requests"] for url, engine in each.items() if engine} for role, each in found.items()
        }

    def wait_idle(self) -> None:
        urls = [*(url for url, _ in self.prefills()), *self.decodes()]
        if "rooms" not in self.info(self.prefill_url):
            flush_caches(urls, self.settling)  # SGLang refuses while a request is queued, running or being transferred
        elif held := still_held(urls, self.settling):
            self.fail(f"(rooms, requests) still held: {held}")

    def info(self, url: str) -> Mapping[str, Any]:
        return read_server_info(url, self.settling)
