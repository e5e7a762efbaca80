"""A prefill/decode pair of fake servers: real processes and sockets, no model."""

from types import SimpleNamespace

from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.deployment.embedded import EmbeddedServers

FAKE_SERVER = """
import http.server, os, subprocess, sys, threading, time
port, healthy_after, dies_after, code, answers = int(sys.argv[1]), *map(float, sys.argv[2:6])
print("orphan", subprocess.Popen(["sleep", "120"]).pid, flush=True)
if sys.argv[6] == "True":
    title = "import setproctitle, time; setproctitle.setproctitle('sglang::scheduler_TP0'); print(flush=True)"
    worker = subprocess.Popen([sys.executable, "-c", f"{title}; time.sleep(120)"], stdout=subprocess.PIPE)
    worker.stdout.readline()  # it has its title
    print("worker", worker.pid, flush=True)
start = time.monotonic()

def die():
    print(*(f"line {i}" for i in range(100)), "CUDA out of memory", sep="\\n", flush=True)
    if code >= 0:
        os._exit(int(code))
    print("RuntimeError: CUDA error: an illegal memory access was encountered\\nafter it", flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(200 if time.monotonic() - start > healthy_after else 503)
    def do_POST(self):
        global answers
        answers -= 1
        if answers < 0:
            self.send_error(500)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"choices": [{"text": " 2"}], "usage": {"completion_tokens": 3}}')
    def log_message(self, *_):
        pass

threading.Timer(dies_after, die).start()
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
NEVER = 120


class Fate(SimpleNamespace):
    """How a fake server fares: seconds until healthy, until dead, the exit code, and how many answers it has.

    code: a negative one has it log a CUDA error instead of ending.
    worker: whether it has a process below it that calls itself a scheduler.
    """

    def __init__(self, healthy=0, dies=NEVER, code=0, answers=1, worker=False):
        super().__init__(healthy=healthy, dies=dies, code=code, answers=answers, worker=worker)

    def command(self, port):
        fate = (port, self.healthy, self.dies, self.code, self.answers, self.worker)
        return ["python3", "-c", FAKE_SERVER, *map(str, fate)]


def fake_pair(log_dir, prefill=Fate(), decode=Fate(), lb=Fate(), test=None, mixins=()):
    """The test class on fake servers: real processes and sockets, no model."""

    class Pair(*mixins, GSM8KChecks, EmbeddedServers):
        @classmethod
        def launch_server(cls, name, url, args):
            fate = {"prefill": prefill, "decode": decode, "monolithic": Fate()}[name]
            cls._names[url] = name
            return cls.launch(name, fate.command(url.rsplit(":")[-1]))

        @classmethod
        def start_lb(cls, command):
            return super().start_lb(lb.command(cls.lb_port))

        @classmethod
        def log_path(cls, name, kind="log"):
            return f"{log_dir}/{name}.{kind}"

        if test:
            test_gsm8k = test

    return Pair
