"""`pdkit check` against servers that are not its own: they are asked, with their key, and left as they are.

It runs without sglang, torch and transformers. Some of the servers are behind a gateway that wants a key, as an ingress
would, and writes down what it was asked for.
"""

import http.client
import json
import os
import subprocess
import sys
import tempfile
import unittest
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import requests
from pdkit.core import forked
from pdkit.core.errors import ExitCode
from pdkit.deployment.embedded import EmbeddedServers
from pdkit.deployment.monolithic import MonolithicBeside
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=60, suite="stage-a-test-cpu")

KEY = "sk-a-key-that-nobody-may-see"
CHECK = """
import sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("sglang", "torch", "transformers", "openai"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotHere())
from pdkit.cli.main import main
sys.exit(main(["check", *sys.argv[1:]]))
"""


class Forwarder(BaseHTTPRequestHandler):
    """Forwards what has the key and begins with the prefix; `self.server` is a Gateway."""

    def do_GET(self):
        path = self.path.removeprefix(self.server.prefix)
        self.server.asked[path] += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            self.server.refused += 1
            self.send_error(401, "Unauthorized", f"no such key: {self.headers.get('Authorization')}")
            return
        connection = http.client.HTTPConnection(urlsplit(self.server.target).netloc, timeout=300)
        kept = {name: value for name, value in self.headers.items() if name in ("Content-Type", "Accept")}
        connection.request(self.command, path, body, kept)
        answer = connection.getresponse()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("Content-Type", "text/plain"))
        self.end_headers()
        while piece := answer.read1(65536):
            self.wfile.write(piece)
            self.wfile.flush()
        connection.close()

    do_POST = do_PUT = do_GET

    def log_message(self, *args):
        pass


class Gateway(ThreadingHTTPServer):
    """In front of `target` until `case` is over. `asked`: path -> how often; `refused`: requests without the key."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, case, target, prefix=""):
        super().__init__(("127.0.0.1", 0), Forwarder)
        self.target, self.prefix, self.asked, self.refused = target, prefix, Counter(), 0
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        case.addCleanup(self.server_close)
        case.addCleanup(self.shutdown)
        self.url = f"http://127.0.0.1:{self.server_port}{prefix}"


class Attached(MonolithicBeside, EmbeddedServers):
    """The servers of this class are somebody else's to the command that the tests run."""

    def check(self, *words, key=None, expected=ExitCode.PASSED, light=False):
        """What `pdkit check` prints on its standard output; its exit code must be `expected`.

        light: started anew where sglang, torch, transformers and openai are not; else forked where that can be.
        """
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "SGLANG_"))}
        environment |= {"SGLANG_PD_API_KEY": key} if key else {}
        if light:
            command = [sys.executable, "-c", CHECK, *words]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        else:
            done = forked.run([sys.executable, "-m", "pdkit", "check", *words], env=environment, timeout=600)
        print(done.stdout, done.stderr, sep="", flush=True)
        self.assertEqual(done.returncode, expected, done.stdout + done.stderr)
        return done.stdout if expected in (ExitCode.PASSED, ExitCode.FAILED) else done.stderr

    def quick(self, *words, expected=ExitCode.PASSED, **options):
        """The rows of a quick check by name: (state, sentence)."""
        found = json.loads(self.check(self.lb_url, "--quick", "--json", *words, expected=expected, **options))
        self.assertEqual((found["verdict"], found["exit_code"]), (expected.name, int(expected)))
        return {row["check"]: (row["state"], row["sentence"]) for row in found["checks"]}

    def assert_left_alone(self):
        for process in (self.process_prefill, self.process_decode, self.process_lb, self.process_monolithic):
            self.assertIsNone(process.poll())
        for url in (self.prefill_url, self.decode_url, self.monolithic_url):
            self.assertEqual(requests.get(f"{url}/health", timeout=60).status_code, 200)


class TestDisaggregationDSV4Attached(Attached):
    """Sound servers.

    is_quick  40 questions, short prompts, and one comparison with the baseline; each night there are as many questions
              as the gate needs, long prompts, and a comparison without a key, too
    """

    is_quick = True

    def test_all_checks_pass_and_nothing_is_left_behind(self):
        urls = self.lb_url, self.monolithic_url, self.prefill_url, self.decode_url
        balancer, monolithic, prefill, decode = gateways = [Gateway(self, url) for url in urls]
        printed = self.check(balancer.url, "--baseline", monolithic.url + "/", "--prefill-urls", prefill.url,
                             "--decode-urls", decode.url, *["--quick"] * self.is_quick, key=KEY, light=True)  # fmt: skip
        lines = printed.splitlines()
        self.assertIn("prefill and decode: the command line names 1 prefill and 1 decode", lines)
        for check in ("usage adds up", "streaming equals whole", "/generate equals /v1/completions", "chat answers",
                      "wrong requests are refused"):  # fmt: skip
            self.assertIn(f"{check}: yes", lines)
        self.assertRegex(printed, r"(?m)^answers equal the baseline: (\d+) of \1$")
        gate = (
            r"40 questions \(too few " if self.is_quick else r"\d+ questions, .*: \d+ right answers lost, \d+ gained$"
        )
        self.assertRegex(printed, rf"(?m)^GSM8K: score [\d.]+ of {gate}")
        self.assertRegex(printed, r"(?m)^every request was answered: (\d+) of \1$")
        self.assertRegex(printed, r"(?m)^counters: each of \d+ sequences was prefilled, transferred and decoded once$")
        self.assertIn("not checked: acceptance length, decode does not speculate", lines)
        self.assert_left_alone()

        self.assertEqual([gateway.refused for gateway in gateways], [0, 0, 0, 0], "requests without the key")
        asked = sum((gateway.asked for gateway in gateways), Counter())
        self.assertGreater(balancer.asked["/v1/completions"], 40 if self.is_quick else 132)
        self.assertGreater(monolithic.asked["/generate"], 50)
        answering = {"/v1/models", "/v1/completions", "/v1/chat/completions", "/generate"}
        reading = {"/model_info", "/get_model_info", "/server_info", "/get_server_info", "/workers"}
        self.assertLessEqual(set(asked), answering | reading)
        self.assertNotIn(KEY, printed)

    def test_servers_without_a_key_need_none(self):
        rows = self.quick(*[] if self.is_quick else ["--baseline", self.monolithic_url])
        self.assertEqual(rows["prefill and decode"], ("passed", "the load balancer reports 1 prefill and 1 decode"))
        self.assertEqual(rows["counters"][0], "passed")
        if not self.is_quick:
            self.assertEqual(rows["answers equal the baseline"][0], "passed")

    def test_a_record_of_a_good_deployment_is_answered_again(self):
        path = str(Path(self.enterContext(tempfile.TemporaryDirectory()), "good.json"))
        self.check(self.lb_url, "--baseline-record", path, "--record")
        printed = self.check(self.lb_url, "--baseline-record", path)
        self.assertIn("answers like the record: same: 40 prompts", printed)
        self.assertRegex(printed, r"(?m)^every request was answered: 120 of 120$")

    def test_a_path_prefix(self):
        gateway = Gateway(self, self.lb_url, "/some/where")
        printed = self.check(gateway.url, "--quick", key=KEY)
        self.assertRegex(printed, r"(?m)^every request was answered: [1-9]\d* of \d+$")
        self.assertRegex(printed, "(?m)^counters: each of [1-9]")
        self.assertIn("not checked: answers, no baseline to compare with (--baseline URL)\n", printed)

    def test_what_is_wrong_is_one_line(self):
        """What needs real servers to be wrong; more in test_robustness."""
        gateway, monolithic = Gateway(self, self.lb_url), self.monolithic_url
        for key, words, code, line in (
            ("wrong", [gateway.url], 3,
             f"{gateway.url}/v1/models: status 401, it does not accept the key in SGLANG_PD_API_KEY"),
            (None, [f"http://localhost:{urlsplit(self.lb_url).port}", "--baseline", self.lb_url], 2,
             f"http://localhost:{urlsplit(self.lb_url).port} and {self.lb_url} are the same server: each address is to be "
             "another one's"),
            (None, [monolithic], 3, f"{monolithic} is not a PD deployment: it is a monolithic server "
             "(/server_info: disaggregation_mode null)"),
            (None, [self.decode_url, "--baseline", monolithic], 3, f"{self.decode_url} is not a PD deployment: it is one "
             "decode server without its load balancer (/server_info: disaggregation_mode decode)"),
            (None, [self.lb_url, "--prefill-urls", self.prefill_url, "--decode-urls", monolithic], 3,
             f"{self.lb_url} is not a PD deployment: a server that the command line names as decode has "
             "disaggregation_mode null"),
            (None, [self.lb_url, "--baseline", self.prefill_url], 2,
             f"--baseline {self.prefill_url}: is part of a PD deployment, name a monolithic server"),
        ):  # fmt: skip
            with self.subTest(line):
                self.assertEqual(self.check(*words, key=key, expected=code), f"pdkit check: error: {line}\n")
        self.assertNotIn("/generate", gateway.asked)
        self.assert_left_alone()


if __name__ == "__main__":
    unittest.main()
