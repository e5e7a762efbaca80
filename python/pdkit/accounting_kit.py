"""A mixin that accounts for every request of every test of a class.

    class TestDisaggregationDSV4Accounted(RequestAccountingMixin, TestDisaggregationDSV4):
        tolerated_failure_rate = 0.001

Its unit is the attempt: what a client sent again after a failure is two, of which one failed.
"""

import contextlib
import unittest

from pdkit.accounting import HandoverAccount, Ledger, RequestAccount, read_pair
from pdkit.server_info import ServerInfoError

SETTLE_SECONDS = 10.0


def unaccounted(test):
    """Marks a test whose requests are meant to fail, or that makes none."""
    test.unaccounted = True
    return test


class RequestAccountingMixin:
    """Each test that talks to the load balancer fails if a request failed, even if a retry hid it.

    Put it before the class that launches the servers; it needs `lb_url`, `prefill_url` and `decode_url` of it, or
    `prefill_urls` and `decode_urls` where there are several. `failing_with_a_death`, if it has that, names the server
    that died, where nobody tells counters any more.

    tolerated_failure_rate  share of attempts that may fail
    attempt_timeout         seconds for one attempt; None leaves it to the client (an hour in run_eval)
    """

    tolerated_failure_rate = 0.0
    attempt_timeout = None

    def _callTestMethod(self, method):
        if getattr(method, "unaccounted", False):
            return super()._callTestMethod(method)
        before = self._pair_counters()
        ledger, failure = Ledger([self.lb_url], self.attempt_timeout), None
        with ledger.open():
            try:
                super()._callTestMethod(method)
            except unittest.SkipTest:
                raise
            except Exception as error:
                failure = error
        client = ledger.account(self.tolerated_failure_rate)
        did = None
        if before is not None:
            did = self._pair_counters(SETTLE_SECONDS).since(before)
        own_result = f"failed: {unwrapped(failure)!r}" if failure else "passed"
        account = RequestAccount(client, HandoverAccount(did, *client.sequences), own_result)
        print(account.report(), flush=True)
        if not account.passed:
            raise AssertionError(account.report()) from failure
        if failure:
            raise failure

    def _pair_counters(self, settle=0.0):
        prefill_urls = getattr(self, "prefill_urls", None) or [self.prefill_url]
        decode_urls = getattr(self, "decode_urls", None) or [self.decode_url]
        with getattr(self, "failing_with_a_death", contextlib.nullcontext)():
            try:
                return read_pair(prefill_urls, decode_urls, settle)
            except ServerInfoError as error:
                raise AssertionError(f"request accounting: {error}") from None


def unwrapped(error: BaseException) -> BaseException:
    """What SGLang's retry of test methods wrapped in an Exception of its own."""
    while type(error) is Exception and error.__context__ is not None:
        error = error.__context__
    return error
