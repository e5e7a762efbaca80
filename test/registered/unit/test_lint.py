"""Each rule of the lint, on a sound test and on the same test with one thing broken."""

import contextlib
import os
import unittest
from pathlib import Path
from unittest import mock

from cases import FolderCase, pdkit
from pdkit.core import source
from pdkit.core.ci_register import register_cpu_ci
from pdkit.preflight.lint import thresholds
from pdkit.preflight.lint.check import RULES, lint

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]

SOUND = """\
import subprocess
import sys
import time
import unittest
from types import SimpleNamespace

import requests
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci
from sglang.test.run_eval import run_eval
from sglang.test.server_fixtures.disaggregation_fixture import PDDisaggregationServerBase
from sglang.test.test_utils import popen_launch_pd_server, popen_launch_server, terminate_and_kill_process_tree

register_cuda_ci(est_time=250, suite="stage-c-test-dsv4-8-gpu-h200")


class TestPair(PDDisaggregationServerBase):
    min_score = 0.95

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = "model"
        cls.launch_all()

    @classmethod
    def start_prefill(cls):
        args = ["--nccl-port", cls.prefill_nccl_port, *cls.rdma_devices_for(range(4))]
        cls.process_prefill = popen_launch_pd_server(cls.model, cls.prefill_url, other_args=args)

    @classmethod
    def start_decode(cls):
        cls.process_decode = cls.launch(cls.decode_args())

    @classmethod
    def decode_args(cls):
        return ["--nccl-port", cls.decode_nccl_port, *cls.rdma_devices_for(range(4, 8))]

    @classmethod
    def launch(cls, args):
        process = popen_launch_pd_server(cls.model, cls.decode_url, other_args=args)
        return process

    def test_gsm8k(self):
        metrics = run_eval(SimpleNamespace(eval_name="gsm8k", num_examples=200, base_url=self.lb_url))
        self.assertGreater(metrics["score"], self.min_score)


class TestClient(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = popen_launch_server("model", "url")
        cls.addClassCleanup(cls.server.kill)
        while requests.get("url").status_code != 200:
            time.sleep(0.1)

    def setUp(self):
        self.server.terminate()

    def test_client(self):
        with subprocess.Popen([sys.executable]) as client:
            client.wait()

    def test_two_clients(self):
        client = subprocess.Popen([sys.executable])
        try:
            self.assertIsNone(client.poll())
        finally:
            client.kill()


if __name__ == "__main__":
    unittest.main()
"""

MAIN = '\n\nif __name__ == "__main__":\n    unittest.main()\n'
IMPORTS_BASE = SOUND[: SOUND.index("class TestPair")].replace("import requests", "import requests\nimport test_base")
CHILD = """\
class TestChild(test_base.TestPair):
    @classmethod
    def decode_args(cls):
        return []

    @classmethod
    def start_decode(cls):
        cls.process_decode = popen_launch_pd_server(1)
"""


class LintCase(FolderCase):
    def found(self, source, name="test_it.py"):
        """(rule, text of the line, message) of each finding."""
        findings = lint([self.write(f"registered/{name}", source)])
        lines = ["", *source.splitlines()]
        return [(finding.subject, lines[finding.line].strip(), finding.what) for finding in findings]

    def assert_breaks(self, rule, old, new, at, says, source=SOUND):
        """With `old` replaced by `new`, exactly that rule speaks, of a line that contains `at`, and says `says`."""
        self.assertEqual(source.count(old), 1, old)
        found = self.found(source.replace(old, new))
        self.assertEqual([name for name, *_ in found], [rule], found)
        self.assertIn(at, found[0][1])
        self.assertIn(says, found[0][2])

    def assert_sound(self, old="", new="", source=SOUND):
        if old:
            self.assertEqual(source.count(old), 1, old)
        self.assertEqual(self.found(source.replace(old, new) if old else source), [])


class TestOwnTree(unittest.TestCase):
    def test_passes(self):
        self.assertEqual(list(map(str, lint([REPO / "test" / "registered"]))), [])


class TestSource(FolderCase):
    """What Python reads is read; what it does not is a SyntaxError or an OSError of one line."""

    def setUp(self):
        super().setUp()
        self.path = self.root / "test_it.py"

    def test_in_the_encoding_that_the_file_names(self):
        text = "# -*- coding: latin-1 -*-\nclass A: é = 1"
        for content in (text.encode("latin-1"), b"\xef\xbb\xbf" + text.replace("latin-1", "utf-8").encode()):
            self.path.write_bytes(content)
            self.assertEqual(list(source.read(self.path).classes["A"].attributes), ["é"])

    def test_what_cannot_be_parsed(self):
        deep = f"z = {'-' * 50_000}1"
        for content, reason in (
            (b"\xe9", "not text in UTF-8 or in"),
            (b"\0", "null bytes"),
            (deep.encode(), "nested too deeply"),
        ):
            self.path.write_bytes(content)
            with self.assertRaisesRegex(SyntaxError, reason):
                source.read(self.path)

    def test_ancestors_in_a_circle(self):
        self.path.write_text("B = object\nclass A(B): pass\nclass B(A): pass")
        self.assertEqual([each.name for each in source.read(self.path).classes["A"].mro], ["A", "B"])

    def test_a_pipe_is_not_opened(self):
        os.mkfifo(self.path)
        done = pdkit("lint", self.path)
        self.assertEqual((done.returned, done.out), (2, ""))
        self.assertRegex(done.err, "test_it.py: neither a file nor a link to one\n$")


class TestRegistration(LintCase):
    REGISTER = 'register_cuda_ci(est_time=250, suite="stage-c-test-dsv4-8-gpu-h200")'

    def test_sound(self):
        self.assert_sound()

    def test_each_mistake(self):
        register, product = self.REGISTER, self.REGISTER.replace("250", "2 * 125")
        other_suite, other_hardware = register.replace("dsv4-8", "dsv4-9"), register.replace("cuda", "cpu")
        for rule, old, new, at, says in (
            ("registration", register, "", "import", "No CI registry found; write register_"),
            ("registration", register, product, product, "est_time is a required constant"),
            ("registration", MAIN, "\n", register, "missing `if __name__"),
            ("syntax", "min_score = 0.95", "min_score = = 0.95", "= =", "not valid Python"),
            ("suite", register, other_suite, other_suite, "known: stage-c-test-dsv4-8-gpu-h200"),
            ("suite", register, other_hardware, other_hardware, "is a suite for cuda; use register_cuda_ci"),
        ):
            with self.subTest(says, new=new):
                self.assert_breaks(rule, old, new, at, says)

    def test_suite_that_another_file_registers(self):
        new = self.REGISTER.replace("stage-c-test-dsv4-8-gpu-h200", "weekly")
        self.assert_breaks("suite", self.REGISTER, new, new, "unknown cuda suite 'weekly'")
        self.write("registered/test_other.py", SOUND.replace(self.REGISTER, new))
        self.assert_sound(self.REGISTER, new)

    def test_main_that_hides_failures(self):
        source = SOUND.replace("import sys\n", "import sys\n\nimport pytest\n")
        for call, says in (
            ("pytest.main([__file__])", "sys.exit(pytest"),
            ("unittest.main(exit=False)", "ends with 0"),
        ):
            self.assert_breaks("silent-main", "unittest.main()", call, call, says, source)
            self.assert_sound("unittest.main()", "sys.exit(pytest.main([__file__]))", source)


class TestEval(LintCase):
    EVAL = "from sglang.test.run_eval import run_eval"

    def test_deprecated(self):
        for broken in (
            "from sglang.test.few_shot_gsm8k import run_eval",
            "from sglang.test import few_shot_gsm8k as run_eval",
            "import sglang.test.few_shot_gsm8k_engine",
            'COMMAND = ["python3", "-m", "sglang.test.few_shot_gsm8k"]',
        ):
            self.assert_breaks("deprecated-eval", self.EVAL, broken, broken, "use sglang.test.run_eval")


class TestOverride(LintCase):
    PREFILL = '["--nccl-port", cls.prefill_nccl_port, *cls.rdma_devices_for(range(4))]'
    DECODE = '["--nccl-port", cls.decode_nccl_port, *cls.rdma_devices_for(range(4, 8))]'

    def test_no_nccl_port_and_nics_of_the_whole_machine(self):
        for args, side in ((self.PREFILL, "prefill"), (self.DECODE, "decode")):
            nics = args.index("*")
            for broken, says in (
                (f"[{args[nics:]}", f'add ["--nccl-port", cls.{side}_nccl'),
                (f"{args[:nics]}*cls.rdma_devices]", f"cls.rdma_devices_for({side} GPUs)"),
            ):
                self.assert_breaks("pd-override", args, broken, f"def start_{side}", says)

    def test_an_override_that_calls_the_fixture(self):
        start = "args = " + self.PREFILL
        server = "cls.process_prefill = popen_launch_pd_server(cls.model, cls.prefill_url, other_args=args)"
        self.assert_sound(f"{start}\n        {server}", "super().start_prefill()")

    def test_an_override_beneath_a_test_in_another_file(self):
        self.write("registered/test_base.py", SOUND)
        found = self.found(IMPORTS_BASE + CHILD + MAIN, "test_child.py")
        self.assertEqual([(rule, line) for rule, line, _ in found], [("pd-override", "def start_decode(cls):")] * 2)


class TestThreshold(LintCase):
    def test_noise(self):
        """Exact by hand: 200 examples at > 0.95 allow 9 wrong; Binomial(200, 0.025) has 10 or more with 3.0 %."""
        noise = thresholds.noise(0.95, 200)
        self.assertEqual((round(noise.better, 6), round(noise.worse, 6)), (0.975, 0.9))
        self.assertAlmostEqual(noise.false_alarm, 0.0300, places=4)
        self.assertAlmostEqual(noise.miss, 0.0035, places=4)
        self.assertLess(thresholds.noise(0.95, 200, strict=False).false_alarm, noise.false_alarm)
        symmetric = thresholds.noise(0.1, 40)
        self.assertEqual((symmetric.better, symmetric.worse), (0.2, 0.05))

    def test_too_few_examples(self):
        for examples in (20, 50, 100):
            new = f"num_examples={examples}"
            says = f"over {examples} examples"
            self.assert_breaks("noisy-threshold", "num_examples=200", new, "min_score = 0.95", says)
        self.assert_sound("num_examples=200", "num_examples=1319")
        self.assert_sound("num_examples=200", "num_examples=None")

    def test_a_threshold_that_only_lets_too_much_pass(self):
        noise = thresholds.noise(0.95, 100, strict=False)
        self.assertLess(noise.false_alarm, thresholds.RATE)
        self.assertGreater(noise.miss, thresholds.RATE)
        source = SOUND.replace("assertGreater(", "assertGreaterEqual(")
        broken = "num_examples=100"
        self.assert_breaks("noisy-threshold", "num_examples=200", broken, "0.95", "score >= 0.95 over 100", source)

    def test_too_high_a_threshold(self):
        self.assert_breaks("noisy-threshold", "0.95", "0.99", "min_score = 0.99", "523 examples can tell them apart")

    def test_other_ways_to_say_it(self):
        assertion = 'self.assertGreater(metrics["score"], self.min_score)'
        for broken in (
            'self.assertGreater(metrics["score"], 0.99)',
            'self.assertGreaterEqual(metrics["score"], 0.99)',
            'self.assertLess(0.99, metrics["score"])',
            'assert metrics["score"] > 0.99',
        ):
            self.assert_breaks("noisy-threshold", assertion, broken, broken, "within its own noise")
        self.assert_sound(assertion, 'self.assertGreater(metrics["latency"], 0.99)')

    def test_a_subclass_that_raises_the_threshold(self):
        self.write("registered/test_base.py", SOUND)
        subclass = IMPORTS_BASE + "class TestChild(test_base.TestPair):\n    min_score = 0.95\n" + MAIN
        self.assert_sound(source=subclass)
        self.assert_breaks("noisy-threshold", "0.95", "0.98", "min_score = 0.98", "score > 0.98 over 200", subclass)

    def test_mixin_of_sglang(self):
        old = "    min_score = 0.95\n"
        self.assert_sound(old, old + "    gsm8k_accuracy_thres = 0.95\n")
        broken = "    gsm8k_accuracy_thres = 0.95\n    gsm8k_num_questions = 50\n"
        self.assert_breaks("noisy-threshold", old, old + broken, "gsm8k_accuracy_thres", "over 50 examples")


class TestExemption(LintCase):
    BROKEN = "min_score = 0.99"

    def exempted(self, comment, above=False):
        text = f"{comment}\n    {self.BROKEN}" if above else f"{self.BROKEN}  {comment}"
        return self.found(SOUND.replace("min_score = 0.95", text))

    def test_with_a_reason_and_without(self):
        for above in (False, True):
            self.assertEqual(self.exempted("# lint: allow noisy-threshold: measured at 1.0", above), [])
        rules = [rule for rule, *_ in self.exempted("# lint: allow noisy-threshold")]
        self.assertEqual(rules, ["exemption", "noisy-threshold"])

    def test_of_another_rule_and_of_none(self):
        (stale, _, says), (rule, *_) = self.exempted("# lint: allow deprecated-eval: no")
        self.assertEqual((stale, rule), ("exemption", "noisy-threshold"))
        self.assertIn("nothing here breaks deprecated-eval", says)
        found = self.exempted("# lint: allow noisy-treshold: no")
        self.assertIn("nearest known: noisy-threshold", found[0][2])

    def test_in_a_string(self):
        in_a_string = 'min_score = 0.99; x = "# lint: allow noisy-threshold: no"'
        found = self.found(SOUND.replace("min_score = 0.95", in_a_string))
        self.assertEqual([rule for rule, *_ in found], ["noisy-threshold"])


class TestCommand(LintCase):
    def test_what_is_absent_is_told_before_a_tree_is_read(self):
        with mock.patch("pdkit.preflight.lint.check.collect") as collect, self.assertRaises(FileNotFoundError):
            lint([Path("/absent.py")])
        collect.assert_not_called()

    def test_findings(self):
        self.write("registered/test_it.py", SOUND.replace("0.95", "0.99"))
        self.write("registered/test_sound.py", SOUND)
        self.enterContext(contextlib.chdir(self.root / "registered"))
        found = pdkit("lint", "test_it.py")
        self.assertEqual((found.returned, found.err, found.out.count("\n")), (1, "", 1))
        self.assertRegex(found.out, r"^test_it\.py:17: noisy-threshold: score > 0\.99 .*; .*")
        self.assertEqual(pdkit("lint", "test_sound.py"), (0, "", ""))
        self.assertEqual(pdkit("lint", ".").out.count("\n"), 1)

    def test_rules(self):
        self.assertEqual([line.split()[0] for line in pdkit("lint", "--rules").out.splitlines()], list(RULES))


if __name__ == "__main__":
    unittest.main()
