"""Servers of the embedded engine as processes, with the model of `assets/random-dsv4`."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

import pdkit
import requests
from pdkit.core import forked

PACKAGE = Path(pdkit.__file__).parent
RANDOM = PACKAGE / "assets" / "random-dsv4"
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
BOOTSTRAP_TIMEOUT = 5
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(BOOTSTRAP_TIMEOUT),
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "60",
}


def keep_logs():
    """A directory for the logs of a module's servers; call it in setUpModule, before the first."""
    global logs
    logs = tempfile.TemporaryDirectory(prefix="engine_servers_")
    unittest.addModuleCleanup(logs.cleanup)


class Client:
    """What tests ask of the server at `url`."""

    def post(self, path, body, timeout=60, **options):
        return requests.post(self.url + path, json=body, timeout=timeout, **options)

    def generate(self, text_or_ids, **body):
        key = "input_ids" if isinstance(text_or_ids, list) and not isinstance(text_or_ids[0], str) else "text"
        response = self.post("/generate", {key: text_or_ids, "sampling_params": GREEDY} | body)
        response.raise_for_status()
        return response.json()

    def info(self):
        return requests.get(self.url + "/server_info", timeout=30).json()

    @property
    def busy(self):
        """(rooms held, requests in hand)."""
        info = self.info()
        return info["rooms"], info["internal_states"][0]["running_requests"]


class Server(Client):
    """One process and its log; ended whatever happens. It is forked where that can be, unless it is to be `spawned`."""

    def __init__(self, name, port, *command, spawned=False, **environment):
        self.name, self.port, self.url = name, port, f"http://127.0.0.1:{port}"
        self.log = Path(logs.name) / f"{name}.log"
        with open(self.log, "w") as log:
            start = subprocess.Popen if spawned else forked.popen(has_fork_server=False)
            self.process = start(
                [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
                env=ENVIRONMENT | environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        unittest.addModuleCleanup(self.end)

    def wait_until_ready(self, timeout=180.0):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"{self.name} ended early:\n{self.log.read_text()}"
            try:
                return requests.get(self.url + "/health", timeout=30).raise_for_status()
            except requests.RequestException:
                time.sleep(0.1)
        raise AssertionError(f"{self.name} is not ready after {timeout:g} s:\n{self.log.read_text()}")

    def end(self):
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _arguments(mode, *more):
    return (
        "--model-path", str(RANDOM), "--load-format", "dummy", "--random-seed", "7", "--served-model-name", "random",
        "--log-level", "warning", "--disaggregation-mode", mode, *more,
    )  # fmt: skip


def engine(name, port, mode, *arguments, **options):
    """options: of `Server`."""
    return Server(name, port, "pdkit.engine", *_arguments(mode, *arguments), **options)


class EngineHere(Client):
    """A server in a thread of this process, until it ends: for tests that look at answers alone."""

    def __init__(self, mode, *arguments):
        import torch
        from pdkit.engine import options
        from pdkit.engine.__main__ import serve
        from pdkit.engine.service import Service
        from pdkit.models.cpu.model import load_model
        from transformers import AutoTokenizer

        torch.set_num_threads(1)
        given = options.parse(_arguments(mode, *arguments))
        model = load_model(given.model_path, load_format=given.load_format, seed=given.random_seed)
        service = Service(given, model, AutoTokenizer.from_pretrained(RANDOM, local_files_only=True))
        sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        threading.Thread(target=asyncio.run, args=(serve(given, service, sock, None),), daemon=True).start()


def events(response):
    """The JSON objects of a stream of server-sent events, which must end with [DONE]."""
    lines = [line[len("data: ") :] for line in response.iter_lines(decode_unicode=True) if line]
    assert lines[-1] == "[DONE]", lines[-1]
    return [json.loads(line) for line in lines[:-1]]
