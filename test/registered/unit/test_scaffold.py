"""The scaffold: what it writes passes lint, contract and plan at once; what would not is not written."""

import os
import re
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from cases import pdkit, without
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import UsageError
from pdkit.core.registry import collect
from pdkit.preflight import scaffold
from pdkit.preflight.environment import needs
from pdkit.preflight.environment.needs import Needs
from pdkit.preflight.lint.check import lint

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
DISTRIBUTED = REPO / "test" / "registered" / "distributed"
H200, LARGE, CPU = "stage-c-test-dsv4-8-gpu-h200", "stage-b-test-1-gpu-large", "stage-a-test-cpu"
DSV4 = "sgl-project/DeepSeek-V4-Flash-FP8"


class ScaffoldCase(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        root = Path(self.enterContext(tempfile.TemporaryDirectory())).resolve()
        self.directory = root / "registered" / "distributed"
        self.directory.mkdir(parents=True)
        for path in DISTRIBUTED.glob("test_disaggregation_dsv4*.py"):
            (self.directory / path.name).symlink_to(path)
        self.before = sorted(self.directory.iterdir())

    def run_scaffold(self, *words):
        with mock.patch.dict(os.environ, without("SGLANG_"), clear=True):
            return pdkit("new", *words, "--directory", self.directory)

    def written(self):
        return [path for path in sorted(self.directory.iterdir()) if path not in self.before]

    def write(self, *words):
        """The one file that a command line writes, and the needs of its suite as the environment check reads them."""
        done = self.run_scaffold(*words)
        self.assertEqual((done.returned, done.err), (0, ""), done.out)
        (path,) = self.written()
        self.assertTrue(done.out.splitlines()[0].endswith(path.name))
        self.assertEqual(list(map(str, lint([path]))), [])
        collection = collect(self.directory.parent)
        self.assertEqual(collection.errors, ())
        found = needs.of([r for r in collection.registrations if r.filename == str(path)])
        self.assertEqual(found.errors, ())
        return path, found


class TestWhatItWrites(ScaffoldCase):
    def gpus(self, found):
        return {server.name: server.gpus for server in found.servers}

    def argv(self, path):
        """Words of the command line of each server, by the contract."""
        contract = scaffold.ask(scaffold.installed(), path)
        return {process.name: list(process.argv) for process in contract.tests[0].processes}

    def test_another_model(self):
        path, found = self.write("Qwen3", "--model", "Qwen/Qwen3-30B-A3B", "--gpus", "4+4", "--suite", H200)
        self.assertEqual(path.name, "test_disaggregation_qwen3.py")
        self.assertIn("class TestDisaggregationQwen3(GSM8KChecks, EightGpuServers):", path.read_text())
        self.assertEqual(self.gpus(found), {"prefill": (0, 1, 2, 3), "decode": (4, 5, 6, 7)})
        self.assertEqual((found.gpu_count, found.gpu_memory_gb), (8, 141))
        self.assertEqual({m for server in found.servers for m in server.models}, {"Qwen/Qwen3-30B-A3B"})
        self.assertEqual({server.a2a for server in found.servers}, {"none"})

    def test_other_flags_of_dsv4(self):
        words = ["--model", DSV4, "--gpus", "2+6", "--suite", H200]
        path, found = self.write("DSV4Wide", *words, "--decode-flags", "--disable-radix-cache")
        self.assertEqual(self.gpus(found), {"prefill": (0, 1), "decode": (2, 3, 4, 5, 6, 7)})
        self.assertEqual({server.a2a for server in found.servers}, {"deepep"})
        argv = self.argv(path)
        self.assertIn("--disable-radix-cache", argv["decode"])
        self.assertNotIn("--disable-radix-cache", argv["prefill"])

    def test_one_gpu_for_both(self):
        words = ["--model", "meta-llama/Llama-3.2-1B", "--gpus", "1", "--suite", LARGE, "--min-score", "0.3"]
        path, found = self.write("Tiny", *words, "--est-time", "99")
        self.assertEqual(self.gpus(found), {"prefill": (0,), "decode": (0,)})
        self.assertLess(sum(server.mem_fraction for server in found.servers), 1)
        self.assertEqual((found.gpu_count, found.gpu_memory_gb), (1, 80))
        self.assertIn("register_cuda_ci(est_time=99, suite=", path.read_text())
        self.assertIn("min_score = 0.3\n", path.read_text())

    def test_a_suite_by_stage_and_runner_configuration(self):
        words = ["--model", DSV4, "--gpus", "4+4", "--suite", "base-c-test-deepep-8-gpu-h200"]
        path, found = self.write("Pair", *words)
        expected = 'register_cuda_ci(est_time=250, stage="base-c", runner_config="deepep-8-gpu-h200")\n'
        self.assertIn(expected, path.read_text())
        self.assertEqual((found.gpu_count, found.gpu_memory_gb, found.capability), (8, 141, (9, 0)))

    def test_on_cpu(self):
        path, found = self.write("DSV4NoPrefixCache", "--suite", CPU, "--prefill-flags", "--disable-radix-cache")
        self.assertEqual(found, Needs("cpu", embedded=True))
        (example,) = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
        self.assertEqual(path.read_text(), example)
        self.assertIn(f"test/registered/distributed/{path.name}", (REPO / "README.md").read_text())

    def test_flags_with_blanks(self):
        test = scaffold.new_test("X", "a/b", H200, "4+4", flags=("--deepep-config", '{"a": 1}', "--x", "'"))
        self.assertIn(""""--deepep-config", '{"a": 1}', "--x", "'"]""", test.source)
        long = scaffold.new_test("X", "a/b", H200, "4+4", decode_flags=("--flag-of-some-length",) * 6)
        self.assertLessEqual(max(map(len, long.source.splitlines())), 120)
        for one in (test, long):
            compile(one.source, "test_x.py", "exec")

    def test_names(self):
        for name, file, cls in (
            ("Qwen3", "qwen3", "Qwen3"),
            ("DSV4NoPrefixCache", "dsv4_no_prefix_cache", "DSV4NoPrefixCache"),
            ("dsv4_nixl", "dsv4_nixl", "Dsv4Nixl"),
        ):
            test = scaffold.new_test(name, None, CPU)
            self.assertEqual(test.file_name, f"test_disaggregation_{file}.py")
            self.assertIn(f"\nclass TestDisaggregation{cls}(", test.source)


class TestBadInput(ScaffoldCase):
    QWEN = ["Qwen3", "--model", "Qwen/Qwen3-30B-A3B", "--suite", H200]

    def refused(self, *words):
        """The lines that say why; nothing is written."""
        done = self.run_scaffold(*words)
        self.assertEqual((done.returned, done.out), (2, ""), done.err)
        self.assertEqual(self.written(), [])
        lines = done.err.splitlines()
        self.assertTrue(all(line.startswith("pdkit new: error: ") for line in lines), done.err)
        return lines

    def test_words(self):
        for name, model, suite, gpus, says in (
            ("3", "a/b", H200, "4+4", "'3' is not a name for a class"),
            ("Qwen-3", "a/b", H200, "4+4", "is not a name"),
            ("TestQwen", "a/b", H200, "4+4", "TestDisaggregationQwen"),
            ("Q", "a b", H200, "4+4", "--model 'a b': expected"),
            ("Q", None, H200, "4+4", "say what to serve with --model"),
            ("Q", "a/b", "stage-c-test-dsv4-8-gpu-h201", "4+4", "nearest known: stage-c-test-dsv4-8-gpu-h200"),
            ("Q", "a/b", H200, None, "say which with --gpus"),
            ("Q", "a/b", H200, "4:4", "--gpus 4:4: expected PREFILL+DECODE"),
            ("Q", "a/b", H200, "0+4", "--gpus 0+4: expected"),
            ("Q", None, CPU, "4+4", "runs on CPU: leave --gpus out"),
            ("Q", "/no/such", CPU, None, "--model /no/such: no such directory"),
        ):
            with self.subTest(says), self.assertRaises(UsageError) as caught:
                scaffold.new_test(name, model, suite, gpus)
            self.assertIn(says, str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))

    def test_what_lint_and_sglang_refuse(self):
        flags = ["--flags", "--tpp 5 --mem-fraction-static x"]
        threshold, unknown, value = self.refused(*self.QWEN, "--gpus", "4+4", "--min-score", "0.99", *flags)
        self.assertIn("test_disaggregation_qwen3.py:14: noisy-threshold: score > 0.99", threshold)
        self.assertIn("--tpp: no such flag", unknown)
        self.assertIn("--mem-fraction-static: invalid float value: 'x'", value)

    def test_one_thing_that_is_wrong(self):
        for words, says in (
            ((*self.QWEN, "--gpus", "5+5"), "needs 10 GPUs (0-9), the runner is 8-gpu-h200"),
            (
                ("Q", "--suite", CPU, "--flags", "--disable-radix-cach"),
                "unknown option --disable-radix-cach; nearest known: --disable-radix-cache",
            ),
            (("dsv4", "--suite", CPU), "test_disaggregation_dsv4.py exists; choose another name"),
        ):
            with self.subTest(says):
                (line,) = self.refused(*words)
                self.assertIn(says, line)


if __name__ == "__main__":
    unittest.main()
