"""A deployment that somebody else runs: what the environment says of it, and where its key goes and does not go."""

import os
import unittest
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from unittest import mock

import requests
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import NotReady, UsageError
from pdkit.deployment import attached
from pdkit.deployment.attached import Deployment

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

KEY = "sk-0123456789"


class Talkative(BaseHTTPRequestHandler):
    """Refuses each request and repeats the key that came with it."""

    def do_GET(self):
        self.server.keys.append(self.headers.get("Authorization"))
        self.send_response(500)
        self.end_headers()
        self.wfile.write(f"no such user: {self.headers.get('Authorization')}".encode())

    def log_message(self, *_):
        pass


class TestUrls(unittest.TestCase):
    def test_what_is_no_url_is_one_line(self):
        for url in ("http://[::1", "http://[::1]:x", "localhost:80", "http://", "http://h:0"):
            with self.subTest(url), self.assertRaisesRegex(UsageError, r"is no URL like http://host:port"):
                Deployment.of({"SGLANG_PD_BASE_URL": url})

    def test_what_may_be_secret_is_not_repeated(self):
        for url in (f"http://me:{KEY}@h", f"me:{KEY}@h:80", f"http://h?key={KEY}", f"http://h#{KEY}"):
            with self.subTest(url), self.assertRaisesRegex(UsageError, "SGLANG_PD_API_KEY") as caught:
                Deployment.of({"SGLANG_PD_BASE_URL": url})
            self.assertNotIn(KEY, str(caught.exception))


class TestKey(unittest.TestCase):
    def setUp(self):
        self.server = HTTPServer(("127.0.0.1", 0), Talkative)
        self.server.keys = []
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.port = self.server.server_address[1]
        self.enterContext(mock.patch.dict(os.environ))
        self.enterContext(mock.patch.object(requests.Session, "send", requests.Session.send))

    def test_it_goes_to_the_deployment_however_its_name_is_written(self):
        attached.send_key(Deployment(f"http://LocalHost:{self.port}", api_key=KEY))
        requests.get(f"http://LocalHost:{self.port}/generate", timeout=10)
        self.assertEqual(self.server.keys, [f"Bearer {KEY}"])

    def test_it_goes_to_nobody_else(self):
        attached.send_key(Deployment("http://localhost:1", api_key=KEY))
        requests.get(f"http://localhost:{self.port}/generate", timeout=10)
        self.assertEqual(self.server.keys, [None])

    def test_a_server_that_repeats_it(self):
        with self.assertRaisesRegex(NotReady, r"status 500: no such user: Bearer \(removed\)$"):
            attached.ask(f"http://127.0.0.1:{self.port}", KEY)


if __name__ == "__main__":
    unittest.main()
