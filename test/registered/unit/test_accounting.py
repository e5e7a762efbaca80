"""Request accounting: attempts that clients retry in silence are seen, and so is what only the servers know."""

import contextlib
import json
import os
import tempfile
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import httpx
import openai
import requests
from pdkit.checks.accounting.checks import OWN_RESULT, AccountingChecks, unaccounted
from pdkit.checks.accounting.counters import (
    PairCounters,
    RequestAccount,
    ServerCounters,
    TransferAccount,
    counters_of,
    read_pair,
)
from pdkit.checks.accounting.invariants import CLIENT, SERVERS
from pdkit.checks.accounting.ledger import (
    ABORTED,
    CONNECTION,
    ERROR_BODY,
    NO_ANSWER,
    NOT_SENT,
    OK,
    TIMEOUT,
    ClientAccount,
    HttpAttempt,
    Ledger,
    judge,
    sequences_of,
)
from pdkit.checks.server_info import ServerInfoError
from pdkit.core import events
from pdkit.core.ci_register import register_cpu_ci
from stub_server import StubServer

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

CHOICES = [{"index": 0, "text": "4"}]
COMPLETION = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": CHOICES}
GENERATED = {"text": "4", "output_ids": [4], "meta_info": {"finish_reason": {"type": "length"}}}
ERROR = {"object": "error", "message": "KV transfer failed", "code": 500}


def info(requests=0, sent=0, received=0, failed=0, prefill_tokens=0, rooms=0, running=0):
    return {
        "engine": {"requests": requests, "prefill_tokens": prefill_tokens},
        "transfer": {"sent": sent, "received": received, "failed": failed, "bytes": 100 * (sent + received)},
        "rooms": rooms,
        "internal_states": [{"running_requests": running}],
    }


class ScriptedServer(StubServer):
    """Answers POST with the next of `answers`, the last one for ever, GET with `info`: (status, body) each.

    A status of 0 closes the connection, a negative one waits until the test ends.
    """

    def __init__(self, test, *answers, info=(200, {})):
        self.answers, self.info, self.ended, self.lock = list(answers), info, threading.Event(), threading.Lock()
        super().__init__(test)
        test.addCleanup(self.ended.set)

    def reply(self, path, body):
        if body is None:
            return self.info
        with self.lock:
            status, *body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if status < 0:
            self.ended.wait()
        return (status, *body) if status > 0 else None


def eval_client(url, retries=2):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=retries, timeout=20)
    client._calculate_retry_timeout = lambda *_: 0.0
    return client


def complete(client, prompt="2+2="):
    return client.completions.create(model="m", prompt=prompt, max_tokens=1).choices[0].text


class TestJudge(unittest.TestCase):
    def test_outcomes(self):
        for path, status, body, outcome in (
            ("/v1/completions", 200, COMPLETION, OK),
            ("/v1/completions", 200, {**COMPLETION, "choices": []}, NO_ANSWER),
            ("/v1/completions", 200, ERROR, ERROR_BODY),
            ("/v1/completions", 200, {"error": {"message": "no"}}, ERROR_BODY),
            ("/v1/completions", 500, ERROR, "500"),
            ("/generate", 200, GENERATED, OK),
            ("/generate", 200, [GENERATED, GENERATED], OK),
            ("/generate", 200, [GENERATED, ERROR], ERROR_BODY),
            ("/generate", 200, {"text": "4"}, NO_ANSWER),
            ("/generate", 200, "4", NO_ANSWER),
            ("/generate", 200, {"meta_info": {"finish_reason": {"type": "abort", "message": "x"}}}, ABORTED),
            ("/v1/models", 200, {"data": []}, OK),
            ("/v1/models", 404, {}, "404"),
        ):
            with self.subTest(path=path, status=status, body=body):
                found, error = judge(path, status, json.dumps(body).encode())
                self.assertEqual(found, outcome)
                self.assertEqual(error is None, outcome == OK)

    def test_not_json_and_streams(self):
        self.assertEqual(judge("/generate", 200, b"<html>")[0], NO_ANSWER)
        self.assertEqual(judge("/generate", 200, b"data: {}\n\n")[0], OK)
        self.assertEqual(judge("/generate", 200, None), (OK, None))
        self.assertEqual(judge("/generate", 502, b"")[1], "status 502")

    def test_sequences(self):
        for path, body, count in (
            ("/generate", {"text": "a"}, 1),
            ("/generate", {"text": ["a", "b"]}, 2),
            ("/generate", {"input_ids": [1, 2, 3]}, 1),
            ("/generate", {"input_ids": [[1], [2], [3]], "sampling_params": {"n": 2}}, 6),
            ("/generate", {"text": ["a", "b"], "sampling_params": [{"n": 2}, {"n": 2}]}, 4),
            ("/v1/completions", {"prompt": ["a", "b"], "n": 3}, 6),
            ("/v1/completions", {"prompt": [5, 6]}, 1),
            ("/v1/chat/completions", {"messages": [], "n": 2}, 2),
            ("/v1/models", None, 0),
            ("/flush_cache", {}, 0),
        ):
            with self.subTest(path=path, body=body):
                self.assertEqual(sequences_of(path, json.dumps(body).encode()), count)
        self.assertEqual(sequences_of("/generate", b"{"), 1)


class TestLedger(unittest.TestCase):
    def test_a_failure_that_the_clients_retry_hid_is_seen(self):
        server = ScriptedServer(self, (500, ERROR), (200, COMPLETION))
        with Ledger([server.url]).open() as ledger:
            self.assertEqual(complete(eval_client(server.url)), "4")
        account = ledger.account()
        self.assertEqual(account.outcomes, {"500": 1, OK: 1})
        self.assertEqual((account.hidden, account.lost), (1, 0))
        self.assertIn("KV transfer failed", account.report())
        self.assertIn("1 x 500", account.report())

    def test_without_a_failure_there_is_no_problem(self):
        server = ScriptedServer(self, (200, COMPLETION))
        with Ledger([server.url]).open() as ledger:
            complete(eval_client(server.url))
            requests.get(f"{server.url}/v1/models")
        self.assertEqual(ledger.account().problems, ())
        self.assertEqual(ledger.account().sequences, (1, 1))

    def test_every_kind_of_failure_of_both_clients(self):
        for answer, outcome in (((503, {}), "503"), ((0,), CONNECTION)):
            server = ScriptedServer(self, answer)
            with self.subTest(outcome=outcome), Ledger([server.url]).open() as ledger:
                with self.assertRaises(openai.OpenAIError):
                    complete(eval_client(server.url))
                with contextlib.suppress(requests.ConnectionError):
                    requests.post(f"{server.url}/generate", json={"text": "a"})
            self.assertEqual(ledger.account().outcomes, {outcome: 4})

    def test_an_error_in_a_body_with_status_200(self):
        server = ScriptedServer(self, (200, ERROR))
        with Ledger([server.url]).open() as ledger:
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
            requests.post(f"{server.url}/v1/completions", json={"prompt": "a"})
        self.assertEqual(ledger.account().outcomes, {ERROR_BODY: 2})

    def test_an_attempt_that_hangs_is_a_failure_in_time(self):
        server = ScriptedServer(self, (-1,))
        with Ledger([server.url], attempt_timeout=0.1).open() as ledger:
            with self.assertRaises(openai.APITimeoutError):
                complete(eval_client(server.url, retries=0))
            with self.assertRaises(requests.Timeout):
                requests.post(f"{server.url}/generate", json={"text": "a"}, timeout=60)
        self.assertEqual(ledger.account().outcomes, {TIMEOUT: 2})
        self.assertIn("read timeout=0.1", ledger.attempts[-1].error, "and not the client's own 60 s")

    def test_gives_up_so_that_a_dead_server_costs_no_backoff(self):
        server = ScriptedServer(self, (500, ERROR))
        with Ledger([server.url], give_up_after=3).open() as ledger:
            for _ in range(4):
                with self.assertRaises((openai.InternalServerError, openai.BadRequestError)):
                    complete(eval_client(server.url))
            self.assertEqual(requests.post(f"{server.url}/generate", json={}).status_code, 400)
        account = ledger.account()
        self.assertEqual(account.outcomes, {"500": 3, NOT_SENT: 4})
        self.assertEqual((account.lost, account.sequences), (2, (0, 3)))

    def test_other_addresses_are_left_alone(self):
        watched, other = ScriptedServer(self, (200, GENERATED)), ScriptedServer(self, (500, ERROR))
        with Ledger([watched.url]).open() as ledger:
            self.assertEqual(requests.post(f"{other.url}/generate", json={}).status_code, 500)
            self.assertEqual(httpx.post(f"{other.url}/generate", json={}).status_code, 500)
        self.assertEqual(ledger.attempts, [])

    def test_the_clients_are_as_before_once_it_is_closed(self):
        before = httpx.Client.send, requests.Session.send
        with Ledger([]).open():
            self.assertNotEqual((httpx.Client.send, requests.Session.send), before)
        self.assertEqual((httpx.Client.send, requests.Session.send), before)

    def test_counts_of_many_threads(self):
        server = ScriptedServer(self, *[(500, ERROR), (200, COMPLETION)] * 20, (200, COMPLETION))
        with Ledger([server.url], give_up_after=100).open() as ledger:
            client = eval_client(server.url, retries=20)
            with ThreadPoolExecutor(32) as pool:
                list(pool.map(lambda i: complete(client, f"{i}="), range(32)))
        account = ledger.account()
        self.assertEqual(account.outcomes, {"500": 20, OK: 32})
        self.assertEqual(account.sequences, (32, 52))


def attempts(*outcomes):
    errors = (None if outcome == OK else "broken" for outcome in outcomes)
    return tuple(HttpAttempt("/generate", *each, 1, 0.1, key) for key, each in enumerate(zip(outcomes, errors)))


class TestClientAccount(unittest.TestCase):
    def test_tolerates_the_stated_rate_and_no_more(self):
        account = attempts(*["500"] * 2, *[OK] * 98)
        self.assertEqual(ClientAccount(account, 0.02).problems, ())
        self.assertIn("2 of 100 attempts failed (2.0%, tolerated 1.9%)", ClientAccount(account, 0.019).problems[0])
        self.assertTrue(ClientAccount(account).problems)

    def test_no_request_is_no_pass(self):
        self.assertIn("no request was seen", ClientAccount(()).problems[0])

    def test_refuses_a_rate_that_makes_no_sense(self):
        for rate in (-0.1, 1.0, 1.5):
            with self.assertRaises(ValueError):
                ClientAccount((), rate)


def did(prefill=None, decode=None):
    """The counters after four sequences that went well, but for what is given."""
    well = {"requests": 4, "sent": 4, "received": 0, "prefill_tokens": 90}
    prefill = ServerCounters(**{**well, **(prefill or {})})
    well = {"requests": 4, "received": 4}
    return PairCounters(prefill, ServerCounters(**{**well, **(decode or {})}))


class TestTransferAccount(unittest.TestCase):
    def test_each_sequence_once(self):
        self.assertEqual(TransferAccount(did(), 4, 4).problems, ())

    def test_what_went_wrong_is_named(self):
        for counters, problem in (
            (did(prefill={"requests": 5}), "prefill started 5, the client asked for 4 sequences"),
            (did(prefill={"sent": 5}), "sent by prefill 5"),
            (did(prefill={"sent": 3}), "sent by prefill 3"),
            (did(decode={"requests": 5}), "decode started 5"),
            (did(decode={"received": 5}), "received by decode 5"),
            (did(decode={"failed": 1}), "1 KV transfers failed (prefill saw 0, decode 1), but only 0"),
            (did(prefill={"failed": 1}), "1 KV transfers failed (prefill saw 1, decode 0), but only 0"),
            (did(decode={"prefill_tokens": 7}), "decode prefilled 7 tokens itself"),
            (did(prefill={"rooms": 1}), "1 rooms"),
            (did(decode={"running": 2}), "2 requests on decode"),
        ):
            with self.subTest(problem=problem):
                account = TransferAccount(counters, 4, 4)
                (found,) = account.problems
                self.assertIn(problem, found)
                self.assertIn(problem, account.report())

    def test_what_the_client_saw_fail_may_be_missing(self):
        failed = did(prefill={"sent": 4, "requests": 5, "failed": 1}, decode={"failed": 1})
        self.assertEqual(TransferAccount(failed, 4, 5).problems, ())
        self.assertTrue(TransferAccount(failed, 4, 4).problems)

    def test_an_engine_without_counters_is_said_so(self):
        self.assertEqual(TransferAccount(None, 4, 4).problems, ())
        self.assertIn("not checked", TransferAccount(None, 4, 4).report())


class TestCounters(unittest.TestCase):
    def test_what_is_held_now_is_no_difference(self):
        before = counters_of(info(requests=10, sent=9, rooms=3, running=2))
        after = counters_of(info(requests=14, sent=13, rooms=1, running=1))
        self.assertEqual(after.since(before), ServerCounters(requests=4, sent=4, bytes=400, rooms=1, running=1))

    def test_sglang_offers_none(self):
        self.assertIsNone(counters_of({"internal_states": [{}], "version": "0.5.23"}))

    def test_sums_over_servers_and_waits_until_they_are_idle(self):
        prefill = ScriptedServer(self, info=(200, info(requests=4, sent=4)))
        decodes = [ScriptedServer(self, info=(200, info(requests=2, received=2))) for _ in range(2)]
        pair = read_pair([prefill.url], [each.url for each in decodes], settle=5)
        sent, received = (ServerCounters(requests=4, bytes=400, **{name: 4}) for name in ("sent", "received"))
        self.assertEqual(pair, PairCounters(sent, received))
        decodes[0].info = (200, info(requests=2, received=2, running=1))
        self.assertFalse(read_pair([prefill.url], [each.url for each in decodes], settle=0.1).is_idle)

    def test_a_server_that_does_not_answer_is_one_line(self):
        server = ScriptedServer(self, info=(503, {}))
        with self.assertRaisesRegex(ServerInfoError, "does not tell its /server_info: 503") as caught:
            read_pair([server.url], [server.url])
        self.assertNotIn("\n", str(caught.exception))


class TestMixin(unittest.TestCase):
    """The check over a class whose one test sends what is given to servers that count what is given."""

    def run_test(self, body, counted=(info(), info(requests=1, sent=1, received=1)), **attributes):
        lb = ScriptedServer(self, (200, GENERATED))
        worker = ScriptedServer(self, info=(200, counted[0]))

        class Case(AccountingChecks, unittest.TestCase):
            lb_url, prefill_url, decode_url = lb.url, worker.url, worker.url

            def test(self):
                try:
                    body(self, lb)
                finally:
                    worker.info = (200, counted[1])

        for name, value in attributes.items():
            setattr(Case, name, value)
        result = unittest.TestResult()
        with (
            mock.patch("builtins.print"),
            tempfile.TemporaryDirectory() as channel,
            mock.patch.dict(os.environ, {events.VARIABLE: channel}),
        ):
            Case("test").run(result)
            self.verdicts = {event["check"]: event for event in events.read(channel).of("verdict")}
        return result

    def failed(self):
        return {check for check, verdict in self.verdicts.items() if not verdict["passed"]}

    @staticmethod
    def send(case, lb, times=1):
        return [requests.post(f"{lb.url}/generate", json={"text": str(i)}) for i in range(times)]

    def message(self, result):
        ((_, message),) = result.failures + result.errors
        return message

    def test_passes_where_nothing_is_wrong(self):
        self.assertTrue(self.run_test(self.send).wasSuccessful())
        self.assertEqual((set(self.verdicts), self.failed()), ({CLIENT, SERVERS, OWN_RESULT}, set()))

    def test_servers_that_do_not_count_have_no_verdict(self):
        self.assertTrue(self.run_test(self.send, pair_counters=lambda case, settle=0.0: None).wasSuccessful())
        self.assertEqual(set(self.verdicts), {CLIENT, OWN_RESULT})

    def send_two_of_which_one_fails(self, case, lb):
        lb.answers = [(500, ERROR), (200, GENERATED)]
        self.send(case, lb, 2)

    def test_a_hidden_failure_fails_a_test_that_passed_unless_it_is_tolerated(self):
        send = self.send_two_of_which_one_fails
        self.assertTrue(self.run_test(send, tolerated_failure_rate=0.5).wasSuccessful())
        message = self.message(self.run_test(send))
        self.assertIn("1 x 500", message)
        self.assertIn("the test by itself: passed", message)
        self.assertEqual(self.failed(), {CLIENT})
        self.assertIn("1 x 500", self.verdicts[CLIENT]["message"])

    def test_the_tests_own_failure_is_told_apart(self):
        def body(case, lb):
            lb.answers = [(500, ERROR)]
            self.send(case, lb)
            case.assertGreater(0.5, 0.95)

        message = self.message(self.run_test(body))
        self.assertIn("1 x 500", message)
        self.assertIn("the test by itself: failed: AssertionError('0.5 not greater than 0.95')", message)
        self.assertIn("1 requests had no answer", message)
        self.assertEqual(self.failed(), {CLIENT, OWN_RESULT})
        self.assertEqual(self.verdicts[OWN_RESULT]["message"], "0.5 not greater than 0.95")

    def test_a_failure_without_a_failed_request_stays_what_it_is(self):
        def body(case, lb):
            self.send(case, lb)
            case.fail("score too low")

        self.assertNotIn("request accounting", self.message(self.run_test(body)))
        self.assertEqual(self.failed(), {OWN_RESULT})

    def test_a_request_that_was_served_twice_fails(self):
        message = self.message(self.run_test(self.send, counted=(info(), info(requests=2, sent=2, received=2))))
        self.assertIn("prefill started 2, the client asked for 1 sequences", message)
        self.assertEqual(self.failed(), {SERVERS})
        self.assertIn("prefill started 2", self.verdicts[SERVERS]["message"])

    def test_a_skip_stays_a_skip(self):
        result = self.run_test(lambda case, lb: case.skipTest("no GPU"))
        self.assertEqual((len(result.skipped), result.failures, result.errors), (1, [], []))

    def test_a_server_that_died_is_what_is_told(self):
        @contextlib.contextmanager
        def failing_with_a_death():
            raise AssertionError("decode exited with code -9")
            yield

        body = mock.Mock()
        result = self.run_test(body, failing_with_a_death=staticmethod(failing_with_a_death))
        message = self.message(result)
        self.assertIn("decode exited with code -9", message)
        self.assertNotIn("server_info", message)
        body.assert_not_called()

    def test_what_is_meant_to_fail_is_not_accounted_for(self):
        lb = ScriptedServer(self, (500, ERROR))

        class Case(AccountingChecks, unittest.TestCase):
            lb_url, prefill_url, decode_url = lb.url, None, None

            @unaccounted
            def test(self):
                requests.post(f"{lb.url}/generate", json={})

        result = unittest.TestResult()
        Case("test").run(result)
        self.assertTrue(result.wasSuccessful())


class TestReport(unittest.TestCase):
    def test_the_failure_message_is_the_report(self):
        account = RequestAccount(ClientAccount(attempts(OK, "500")), TransferAccount(did(), 4, 4))
        with self.assertRaises(AssertionError) as caught:
            account.assert_passed()
        self.assertEqual(str(caught.exception), account.report())
        self.assertIn("the test by itself: passed", account.report())
        for part in ("FAIL", "1 x 500", "first error: /generate: broken", "servers: PASS"):
            self.assertIn(part, account.report())


if __name__ == "__main__":
    unittest.main()
