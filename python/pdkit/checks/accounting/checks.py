"""Accounts for every request of every test of a class.

    class TestDisaggregationDSV4Accounted(AccountingChecks, GSM8KChecks, PDServers):
        tolerated_failure_rate = 0.001

Its unit is the attempt: what a client sent again after a failure is two, of which one failed.
"""

import contextlib
import unittest
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from pdkit.checks.accounting.counters import PairCounters, RequestAccount, TransferAccount, read_pair
from pdkit.checks.accounting.invariants import CLIENT, SERVERS
from pdkit.checks.accounting.ledger import Ledger
from pdkit.checks.base import Checks
from pdkit.checks.server_info import ServerInfoError
from pdkit.core import events
from pdkit.core.recording import unwrapped

SETTLE_SECONDS = 10.0
OWN_RESULT = "test by itself"
_no_heartbeat: Any = partial(contextlib.nullcontext, lambda: None)  # where nobody watches the servers
Test = TypeVar("Test", bound=Callable[..., object])


def unaccounted(test: Test) -> Test:
    """Marks a test whose requests are meant to fail, or that makes none."""
    vars(test)["unaccounted"] = True
    return test


class AccountingChecks(Checks):
    """Each test that talks to the load balancer fails if a request failed, even if a retry hid it.

    Put it first. Where there are several servers of a kind, `prefill_urls` and `decode_urls` name them. A
    `prefill_url` of None means that the counters are not to be read. `failing_with_a_death`, if the class has that,
    names the server that died, where none reports counters any more.

    tolerated_failure_rate  share of attempts that may fail
    attempt_timeout         seconds for one attempt; None leaves it to the client (an hour in run_eval)
    """

    needs: tuple[str, ...] = ("lb_url", "prefill_url", "decode_url")

    tolerated_failure_rate = 0.0
    attempt_timeout: float | None = None

    def _callTestMethod(self, method: Callable[[], None]) -> None:
        if getattr(method, "unaccounted", False):
            return super()._callTestMethod(method)
        before = self.pair_counters()
        ledger, failure = Ledger([self.lb_url], self.attempt_timeout), None
        probes = self._probes()
        with ledger.open(), getattr(self, "heartbeat", _no_heartbeat)() as ledger.progressed:
            try:
                super()._callTestMethod(method)
            except unittest.SkipTest:
                raise
            except Exception as error:
                failure = error
        client = ledger.account(self.tolerated_failure_rate)
        after = self.pair_counters(SETTLE_SECONDS) if before else None
        did = after.since(before) if before and after else None
        own_result = f"failed: {unwrapped(failure)!r}" if failure else "passed"
        answered, sent = client.sequences
        account = RequestAccount(client, TransferAccount(did, answered, sent + self._probes() - probes), own_result)
        print(account.report(), flush=True)
        self._emit_verdicts(account, failure)
        if not account.passed:
            raise AssertionError(account.report()) from failure
        if failure:
            raise failure

    def _probes(self) -> int:
        """Requests that the servers were sent by their supervisor, past the load balancer."""
        return getattr(getattr(self, "supervisor", None), "probes", 0)

    def _emit_verdicts(self, account: RequestAccount, failure: BaseException | None) -> None:
        """Of the client, of servers that count, and of the test itself, which the account's failure would hide."""
        client, kv_transfer = account.client, account.kv_transfer
        events.verdict(CLIENT, not client.problems, client.report())
        if kv_transfer.did is not None:
            events.verdict(SERVERS, not kv_transfer.problems, kv_transfer.report())
        events.verdict(OWN_RESULT, failure is None, str(unwrapped(failure)) if failure else "")

    def pair_counters(self, settle: float = 0.0) -> PairCounters | None:
        """As `read_pair`. Raises AssertionError where a server does not answer."""
        prefill_urls = getattr(self, "prefill_urls", None) or [self.prefill_url]
        decode_urls = getattr(self, "decode_urls", None) or [self.decode_url]
        if None in (*prefill_urls, *decode_urls):
            return None
        with getattr(self, "failing_with_a_death", contextlib.nullcontext)():
            try:
                return read_pair(prefill_urls, decode_urls, settle)
            except ServerInfoError as error:
                raise AssertionError(f"request accounting: {error}") from None
