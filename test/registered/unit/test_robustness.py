"""Bad input, as a table: what is typed, the line that says what is wrong, the exit code. Real processes, no traceback."""

import os
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

from cases import without
from pdkit.core import forked
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.loopback import past_proxies
from pdkit.runner.options import default_history
from suite_trees import source_of, write_tree

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
CPU = "--hw cpu --suite stage-a-test-cpu"
BASE = "check {good}"
HISTORY_LINE = '{"version": 1}'
NAN = """
    def test_it(self):
        from pdkit.core import events

        events.score("gsm8k", float("nan"), 200, gate=0.95, target="embedded", engine="pdkit.engine")
        self.assertGreater(float("nan"), 0.95)
"""
COMMANDS = {
    "recovery_table.py": ("studies/recovery_table.py",),
    "chaos_runner.py": ("test/registered/unit/chaos_runner.py",),
    "run_suite.py": ("test/run_suite.py",),
    "pdkit": ("-m", "pdkit"),
    "engine": ("-m", "pdkit.engine"),
}


@dataclass(frozen=True)
class Row:
    """`words` go to `command`, `{x}` in them names a file or server below; `line` must be the last on stderr.

    shell: what runs the command, as "$@"; "" for the command itself
    """

    command: str
    words: str
    line: str
    code: int = 2
    environ: dict = field(default_factory=dict)
    where: str = "stderr"
    lines: int | None = 1
    shell: str = ""

    def __str__(self):
        environ = " ".join(f"{name}={value}" for name, value in self.environ.items())
        return ascii(f"{environ} {self.command} {self.words} {self.shell}".strip())


DEAD_PROXY = {name: "http://127.0.0.1:9" for name in ("http_proxy", "HTTP_PROXY", "all_proxy")}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# In a mount or network namespace of its own; where a container may make none, the row is skipped.
FULL_DISK = 'unshare -m bash -c \'mount -t tmpfs -o size=64k none {root}/soak && exec "$@"\' bash "$@"'
NO_IPV4 = (
    'unshare -n bash -c \'ip link set lo up && ip address del 127.0.0.1/8 dev lo; exec "$@"\' bash "$@"'  # ::1 is left
)
NO_HOME = 'unshare -U --map-user=4242 env -u HOME "$@"'  # a user who is not in passwd
WAITING = "SGLANG_DISAGGREGATION_WAITING_TIMEOUT"
BEGUN = {"BEGUN": "{root}/soak/begun"}
HUNG_UP = '"$@" & until [ -e {root}/soak/begun ] || ! kill -0 $!; do sleep 0.1; done; kill -HUP $!; wait $!'
CLOSED = '"$@" <&- >&- 2>&-; code=$?; cat {root}/soak/closed/results.json; exit $code'
NO_H200 = "target 8xH200 needs 8 Hopper GPUs of 141 GB; this machine has no GPU and can run --on "
ASKS_ITSELF = """
    def test_it(self):
        import http.server, threading, requests, httpx
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for client in (requests, httpx):
            for host in ("127.0.0.1", "localhost"):
                answer = client.get(f"http://{host}:{server.server_port}/", timeout=20)
                self.assertEqual(answer.status_code, 200)
"""
LOUD = """
    def test_it(self):
        for _ in range(4000):
            print("#" * 70, flush=True)
"""
WAITS = """
    def test_it(self):
        import os, time
        open(os.environ["BEGUN"], "w").close()
        time.sleep(600)
"""


def gsm8k(name):
    return {"SGLANG_PD_GSM8K": f"{{{name}}}"}


def of_tree(tree, report, line, shell):
    """A run of a tree of test files that passes and says `line`."""
    words = f"{CPU} --test-root {{{tree}}} --report-dir {{root}}/{report}"
    return Row("run_suite.py", words, line, 0, where="stdout", shell=shell)


suite, pdkit = partial(Row, "run_suite.py"), partial(Row, "pdkit")
ROWS = (
    # test/run_suite.py: flags
    suite("", "--hw and --suite missing"),
    suite("--hw cpu", "--suite missing: say what to run"),
    suite(f"{CPU} --continue-on-eror", "unknown option --continue-on-eror; nearest known: --continue-on-"),
    suite(f"{CPU} extra", "extra: neither a path nor the name of a registered file"),
    suite("--hw cpy --suite stage-a-test-cpu", "unknown hardware 'cpy'; nearest known: cpu"),
    suite("--hw gpu --suite stage-a-test-cpu", "cuda"),
    suite("--hw cpu --suite stage-a-test-gpu", "unknown suite 'stage-a-test-gpu'; nearest known: stage-a"),
    suite("--list --suite nope", "unknown suite 'nope'"),
    suite("--hw cuda --suite stage-a-test-cpu", "is not for hardware 'cuda' but for: cpu"),
    suite(f"{CPU} --timeout-per-file soon", "invalid positive number value: 'soon'"),
    suite(f"{CPU} --timeout-per-file nan", "invalid positive number value: 'nan'"),
    suite(f"{CPU} --timeout-per-file 0", "--timeout-per-file: invalid positive number value: '0'"),
    suite(f"{CPU} --max-attempts 0", "--max-attempts: invalid number of at least 1 value: '0'"),
    suite(f"{CPU} --max-attempts -1", "invalid number of at least 1 value: '-1'"),
    suite(f"{CPU} --auto-partition-id 1", "--auto-partition-id needs --auto-partition-size"),
    suite(f"{CPU} --auto-partition-size 2 --auto-partition-id 2", "unknown partition 2; nearest known: 1"),
    suite(f"{CPU} --json", "--json goes with --list"),
    suite(f"{CPU} --test-root {{absent}}", "--test-root {absent}: no such directory"),
    suite(f"{CPU} --report-dir {{text}}", "--report-dir {text}: not a directory"),
    suite(f"{CPU} --report-dir /dev/null/report", "--report-dir /dev/null/report: Not a directory"),
    suite(f"{CPU} --history {{absent}}/x", "--history {absent}/x: its directory does not exist"),
    suite(f"{CPU} --history {{root}}", "--history {root}: is a directory"),
    suite(f"{CPU} --history x --no-history", "argument --no-history: not allowed with argument --history"),
    suite(CPU, "PDKIT_HISTORY {absent}/x: its directory does", environ={"PDKIT_HISTORY": "{absent}/x"}),
    # files that it reads
    suite(f"{CPU} --test-root {{empty}}", "nothing ran: no file is registered", 4, where="stdout"),
    suite(f"{CPU} --test-root {{nan_score}}", "0 passed, 1 failed, 0 skipped", 1, where="stdout"),
    # surroundings that are hostile
    suite(f"{CPU} --test-root {{asks_itself}}", "1 passed, 0 failed", 0, DEAD_PROXY, "stdout"),
    suite(f"{CPU} --report-dir {{root}}/r\udcff", "/r\\udcff' is not text in this locale; choose another"),
    suite(f"{CPU} --report-dir {{root}}/\u00fc", "is not text in this locale", environ=ASCII),
    pdkit("run --report-dir {root}/r\udcff", "is not text in this locale; choose another name"),
    of_tree("passing", "soak/closed", '"result": "passed"', shell=CLOSED),
    of_tree("loud", "soak", "report incomplete: No space left on device", shell=FULL_DISK),
    suite(f"{CPU} --test-root {{waits}}", "interrupted by SIGHUP", 130, BEGUN, "stdout", shell=HUNG_UP),
    suite(f"{CPU} --test-root {{passing}}", "has no home directory, and SGLang needs one: set HOME", 3, shell=NO_HOME),
    pdkit("preflight", "has no home directory, and SGLang needs one: set HOME", 3, shell=NO_HOME),
    suite(f"{CPU} --test-root {{passing}}", "1 passed, 0 failed", 0, where="stdout", shell='env -u HOME "$@"'),
    pdkit("run --on embedded", "SGLANG_PD_GSM8K is not for target embedded", environ=gsm8k("text")),
    pdkit("run --on embedded", "127.0.0.1 is missing, no server can listen there", 3, where="any", shell=NO_IPV4),
    # pdkit: commands and flags
    pdkit("rum", "pdkit: error: unknown command 'rum'; nearest known: run, "),
    pdkit("--report", "the following arguments are required: COMMAND"),
    pdkit("run --onn", "unknown option --onn; nearest known: --on"),
    pdkit("run --on 8xH100", "unknown target '8xH100'; nearest known: "),
    pdkit("run --on 8xH200", NO_H200, 3),
    pdkit("run --on embedded --history {absent}/x", "--history {absent}/x: its directory does not exist"),
    pdkit("check --model x", "the following arguments are required: URL"),
    # a deployment that is no such thing
    pdkit("check localhost:30000", "localhost:30000 is not a URL like http://host:port"),
    pdkit("check http://127.0.0.1:99999", "http://127.0.0.1:99999 is not a URL like"),
    pdkit("check http://[::1", "http://[::1 is not a URL like http://host:port"),
    pdkit("check http://127.0.0.1:8000/v1", "leave /v1 of http://127.0.0.1:8000/v1 away"),
    pdkit("check http://me:secret@127.0.0.1:80", "no credentials in a URL, they reach logs"),
    pdkit("check {good} --baseline {good}", "{good} and {good} are the same server"),
    pdkit(f"{BASE} --prefill-urls {{good}}", "name both kinds, or none"),
    pdkit(BASE, "SGLANG_PD_API_KEY: has spaces or", environ={"SGLANG_PD_API_KEY": "two words\n"}),
    pdkit("check http://127.0.0.1:9", "cannot be reached: Connection refused", 3),
    pdkit("check http://no.such.host.invalid", "cannot be reached: ", 3),
    pdkit("check {never}", "{never}/v1/models: no answer within 10 s", 3),
    pdkit("check {closing}", "{closing}/v1/models: cannot be reached: ", 3),
    pdkit("check {garbage}", "{garbage}/v1/models: ", 3),
    pdkit("check {half}", "{half}/v1/models: ", 3),
    pdkit("check {error500}", "{error500}/v1/models: status 500: oh no", 3),
    pdkit("check {locked}", "{locked}/v1/models: status 401, it wants a key: set SGLANG_PD_API_KEY", 3),
    pdkit("check {locked}", "does not accept the key in SGL", 3, environ={"SGLANG_PD_API_KEY": "sk-wrong"}),
    pdkit("check {completions}", "{completions} is not an SGLang server: it has no /v1/models; needed is", 3),
    pdkit("check {alone}", "{alone} is not a PD deployment: it is a monolithic server", 3),
    pdkit("check {tls}", "{tls}/v1/models: this port speaks plain HTTP; write http:// instead of https", 3),
    pdkit("check {page}", "{page} is not an SGLang server: /v1/models names no model", 3),
    pdkit("check {listing}", "{listing} is not an SGLang server: /v1/models names no model", 3),
    pdkit("check {openai}", "{openai} serves m, but is not an SGLang server", 3),
    pdkit(f"{BASE} --model other", "{good} serves m, not other (--model)"),
    pdkit(f"{BASE} --baseline {{openai}}", "{openai} serves m, but is not an SGLang server", 3),
    # data sets
    pdkit(BASE, "{absent}: No such file or directory", 3, gsm8k("absent")),
    pdkit(BASE, "{root}: Is a directory", 3, gsm8k("root")),
    pdkit(BASE, "{text}, line 1 is not JSON", 3, gsm8k("text")),
    pdkit(BASE, "{binary}: not UTF-8 text", 3, gsm8k("binary")),
    pdkit(BASE, "{broken_line}, line 2 is not JSON", 3, gsm8k("broken_line")),
    pdkit(BASE, "{no_answer}, line 2 has no texts 'question' and 'answer'", 3, gsm8k("no_answer")),
    pdkit(BASE, "{numbers}, line 1 has no texts", 3, gsm8k("numbers")),
    pdkit(BASE, "{empty_file}: no questions", 3, gsm8k("empty_file")),
    # histories
    pdkit("history {absent}", "{absent}: No such file or directory"),
    pdkit("history {root}", "{root}: Is a directory"),
    pdkit("history {empty_file}", "no run in {empty_file}", 4),
    pdkit("history {text}", "no run in {text}", 4, lines=2),
    pdkit("history {history}", "no run in {history}", 4, lines=3),
    pdkit("history {binary}", "no run in {binary}", 4, lines=None),
    pdkit("history {text} --out x.txt", "x.txt: name an .svg, .png or .pdf file"),
    pdkit("history {text} --est-time --estimates", "argument --estimates: not allowed with argument --est-time"),
    pdkit("history {text} --last 0", "--last: invalid number of at least 1"),
    pdkit("history", "no history: PDKIT_HISTORY is empty; name a FILE", environ={"PDKIT_HISTORY": ""}),
    # other scripts
    pdkit("run --keep-going", "need --repeat N"),
    pdkit("run --repeat 2 --report-dir {text}", "--report-dir {text}: File exists"),
    pdkit("run --repeat 0 --report-dir {root}/soak", "--repeat: invalid number of at least 1"),
    pdkit("preflight --suite x", "unknown suite 'x'"),
    pdkit("preflight --suite stage-c-test-dsv4-8-gpu-h100", "nearest known: stage-c-test-dsv4-8-gpu-h200"),
    pdkit("preflight --suite stage-b-test-1-gpu-large --test-root {empty}", "no file is registered"),
    pdkit("preflight --hw cude", "unknown hardware 'cude'; nearest known: cuda"),
    pdkit("preflight --machine {absent}", "{absent}: No such file or directory"),
    pdkit("preflight --machine {text}", "not a recorded machine"),
    pdkit("preflight --machine {binary}", "error: "),
    pdkit("lint {absent}", "{absent}: No such file or directory"),
    pdkit("lint --rule", "unknown option --rule; nearest known: --rules"),
    pdkit("new X", "the following arguments are required: --suite"),
    pdkit("new X --suite y", "unknown suite 'y'"),
    pdkit("new X --suite stage-a-test-cpu --directory {absent}", "--directory {absent}: no such directory"),
    pdkit("plan {absent}", "pdkit plan: error: "),
    pdkit("contract {absent}", "pdkit contract: error: {absent}: no such file"),
    pdkit("contract {text} --sglang-wheel {binary}", "pdkit contract: error: {binary}: not a wheel"),
    pdkit("contract --wheels {absent}", "no wheel of sglang in {absent}; --download fetches it", 3),
    Row("recovery_table.py", "{text}", "{text} is no recovery_table.json of a recovery test"),
    Row("recovery_table.py", "", "the following arguments are required: FILE"),
    Row("chaos_runner.py", "--rounds 0", "--rounds: invalid number of at least 1"),
    pdkit("model kernel-train --seconds 0", "argument --seconds: invalid positive number value: '0'"),
    pdkit("model kernel-train --workers 0", "--workers: invalid number of at least 1"),
    pdkit("model kernel-train --seconds 5 --out {root}/out", "no usable CUDA GPU; --device cpu trains for hours", 3),
    pdkit("model tarin", "unknown command 'tarin'; nearest known: train"),
    pdkit("model train --score-rows 0", "--score-rows: invalid number of at least 1"),
    pdkit("model kernel-random --seed x", "pdkit model: error: argument --seed: invalid number value: 'x'"),
    pdkit("model kernel-random --out {text}", "{text}: File exists"),
    Row("chaos_runner.py", "--attacks hup", "unknown value 'hup'; nearest known: "),
    pdkit("report {absent}", "{absent}: no results.json of a run with --report-dir"),
    pdkit("report", "name one report directory, or two by --compare A B"),
    Row("engine", "", "the following arguments are required: --model-path"),
    Row("engine", "--model-path x --no-such-flag", "--no-such-flag"),
    Row("engine", "--model-path x --port 70000", "--port: invalid port (1-65535) value: '70000'"),
    Row("engine", "--model-path x --port http", "--port: invalid port (1-65535) value: 'http'"),
    Row("engine", "--model-path x --context-length 0", "--context-length: invalid number of at least 1 value: '0'"),
    Row(
        "engine",
        "--model-path x --disaggregation-mode both",
        "--disaggregation-mode: unknown value 'both'; nearest known: ",
    ),
    *(
        Row("engine", "--model-path x", f"='{seconds}' is not a positive whole number", environ={WAITING: seconds})
        for seconds in ("soon", "-1", "0.5")
    ),
    Row("engine", "--model-path x --chunked-prefill-size 0", "invalid number of at least 1 value: '0'"),
    Row("engine", "--model-path x --load-format gguf", "unknown value 'gguf'; nearest known: "),
)


def http(body, status="200 OK", length=None):
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n{body}".encode()


MODELS, INFO = http('{"data": [{"id": "m"}]}'), http('{"model_path": "/models/m"}')
SERVERS = {
    "good": {"/v1/models": MODELS, "/model_info": INFO},
    "openai": {"/v1/models": MODELS},
    "completions": {"/v1/completions": http("{}")},
    "alone": {"/v1/models": MODELS, "/model_info": INFO, "/server_info": http('{"disaggregation_mode": "null"}')},
    "page": {"/v1/models": http("<html>hello</html>")},
    "listing": {"/v1/models": http('[1, {"data": NaN}]')},
    "error500": {"/v1/models": http("oh\nno", "500 Internal Server Error")},
    "locked": {"/v1/models": http("{}", "401 Unauthorized")},
    "half": {"/v1/models": http('{"data": [{"id"', length=500)},
    "garbage": {"/v1/models": b"\x00\xffSSH-2.0-OpenSSH\r\n\r\n"},
    "closing": {"/v1/models": b""},
    "never": {"/v1/models": None},
}


class Handler(socketserver.StreamRequestHandler):
    """Answers with the bytes that the server has for a path; None: never."""

    def handle(self):
        if self.rfile.peek(1).startswith(b"\x16"):  # TLS
            self.wfile.write(http("{}", "400 Bad Request"))
            return
        path = (self.rfile.readline().split() or [b"", b"/"])[1].decode()
        while self.rfile.readline().strip():
            pass
        answer = self.server.answers.get(path, http("{}", "404 Not Found"))
        if answer is None:
            self.server.over.wait(60)
        else:
            self.wfile.write(answer)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64


class TestBadInput(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.names = {"root": root, "absent": root / "absent"}
        row = '{"question": "q", "answer": "#### 1"}\n'
        contents = {
            "text": b"hello there\n",
            "binary": b"\x80\xff\x00\n\xfe" * 9,
            "empty_file": b"",
            "broken_line": (row + row[:20] + "\n" + row).encode(),
            "no_answer": (row + '{"question": "q"}\n').encode(),
            "numbers": b"1\n2\n",
            "history": (HISTORY_LINE + "\n" + HISTORY_LINE[:-2] + "\n").encode(),
        }
        for name, content in contents.items():
            cls.names[name] = root / name
            cls.names[name].write_bytes(content)
        trees = {"nan_score": source_of(NAN), "asks_itself": source_of(ASKS_ITSELF), "loud": source_of(LOUD)}
        trees |= {"passing": source_of(), "waits": source_of(WAITS), "empty": None}
        for name, source in trees.items():
            (root / "trees" / name).mkdir(parents=True)
            cls.names[name] = write_tree(root / "trees" / name, {"test_x.py": source} if source else {})
        for name, answers in SERVERS.items():
            server = Server(("127.0.0.1", 0), Handler)
            server.answers, server.over = answers, threading.Event()
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            for cleanup in (server.server_close, server.shutdown, server.over.set):
                cls.addClassCleanup(cleanup)
            cls.names[name] = f"http://127.0.0.1:{server.server_address[1]}"
        cls.namespaces = tuple(
            f"unshare {kind}"
            for kind, more in (("-m", ()), ("-n", ()), ("-U", ("--map-user=4242",)))
            if not subprocess.run(["unshare", kind, *more, "true"], capture_output=True).returncode
        )
        (root / "soak").mkdir()
        cls.names["tls"] = cls.names["good"].replace("http:", "https:")
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            cls.done = dict(zip(map(id, ROWS), pool.map(cls.run_row, ROWS)))
        print(f"{len(ROWS)} rows in {time.monotonic() - began:.1f} s", flush=True)

    @classmethod
    def fill(cls, text):
        for name, value in cls.names.items():
            text = text.replace(f"{{{name}}}", str(value))
        return text

    @classmethod
    def run_row(cls, row):
        hidden = ("SGLANG_PD_", "PDKIT_HISTORY", "CUDA_VISIBLE_DEVICES")
        environ = without(*hidden) | {"CUDA_VISIBLE_DEVICES": "", "XDG_STATE_HOME": str(cls.names["root"])}
        environ |= {name: cls.fill(value) for name, value in row.environ.items()}
        words = [cls.fill(word) for word in row.words.split()]
        path, *rest = COMMANDS[row.command]
        command = [sys.executable, *([path] if path == "-m" else [str(REPO / path)]), *rest, *words]
        options = {"errors": "replace", "env": environ, "cwd": str(cls.names["root"]), "timeout": 300}
        if row.shell:
            command = ["bash", "-c", cls.fill(row.shell), "bash", *command]
        elif row.words.isascii():
            return forked.run(command, has_fork_server=row.command == "run_suite.py", **options)
        return subprocess.run(command, capture_output=True, text=True, **options)

    def test_each_row_gets_its_line_and_its_code(self):
        self.assertGreaterEqual(len(ROWS), 40)
        self.assertEqual(len({str(row) for row in ROWS}), len(ROWS))
        for row in ROWS:
            with self.subTest(str(row)):
                if row.shell.startswith("unshare") and not row.shell.startswith(self.namespaces):
                    self.skipTest("this container makes no such namespace")
                done = self.done[id(row)]
                self.assertNotIn("Traceback", done.stderr if row.where == "stdout" else done.stdout + done.stderr)
                self.assertEqual(done.returncode, row.code, done.stdout + done.stderr)
                text = {"stderr": done.stderr, "stdout": done.stdout, "any": done.stdout + done.stderr}[row.where]
                said = text.splitlines()
                self.assertTrue(said, "nothing is said")
                if row.where == "stderr":
                    self.assertIn(self.fill(row.line), said[-1])
                    if row.code == 2 and not row.words.startswith("run "):  # that says on what it runs
                        self.assertEqual(done.stdout, "", "nothing runs after bad usage")
                    if row.lines is not None:
                        self.assertEqual(len(said), row.lines, done.stderr)
                else:
                    self.assertTrue(any(self.fill(row.line) in line for line in said), text)

    def test_without_a_home_no_directory_is_named_so(self):
        path = default_history({})
        self.assertTrue(path is None or path.is_absolute(), path)
        with mock.patch.object(os.path, "expanduser", lambda path: path):  # a user who is not in passwd
            self.assertIsNone(default_history({}))

    def test_loopback_is_excepted_from_proxies_beside_what_is_already(self):
        self.assertEqual(past_proxies({"no_proxy": "a"}), {})
        self.assertEqual(past_proxies({"HTTPS_PROXY": "x", "NO_PROXY": "a, localhost"}),
                         dict.fromkeys(("no_proxy", "NO_PROXY"), "a, localhost,127.0.0.1,::1"))  # fmt: skip

    def test_nothing_is_left_in_the_directory_where_it_was_typed(self):
        mine = {Path(str(self.names[name])).name for name in ("text", "binary", "empty_file", "broken_line")}
        mine |= {"no_answer", "numbers", "history", "trees", "soak"}
        self.assertEqual({path.name for path in self.names["root"].iterdir()} - mine, set())


if __name__ == "__main__":
    unittest.main()
