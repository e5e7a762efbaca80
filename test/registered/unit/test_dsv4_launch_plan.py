import argparse
import ast
import atexit
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import requests
from cases import FolderCase, printed
from fake_pair import NEVER, Fate, fake_pair
from pdkit.checks.integrity import kv_checksum_args
from pdkit.checks.parity import checks as parity
from pdkit.checks.parity.plan import Round, completion_probe, generate_probe
from pdkit.core import events, ports, processes
from pdkit.core.gpus import Gpu
from pdkit.deployment import evals, fixture, fused_mhc, quirks
from pdkit.deployment import ports as deployment_ports
from pdkit.deployment.embedded import EmbeddedServers
from pdkit.deployment.monolithic import MonolithicBeside, MonolithicFirst
from pdkit.deployment.multi_gpu import EightGpuServers
from pdkit.deployment.one_gpu import OneGpuServers
from pdkit.models.cuda.config import HIDDEN
from pdkit.runner.report import facts
from pdkit.runner.targets import TARGETS
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci, ut_parse_one_file
from sglang.test.server_fixtures import disaggregation_fixture

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
sys.path.insert(0, str(DISTRIBUTED))
import test_disaggregation_dsv4 as dsv4  # noqa: E402
import test_disaggregation_dsv4_1gpu as one_gpu  # noqa: E402
import test_disaggregation_dsv4_2gpu as two_gpus  # noqa: E402
import test_disaggregation_dsv4_embedded as embedded  # noqa: E402

register_cpu_ci(est_time=18, suite="stage-a-test-cpu")


def parse(args):
    """The namespace that the installed SGLang makes of `args`; its parser must know each flag by its full name."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    installed = quirks.as_installed(args, ServerArgs)
    abbreviated = {arg for arg in installed if arg.startswith("--")} - set(parser._option_string_actions)
    assert abbreviated <= {"--tp", "--dp"}, abbreviated  # these two as SGLang's own tests abbreviate them
    return parser.parse_args(["--model-path", "x", *installed])


def launched_at_ports(cls, **ports):
    """A class like `cls` whose fixture has drawn its ports, and its (prefill, decode, monolithic) arguments."""
    drawn = {"bootstrap_port": "1", "lb_port": "2", "base_host": "127.0.0.1", "prefill_port": "3", "decode_port": "4"}
    plan = type("Plan", (cls,), drawn | ports)
    drawing = disaggregation_fixture.PDDisaggregationServerBase
    with mock.patch.object(drawing, "setUpClass", classmethod(lambda cls: None)):
        plan.configure()
    return plan, (plan.prefill_args(), plan.decode_args(), plan.monolithic_args())


class TestLaunchPlan(unittest.TestCase):
    plan = EightGpuServers

    def setUp(self):
        self.enterContext(mock.patch.dict(os.environ, SGLANG_IS_IN_CI="false"))
        with contextlib.redirect_stdout(io.StringIO()), self.assertWarnsRegex(UserWarning, "No RDMA devices"):
            self.plan.configure()

    def test_environment_on_one_gpu(self):
        safe = {**quirks.indexer_environment(), **fused_mhc.environment(HIDDEN)}
        self.assertEqual(OneGpuServers.server_env, {"SGLANG_DSV4_FP4_EXPERTS": "0", **safe})

    def test_model(self):
        self.assertEqual(self.plan.model, "sgl-project/DeepSeek-V4-Flash-FP8")
        with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, DEFAULT_MODEL_CACHE_DIR=cache):
            cached = Path(cache, "sgl-project", "DeepSeek-V4-Flash-FP8")
            cached.mkdir(parents=True)
            with contextlib.redirect_stdout(io.StringIO()), self.assertWarns(UserWarning):
                self.plan.configure()
            self.assertEqual(self.plan.model, str(cached))

    def test_the_installed_release_takes_the_checksum_flag_that_the_kit_names(self):
        checked = parse(["--disaggregation-mode", "prefill", *kv_checksum_args()])
        self.assertIs(getattr(checked, "disaggregation_enable_kv_checksum", True), True)

    def test_nics_of_each_side_are_those_of_its_gpus(self):
        environ = {"SGLANG_IS_IN_CI": "true", "SGLANG_CI_RDMA_ALL_DEVICES": ",".join(f"mlx5_{i}" for i in range(8))}
        with mock.patch.dict(os.environ, environ):
            self.assertEqual(parse(self.plan.prefill_args()).disaggregation_ib_device, None)
            self.plan.rdma_devices = ["--disaggregation-ib-device", "mlx5_0,mlx5_4"]
            self.assertEqual(parse(self.plan.prefill_args()).disaggregation_ib_device, "mlx5_0,mlx5_1,mlx5_2,mlx5_3")
            self.assertEqual(parse(self.plan.decode_args()).disaggregation_ib_device, "mlx5_4,mlx5_5,mlx5_6,mlx5_7")

    def test_a_fixture_that_neither_pins_ports_nor_knows_nics_by_gpu(self):
        with mock.patch.object(disaggregation_fixture.PDDisaggregationServerBase, "rdma_devices_for"):
            del disaggregation_fixture.PDDisaggregationServerBase.rdma_devices_for
            del self.plan.prefill_nccl_port, self.plan.decode_nccl_port
            self.plan.rdma_devices = ["--disaggregation-ib-device", "mlx5_0,mlx5_4"]
            for args in (self.plan.prefill_args(), self.plan.decode_args()):
                self.assertIsNone(parse(args).nccl_port)
                self.assertEqual(parse(args).disaggregation_ib_device, "mlx5_0,mlx5_4")

    def test_imports_are_standard_library_and_sglang(self):
        tree = ast.parse(Path(dsv4.__file__).read_text())
        modules = {
            name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        }
        self.assertLessEqual(modules, sys.stdlib_module_names | {"sglang", "pdkit"})  # pdkit for events, if it is there

    def test_registration(self):
        registries, has_main = ut_parse_one_file(dsv4.__file__)
        found = [(r.backend.name, r.est_time, r.suite) for r in registries]
        self.assertEqual(found, [("CUDA", 250, "stage-c-test-dsv4-8-gpu-h200")])
        self.assertTrue(has_main)

    def test_targets_are_those_that_can_be_run(self):
        by_name = {r.name: r for r in TARGETS}
        for plan in (self.plan, OneGpuServers, EmbeddedServers):
            listed = by_name[plan.target]
            self.assertEqual(listed.gpus, len({*plan.prefill_gpus, *plan.decode_gpus}))
        self.assertEqual(by_name["8xH200"].memory_mib, 1000 * self.plan.gpu_memory_gb)


class TestMachine(unittest.TestCase):
    """What a plan says of machines with other GPUs, as NVML would name them."""

    H200 = Gpu("NVIDIA H200", 143771, (9, 0))
    H100 = Gpu("NVIDIA H100 80GB HBM3", 81559, (9, 0))
    B200 = Gpu("NVIDIA B200", 183359, (10, 0))

    def test_says_in_one_line_what_is_missing_and_skips_but_in_ci(self):
        for plan, gpus, says in (
            (EightGpuServers, [self.H100] * 8, r"needs 8 Hopper GPUs of 141 GB .*, found 8 GPUs \(NVIDIA H100.*run.sh"),
            *((EightGpuServers, gpus, "needs 8") for gpus in ([], [self.H200], [self.H200] * 7, [self.B200] * 8)),
            (OneGpuServers, [], "^OneGpuServers needs 1 Hopper GPUs of 80 GB .*, found no GPU;"),
        ):
            for in_ci, raised in (("false", unittest.SkipTest), ("true", AssertionError)):
                with (
                    self.subTest(plan=plan.__name__, gpus=gpus, in_ci=in_ci),
                    mock.patch.dict(os.environ, SGLANG_IS_IN_CI=in_ci),
                    mock.patch.object(fixture, "visible_gpus", lambda gpus=gpus: gpus),
                    contextlib.redirect_stdout(io.StringIO()) as stdout,
                ):
                    with self.assertRaisesRegex(raised, says) as caught:
                        plan.require_gpus()
                    self.assertEqual(stdout.getvalue(), f"{caught.exception}\n" if raised is unittest.SkipTest else "")
                    self.assertNotIn("\n", str(caught.exception))

    def test_those_that_do(self):
        for plan, gpus in ((EightGpuServers, [self.H200] * 8), (OneGpuServers, [self.H100])):
            with mock.patch.object(fixture, "visible_gpus", lambda gpus=gpus: gpus):
                plan.require_gpus()


class TestOneGpu(unittest.TestCase):
    def test_an_nccl_port_for_each_server_whether_the_fixture_pins_them_or_not(self):
        for pinned in ({"prefill_nccl_port": "5", "decode_nccl_port": "6"}, {}):
            with self.subTest(pinned):
                plan, args = launched_at_ports(one_gpu.TestDisaggregationDSV4OneGpu, **pinned)
                self.addCleanup(plan.doClassCleanups)
                drawn = {port for each in args if (port := parse(each).nccl_port)}
                self.assertEqual(len(drawn), 3)
                self.assertTrue(all(22000 < port < 32000 for port in drawn), drawn)

    def test_with_dp_attention_each_server_meets_its_ranks_at_a_port_of_its_own(self):
        plan, args = launched_at_ports(two_gpus.TestDisaggregationDSV4TwoGpus)
        self.addCleanup(plan.doClassCleanups)
        met = {int(each[each.index("--dist-init-addr") + 1].removeprefix("127.0.0.1:")) for each in args}
        ports = {int(getattr(plan, name)) for name in dir(plan) if name.endswith("_port")}
        self.assertEqual(len(met), 3)
        self.assertFalse(ports & {port + offset for port in met for offset in range(7)})

    def test_pages_from_the_cache_are_not_asked_of_prompts_of_unknown_length(self):
        case = one_gpu.TestDisaggregationDSV4OneGpu("test_parity_rooms")
        probes = completion_probe("text", "a text", 4), generate_probe("short", range(257), 4)
        cold = SimpleNamespace(cached_tokens=0)
        round_ = Round("test", probes, cached=frozenset({"text", "short"}))
        self.assertEqual(case.check_cached(round_, [cold, cold]), [])
        long = generate_probe("long", range(513), 4)
        (missing,) = case.check_cached(Round("test", (long,), cached=frozenset({"long"})), [cold])
        self.assertEqual(missing, "test: 0 of 513 tokens of long came from prefill's cache")

    def test_half_of_the_prefixes_come_from_the_cache_and_with_data_parallel_ranks_none_must(self):
        probes = tuple(generate_probe(f"long {number}", range(513), 4) for number in range(4))
        round_ = Round("test", probes, cached=frozenset(probe.name for probe in probes))
        judged = "references_of", "compared", "assert_parity", "known_references"
        asked = dict.fromkeys(("prefill_url", "lb_url"), "") | {name: mock.MagicMock() for name in judged}
        asked["references_of"].return_value = None, None
        one = {"disable_radix_cache": False, "dp_size": 1}
        for more, cached, passes in (
            ({}, 4, True),
            ({}, 2, True),
            ({}, 1, False),
            ({"attn_dp_size": 1}, 0, False),
            ({"dp_size": 2}, 0, True),
            ({"attn_dp_size": 2}, 0, True),
        ):
            case = type("Asked", (one_gpu.TestDisaggregationDSV4OneGpu,), asked)("test_parity_rooms")  # it asks once
            arm = [SimpleNamespace(cached_tokens=512 if number < cached else 0) for number in range(4)]
            lacks_pages = self.assertRaisesRegex(AssertionError, "0 of 513 tokens of long")
            with (
                self.subTest(more=more, cached=cached),
                mock.patch.object(parity, "read_server_info", return_value={**one, **more}),
                mock.patch.object(parity, "collect", return_value=arm),
                mock.patch.object(parity.Parity, "pool"),
                contextlib.nullcontext() if passes else lacks_pages,
            ):
                case.check_parity([round_])


class LogCase(FolderCase):
    """The directory of logs is that of the events too."""

    def setUp(self):
        super().setUp()
        self.log_dir = str(self.root)
        self.enterContext(mock.patch.dict(os.environ, {events.VARIABLE: self.log_dir}))


class TestSupervision(LogCase):
    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.dict(os.environ, SGLANG_IS_IN_CI="false", SGLANG_TEST_MAX_RETRY="0"))

    def run_pair(self, **pair):
        before = set(psutil.Process().children(recursive=True))
        case, result = fake_pair(self.log_dir, **pair), unittest.TestResult()
        self.stdout = printed(unittest.TestSuite([case("test_gsm8k")]).run, result).out
        self.assertEqual(set(psutil.Process().children(recursive=True)), before)
        self.assert_no_orphan()
        self.assertEqual(signal.getsignal(signal.SIGUSR1), signal.SIG_DFL)
        self.assertEqual(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)
        return [message for _, message in result.errors + result.failures]

    def assert_no_orphan(self):
        for log in Path(self.log_dir).glob("*.log"):
            orphan = int(log.read_text().split()[1])
            deadline = time.monotonic() + 10
            while processes.is_pid_alive(orphan):
                self.assertLess(time.monotonic(), deadline, f"{log} left process {orphan}")
                time.sleep(0.1)

    def assert_names(self, message, name, code):
        self.assertIn(f"{name} exited with code {code}; last lines of {self.log_dir}/{name}.log:\nline 61\n", message)
        self.assertIn("line 99\nCUDA out of memory\n", message)
        self.assertNotIn("line 60\n", message)

    def phases(self):
        """`gate begins`, `gate`, or `gate failed`, in the order of events."""
        ends = {"begins": " begins", "passed": "", "failed": " failed"}
        return [event["name"] + ends[event["state"]] for event in events.read(self.log_dir).of("phase")]

    def test_healthy_pair(self):
        self.assertEqual(self.run_pair(test=lambda case: case.assertIsNone(case.process_decode.poll())), [])
        names = ("launch prefill", "launch decode", "start load balancer", "first request", "teardown")
        self.assertEqual(self.phases(), [line for name in names for line in (f"{name} begins", name)])
        launched = {event["name"]: event["log"] for event in events.read(self.log_dir).of("launch")}
        expected = ("prefill", "decode", "load balancer")
        self.assertEqual(launched, {name: f"{self.log_dir}/{name}.log" for name in expected})

    def test_the_first_request_is_not_answered(self):
        (message,) = self.run_pair(lb=Fate(answers=0))
        self.assertRegex(message, r"first request: http://127.0.0.1:\d+ answered 500: ")
        self.assertIn("first request failed", self.phases())

    def test_one_dies_while_both_load_or_the_load_balancer_starts(self):
        for name, code, phase, pair in (
            ("prefill", 7, "launch prefill", {"decode": Fate(healthy=NEVER)}),
            ("decode", 0, "launch prefill", {"prefill": Fate(healthy=NEVER)}),
            ("load balancer", 7, "start load balancer", {}),
        ):
            with self.subTest(name):
                Path(self.log_dir, events.FILE).unlink(missing_ok=True)
                fate = Fate(healthy=0 if name == "decode" else NEVER, dies=1, code=code)
                (message,) = self.run_pair(**{"lb" if " " in name else name: fate}, **pair)
                self.assertIn(f"{phase} failed", self.phases())
                self.assert_names(message, name, code)
                (death,) = events.read(self.log_dir).of("death")
                self.assertEqual((death["name"], death["cause"]), (name, f"{name} exited with code {code}"))
                self.assertTrue(death["excerpt"].endswith("line 99\nCUDA out of memory\n"), death["excerpt"])
                self.assertEqual(death["log"], f"{self.log_dir}/{name}.log")

    def test_a_monolithic_server_is_asked_before_the_pair_is_launched_or_beside_it(self):
        class Asking:
            @classmethod
            def take_references(cls):
                asked.append((cls.process_prefill is not None, requests.get(cls.monolithic_url).status_code))

        for mixin, beside in ((MonolithicFirst, False), (MonolithicBeside, True)):
            asked, kept = [], []
            test = lambda case, kept=kept: kept.append(case.process_monolithic is not None)  # noqa: E731
            self.assertEqual(self.run_pair(mixins=(mixin, Asking), test=test), [])
            self.assertEqual((asked, kept), ([(beside, 200)], [beside]))

    def test_a_monolithic_server_dies_while_it_is_asked(self):
        balancer_is_up = threading.Event()

        class DiesWhenAsked:
            @classmethod
            def launch_lb(cls):
                super().launch_lb()
                balancer_is_up.set()

            @classmethod
            def take_references(cls):
                if cls.process_prefill is not None:
                    balancer_is_up.wait(NEVER)
                os.kill(cls.process_monolithic.pid, signal.SIGKILL)
                cls.process_monolithic.wait()
                requests.get(cls.monolithic_url)

        for mixin in (MonolithicFirst, MonolithicBeside):
            (message,) = self.run_pair(mixins=(mixin, DiesWhenAsked))
            self.assertIn("monolithic exited with code -9 (Killed); last lines of", message)

    def test_of_two_that_died_the_first_is_named(self):
        def test(case):
            for process in (case.process_decode, case.process_prefill):
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(NEVER)

        (message,) = self.run_pair(test=test)
        self.assertIn("decode exited with code -9 (Killed)", message)

    def ask(self, *answers):
        """Questions whose right `answers` these are, behind 5 shots."""
        rows = [{"question": "1+1?", "answer": f"#### {answer}"} for answer in [2] * 5 + [*answers]]
        questions = self.write("questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self.enterContext(mock.patch.object(EmbeddedServers, "gsm8k_data_path", str(questions)))

    def test_transcript_of_the_eval(self):
        self.ask(2, 2, 3)
        self.enterContext(mock.patch.dict(os.environ, SGLANG_PD_PROGRESS_S="1e-9"))
        (message,) = self.run_pair(lb=Fate(answers=4))
        self.assertIn("0.6666666666666666) not greater than 0.95", message)
        self.assertIn("gate failed", self.phases())
        lines = Path(self.log_dir, "gsm8k.jsonl").read_text().splitlines()
        examples = sorted(map(json.loads, lines), key=lambda line: line["example"])
        told = [(e["score"], e["correct_answer"], e["extracted_answer"], e["completion_tokens"]) for e in examples]
        self.assertEqual(told, [(1, "2", "2", 3), (1, "2", "2", 3), (0, "3", "2", 3)])
        self.assertTrue(examples[0]["prompt"].endswith("\nAnswer: #### 2\n\nQuestion: 1+1?\nAnswer:"))
        self.assertEqual({e["answer"] for e in examples}, {" 2"})
        self.assertTrue(all(0 < e["seconds"] < 60 for e in examples))
        progress = events.read(self.log_dir).of("progress")
        self.assertEqual([(event["done"], event["total"]) for event in progress], [(1, 3), (2, 3), (3, 3)])
        self.assertAlmostEqual(progress[-1]["score"], 2 / 3)
        self.assertIn("\n[progress] 3/3, score so far 0.667\n", self.stdout)

    def test_decode_dies_while_the_eval_client_retries_in_silence(self):
        self.ask(*[2] * 5)
        (message,) = self.run_pair(decode=Fate(dies=5, code=7))
        self.assert_names(message, "decode", 7)
        self.assertNotIn("All retry attempts exhausted", self.stdout)

    def test_neither_client_errors_nor_retries_hide_a_death(self):
        def test(case):
            attempts.append(case)
            os.killpg(case.process_prefill.pid, signal.SIGKILL)
            case.process_prefill.wait()
            raise ConnectionError("as a client sees it")

        for max_retry in ("0", "1"):
            attempts = []
            with self.subTest(max_retry=max_retry), mock.patch.dict(os.environ, SGLANG_TEST_MAX_RETRY=max_retry):
                (message,) = self.run_pair(test=test)
                self.assertIn("prefill exited with code -9 (Killed)", message)
                self.assertEqual(len(attempts), 1)

    def test_interrupted(self):
        """Ctrl-C and SIGTERM, while the servers load and within the test, leave nothing running."""
        logs = [Path(self.log_dir, f"{name}.log") for name in ("prefill", "decode")]
        in_test = Path(self.log_dir, "in-test")

        def test(case):
            in_test.touch()
            time.sleep(NEVER)

        for number in (signal.SIGINT, signal.SIGTERM):
            for prefill, begun in ((Fate(healthy=NEVER), logs), (Fate(), [in_test])):
                with self.subTest(signal=number, prefill=prefill):
                    for path in (*logs, in_test):
                        path.unlink(missing_ok=True)
                    pid = os.fork()
                    if not pid:
                        self.run_pair_until_interrupted(prefill=prefill, test=test)
                    while not all(path.exists() and (path == in_test or path.stat().st_size) for path in begun):
                        self.assertEqual(os.waitpid(pid, os.WNOHANG), (0, 0))
                        time.sleep(0.1)
                    os.kill(pid, number)
                    self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 130)
                    self.assert_no_orphan()

    def run_pair_until_interrupted(self, **pair):
        """In a forked child: what an interpreter does that KeyboardInterrupt ends."""
        atexit._clear()
        code = 1
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            try:
                unittest.TestSuite([fake_pair(self.log_dir, **pair)("test_gsm8k")]).run(unittest.TestResult())
            except KeyboardInterrupt:
                code = 130
            finally:
                atexit._run_exitfuncs()
                os._exit(code)


class TestVerdict(LogCase):
    """What `test_gsm8k` concludes from a score."""

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.object(EmbeddedServers, "log_dir", self.log_dir))

    def verdict(self, score=1.0):
        case = embedded.TestDisaggregationDSV4Embedded("test_gsm8k")
        fixture.deployments.append(type(case))
        self.addCleanup(fixture.deployments.remove, type(case))
        case.lb_url, case.model = "lb", "model"
        with (
            mock.patch.object(evals, "sglang_eval", return_value={"score": score}) as run_eval,
            mock.patch.object(EmbeddedServers, "heartbeat", lambda: contextlib.nullcontext(lambda: None)),
            mock.patch.object(EmbeddedServers, "answering", {"lb"}),
            contextlib.redirect_stdout(io.StringIO()) as self.stdout,
        ):
            case.test_gsm8k()
        return run_eval.call_args.args[0]

    def test_what_is_asked_of_run_eval(self):
        args = self.verdict()
        self.assertEqual((args.eval_name, args.api, args.base_url, args.model), ("gsm8k", "completion", "lb", "model"))
        self.assertEqual((args.max_tokens, args.num_examples, args.num_threads), (512, 200, 128))
        self.assertEqual(Path(args.gsm8k_data_path).name, "gsm8k_nano.jsonl")
        line = "target=embedded engine=pdkit.engine gsm8k=1.000 examples=200 gate=>0.95\n"
        self.assertIn(line, self.stdout.getvalue())
        score = facts.score_of(events.read(self.log_dir))
        self.assertEqual((score.target, score.engine, score.correct), ("embedded", "pdkit.engine", 200))
        self.assertEqual((score.examples, score.threshold), (200, 0.95))

    def test_score_must_be_above_the_gate(self):
        self.verdict(score=0.955)
        with self.assertRaisesRegex(AssertionError, "0.95 not greater than 0.95"):
            self.verdict(score=0.95)


class TestBeforeLaunch(unittest.TestCase):
    def claimed(self):
        block = ports.claim()
        self.addCleanup(block.release)
        return block

    def test_busy_port(self):
        block = self.claimed()
        first, second, third, *_ = block.ports
        plan = SimpleNamespace(lb_port=str(first), prefill_port=str(second), decode_port=str(third))
        deployment_ports.require_free(plan)
        with socket.create_server(("127.0.0.1", second)):
            with self.assertRaisesRegex(AssertionError, rf"^in use: port {second} \(prefill_port\); "):
                deployment_ports.require_free(plan)

    def test_two_runs_with_the_same_ports(self):
        block = self.claimed()
        plan, elsewhere = (SimpleNamespace(lb_port=str(port)) for port in block.ports[:2])
        with deployment_ports.lock(plan) as lock, deployment_ports.lock(elsewhere):
            address = lock.getsockname().decode()
            with self.assertRaisesRegex(AssertionError, f"^another run .* has the ports from {plan.lb_port} on"):
                deployment_ports.lock(plan)
        bind = f"import socket, time; s = socket.socket(socket.AF_UNIX); s.bind({address!r}); print(); time.sleep(300)"
        other = self.enterContext(subprocess.Popen([sys.executable, "-c", bind], stdout=subprocess.PIPE))
        self.addCleanup(other.kill)
        other.stdout.readline()
        with self.assertRaisesRegex(AssertionError, "^another run"):
            deployment_ports.lock(plan)
        other.kill()
        other.wait()
        deployment_ports.lock(plan).close()

    def test_two_runs_of_the_embedded_target_do_not_meet(self):
        claimed, one = [], embedded.TestDisaggregationDSV4Embedded
        for plan in (one, type("Other", (one,), {})):
            self.addCleanup(plan.doClassCleanups)
            with mock.patch.dict(os.environ), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                printed(plan.configure)
            self.addCleanup(deployment_ports.lock(plan).close)
            deployment_ports.require_free(plan)
            claimed += [getattr(plan, name) for name in dir(plan) if name.endswith("_port")]
        self.assertEqual(len({*claimed}), 2 * 8, claimed)


if __name__ == "__main__":
    unittest.main()
