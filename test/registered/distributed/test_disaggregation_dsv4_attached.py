"""`pdkit check` against servers that are not its own: they are asked, with their key, and left as they are.

Each of them is behind a gateway that wants the key, as an ingress would, and writes down what it was asked for.
"""

import http.client
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
from pdkit.core.errors import ExitCode
from pdkit.deployment.embedded import EmbeddedServers
from pdkit.deployment.monolithic import MonolithicBeside
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=200, suite="stage-a-test-cpu")

KEY = "sk-a-key-that-nobody-may-see"


class Forwarder(BaseHTTPRequestHandler):
    """Forwards what has the key; `self.server` is a Gateway."""

    def do_GET(self):
        self.server.asked[self.path] += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            self.server.refused += 1
            self.send_error(401, "Unauthorized", f"no such key: {self.headers.get('Authorization')}")
            return
        connection = http.client.HTTPConnection(urlsplit(self.server.target).netloc, timeout=300)
        kept = {name: value for name, value in self.headers.items() if name in ("Content-Type", "Accept")}
        connection.request(self.command, self.path, body, kept)
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

    def __init__(self, case, target):
        super().__init__(("127.0.0.1", 0), Forwarder)
        self.target, self.asked, self.refused = target, Counter(), 0
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        case.addCleanup(self.server_close)
        case.addCleanup(self.shutdown)
        self.url = f"http://127.0.0.1:{self.server_port}"


class TestDisaggregationDSV4Attached(MonolithicBeside, EmbeddedServers):
    """The servers of this class are somebody else's to the command that the tests run."""

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.report = Path(directory.name)
        urls = self.lb_url, self.monolithic_url, self.prefill_url, self.decode_url
        self.gateways = [Gateway(self, url) for url in urls]

    def check(self, *words, key=KEY):
        command = [sys.executable, "-m", "pdkit", "check", "--report-dir", str(self.report), *words]
        environment = {**os.environ, "PDKIT_HISTORY": "", "SGLANG_PD_GSM8K": self.gsm8k_data_path}
        environment |= {"SGLANG_PD_API_KEY": key} if key else {}
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=600
        )

    def assert_left_alone(self):
        for process in (self.process_prefill, self.process_decode, self.process_lb, self.process_monolithic):
            self.assertIsNone(process.poll())
        for url in (self.prefill_url, self.decode_url, self.monolithic_url):
            self.assertEqual(requests.get(f"{url}/health", timeout=60).status_code, 200)

    def test_all_checks_pass_and_nothing_is_left_behind(self):
        balancer, monolithic, prefill, decode = self.gateways
        done = self.check(balancer.url, "--baseline", monolithic.url + "/",
                           "--prefill-urls", prefill.url, "--decode-urls", decode.url)  # fmt: skip
        print(done.stdout, flush=True)
        self.assertEqual(done.returncode, ExitCode.PASSED)
        self.assertIn(f"target=attached engine=at {balancer.url} gsm8k=", done.stdout)
        self.assertIn("main job on attached: PASSED", done.stdout)
        self.assertNotIn("skipped=", done.stdout)
        self.assertIn("hand-overs", done.stdout)
        self.assert_left_alone()

        self.assertEqual([gateway.refused for gateway in self.gateways], [0, 0, 0, 0], "requests without the key")
        asked = sum((gateway.asked for gateway in self.gateways), Counter())
        self.assertGreater(balancer.asked["/v1/completions"], 200)
        self.assertGreater(monolithic.asked["/generate"], 50)
        answering = {"/v1/models", "/v1/completions", "/v1/chat/completions", "/generate"}
        reading = {"/model_info", "/get_model_info", "/server_info", "/get_server_info"}
        self.assertLessEqual(set(asked), answering | reading)

        written = {path: path.read_bytes() for path in self.report.rglob("*") if path.is_file()}
        self.assertGreater(len(written), 1)
        self.assertEqual([path for path, content in written.items() if KEY.encode() in content], [])
        self.assertNotIn(KEY, done.stdout)

    def test_what_is_wrong_is_one_line(self):
        balancer, url = self.gateways[0], self.gateways[0].url
        for key, words, code, line in (
            ("wrong", [], 3, f"{url}/v1/models: status 401, it does not accept the key in SGLANG_PD_API_KEY"),
            (None, [], 3, f"{url}/v1/models: status 401, it wants a key: set SGLANG_PD_API_KEY"),
            (KEY, ["--model", "another"], 2, f"{url} serves {self.model}, not another (SGLANG_PD_MODEL)"),
            (KEY, ["--baseline", "http://127.0.0.1:9"], 3,
             "http://127.0.0.1:9/v1/models: cannot be reached: Connection refused"),
        ):  # fmt: skip
            with self.subTest(line):
                done = self.check(url, *words, key=key)
                self.assertEqual((done.returncode, done.stdout), (code, f"pdkit check: error: {line}\n"))
        self.assertNotIn("/generate", balancer.asked)
        self.assert_left_alone()


if __name__ == "__main__":
    unittest.main()
