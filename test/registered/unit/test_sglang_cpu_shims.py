"""The CPU shims compute what SGLang's kernels do, and are installed only where they fit."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
import zlib
from pathlib import Path
from unittest import mock

import torch
from cases import FolderCase, pdkit
from pdkit.core.errors import ExitCode, NotReady
from pdkit.deployment.cpu import checkpoints, drift, listing, plan, plugin, registry, requirements, working_tree
from pdkit.deployment.cpu.shims import checksum, transfer
from pdkit.faults import planted_bugs
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=70, suite="stage-a-test-cpu", nightly=True)


def server_environment(**more):
    """Of a process that serves the DeepSeek-V4."""
    return {**os.environ, **plan.environment(plan.DSV4), **more}


class TestTruth(unittest.TestCase):
    def test_shims_compute_what_sglangs_kernels_do(self):
        command = [sys.executable, "-W", "ignore", "-m", "pdkit.deployment.cpu.truth"]
        env = server_environment(TRITON_INTERPRET="1")
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        self.assertEqual(run.returncode, 0, run.stderr[-2000:])
        rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        self.assertGreater(len(rows), 55)
        for row in rows:
            with self.subTest(row["check"]):
                self.assertLessEqual(row["difference"], row["tolerance"])

    def test_the_comparison_on_a_gpu_calls_sglang_as_it_is(self):
        """What cannot be tried without a GPU says so; all else has a result, which is the shim's own called by SGLang."""
        study = Path(__file__).parents[3] / "studies" / "shims_truth.py"
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory, "record.json")
            command = [sys.executable, str(study), "--rehearse", "--limit", "300", "--out", str(out)]
            run = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=400)
            self.assertEqual(run.returncode, 0, run.stderr[-2000:])
            cases = json.loads(out.read_text())["cases"]
        self.assertGreater(len(cases), 25)
        for name, case in cases.items():
            with self.subTest(name):
                if "error" in case:
                    self.assertEqual(case["error"], "NotReady: CUDA only")
                for result, row in case.get("results", {}).items():
                    self.assertLess(row.get("rms_over_rms", 0), 1e-6, result)

    def test_each_replacement_of_a_kernel_names_what_it_stands_for(self):
        for each in registry.REPLACEMENTS:
            with self.subTest(each.target):
                self.assertTrue(each.why)
                self.assertIn(each.family, ("any", "dsv4", "speculative", "nixl"))


class TestNixl(unittest.TestCase):
    def test_its_progress_thread_leaves_a_core(self):
        """NIXL asks for no pause at all; by the clock of its process, as it is another thread's time."""
        _bindings, used = importlib.import_module("nixl._bindings"), []
        for config in (_bindings.nixlAgentConfig(), transfer.with_pauses(_bindings.nixlAgentConfig)()):
            config.useProgThread, config.pthrDelay = True, 0
            agent = _bindings.nixlAgent(f"agent {len(used)}", config)
            agent.createBackend("UCX", {})
            before = time.process_time()
            time.sleep(0.3)
            used.append(time.process_time() - before)
            del agent
        self.assertEqual(config.pthrDelay, transfer.PAUSE_US)
        self.assertLess(used[1], used[0] / 2)


class TestChecksum(unittest.TestCase):
    """The checksum of KV pages is Adler-32 of the items that are named, as one text."""

    def test_it_is_of_the_named_items_in_their_order(self):
        pages = [torch.arange(24, dtype=torch.uint8).view(4, 6), torch.arange(100, 120, dtype=torch.uint8).view(4, 5)]
        computer = mock.Mock(
            _kv_data_ptrs=[each.data_ptr() for each in pages],
            _kv_item_lens=[each.shape[1] for each in pages],
            _state_data_ptrs=[pages[0].data_ptr()],
            _state_item_lens=[6],
        )
        order, states = [3, 1], [2]
        text = b"".join(bytes(each[order].flatten().tolist()) for each in pages) + bytes(pages[0][states[0]].tolist())
        found = checksum.compute(computer, torch.tensor(order), torch.tensor(states))
        self.assertEqual(found, zlib.adler32(text))
        self.assertNotEqual(found, checksum.compute(computer, torch.tensor(order[::-1]), torch.tensor(states)))
        pages[1][1, 2] ^= 1
        self.assertNotEqual(found, checksum.compute(computer, torch.tensor(order), torch.tensor(states)))


class TestDrift(unittest.TestCase):
    """What is replaced must be as in the release that the shims were written for; else nothing is started."""

    @classmethod
    def setUpClass(cls):
        cls.directory = Path(tempfile.mkdtemp(prefix="sglang-tree-"))
        cls.addClassCleanup(shutil.rmtree, cls.directory)
        package = drift.installed_package()
        for file, _ in drift.recorded():
            if (package / file).is_file():
                (cls.directory / "sglang" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(package / file, cls.directory / "sglang" / file)

    def reason(self, file, old, new):
        """The refusal of a tree in which `old` is `new` in `file`."""
        path = self.directory / "sglang" / file
        text = path.read_text()
        self.addCleanup(path.write_text, text)
        self.assertIn(old, text)
        path.write_text(text.replace(old, new))
        with mock.patch.dict(os.environ, {plan.SOURCE_VARIABLE: str(self.directory)}):
            with self.assertRaises(NotReady) as refused:
                drift.require_fit()
        path.write_text(text)
        self.assertEqual(len(str(refused.exception).splitlines()), 1)
        return str(refused.exception)

    def test_the_installed_release_and_an_unchanged_tree_fit(self):
        drift.require_fit()
        with mock.patch.dict(os.environ, {plan.SOURCE_VARIABLE: str(self.directory)}):
            drift.require_fit()

    def test_the_record_is_of_what_the_shims_replace_and_imitate(self):
        """Renewed by `python3 -m pdkit.deployment.cpu.drift record`."""
        recorded = {place: value == drift.PRESENT for place, value in drift.recorded().items()}
        self.assertEqual(recorded, drift.entries())

    def test_an_absent_name_and_another_kernel_are_named(self):
        reason = self.reason("kernels/ops/layernorm/mhc.py", "def mhc_combine(", "def mhc_combine_streams(")
        self.assertIn("mhc_combine of kernels/ops/layernorm/mhc.py is absent", reason)
        reason = self.reason("kernels/jit/csrc/deepseek_v4/c_plan.cuh", "seq_len - 1", "seq_len - 2")
        self.assertIn("c_plan.cuh is another", reason)

    def test_a_comment_is_no_change(self):
        file = self.directory / "sglang/kernels/ops/layernorm/mhc.py"
        text = file.read_text()
        self.addCleanup(file.write_text, text)
        file.write_text(f"# a comment\n{text}")
        self.assertEqual(drift.differences(self.directory / "sglang"), [])

    def test_the_command_exits_with_3(self):
        command, env = [sys.executable, "-m", "pdkit.deployment.cpu.drift"], {plan.SOURCE_VARIABLE: "/nonexistent"}
        run = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
        self.assertEqual((run.returncode, run.stderr.count("\n")), (ExitCode.NOT_READY, 1), run.stderr)


class TestRegistry(unittest.TestCase):
    def test_a_name_that_is_gone_is_an_error(self):
        gone = registry.Replacement("json:dumps_all", lambda old: old, "any", "")
        with self.assertRaisesRegex(registry.SglangChanged, "json has no dumps_all"):
            gone.install()

    def test_a_name_is_replaced_once(self):
        with self.assertRaises(AssertionError):
            registry.replaces(registry.REPLACEMENTS[0].target)(test_replacement)

    def test_nothing_is_replaced_where_there_is_a_gpu(self):
        is_available = mock.patch("torch.cuda.is_available", return_value=True)
        with is_available, mock.patch.object(registry, "install") as install:
            plugin.activate()
        install.assert_not_called()

    def test_a_process_whose_shims_fail_ends(self):
        """SGLang itself logs a plugin's exception and goes on."""
        environment = server_environment(**{plugin.FAMILY_VARIABLE: "dsv4"})
        code = (
            "from pdkit.deployment.cpu import registry, plugin\n"
            "registry.replaces('json:dumps_all')(len)\n"
            "plugin.activate(); print('lives')"
        )
        command = [sys.executable, "-W", "ignore", "-c", code]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        self.assertEqual((run.returncode, run.stdout), (plugin.FAILED, ""), run.stderr[-500:])
        self.assertIn("json has no dumps_all", run.stderr)

    def test_a_log_without_the_line_is_refused(self):
        with tempfile.NamedTemporaryFile("w") as log:
            log.write("The server is fired up and ready to roll!\n")
            log.flush()
            with self.assertRaisesRegex(AssertionError, "did not load the CPU shims"):
                plan.require_active(log.name)


def test_replacement():
    """a reason"""


class TestCommand(unittest.TestCase):
    """`pdkit run --on sglang-cpu` where it cannot run: one line for each thing, exit status 3, nothing is started."""

    def refusal(self, *words, command="run"):
        """(exit code, lines on standard error)"""
        started = mock.patch("pdkit.runner.suite.run_suite", side_effect=AssertionError("it was started"))
        with mock.patch.dict(os.environ), started:
            refused = pdkit(command, "--on", "sglang-cpu", "--no-history", *words)
        return refused.returned, refused.err.splitlines()

    def setUp(self):
        try:
            requirements.require_machine()
        except NotReady as reason:
            self.skipTest(str(reason))

    def test_what_the_machine_lacks_is_one_line_and_status_3(self):
        memory = mock.Mock(return_value=mock.Mock(available=1.24 * 2**30))
        no_memory = mock.patch.object(requirements.psutil, "virtual_memory", memory)
        no_ports = mock.patch("pdkit.core.ports.claim", side_effect=RuntimeError("no 10 free ports in a row"))
        for lacks, says in (
            (mock.patch.dict(requirements.LIBRARIES, {"libabsent.so.1": "libabsent1"}), "apt-get install libabsent1"),
            (mock.patch.dict(requirements.PACKAGES, {"pdkit_absent": "absent"}), "needs the package absent"),
            (no_memory, "needs 5 GiB of memory, 1.2 GiB are free"),
            (no_ports, "no 10 free ports in a row"),
            (mock.patch.object(drift, "RELEASE", "0.5.22"), "needs SGLang 0.5.22, found"),
        ):
            with self.subTest(says), lacks:
                code, lines = self.refusal()
                self.assertEqual((code, len(lines)), (ExitCode.NOT_READY, 1), lines)
                self.assertIn(says, lines[0])

    def test_a_directory_without_sglang(self):
        for command in ("run", "test"):
            code, lines = self.refusal("--sglang-source", "/nonexistent", command=command)
            self.assertEqual((code, len(lines)), (ExitCode.NOT_READY, 1), lines)
            self.assertIn("/nonexistent has no package sglang", lines[0])


class TestWorkingTree(FolderCase):
    def setUp(self):
        super().setUp()
        self.release = self.root / "release"
        scheduler = "A = 1\n\n\nclass Scheduler:\n    def send(self):\n        return 1\n"
        self.write("release/srt/disaggregation/prefill.py", scheduler)
        self.write("release/lang/api.py", "def gen():\n    pass\n")
        self.package = working_tree.copy(self.release, self.root / "tree")

    def test_a_copy_is_as_the_release(self):
        self.assertEqual(working_tree.report(self.package, self.release), "")

    def test_a_planted_bug_is_named_and_the_release_stays_as_it_is(self):
        working_tree.Bug("off by one", "srt/disaggregation/prefill.py", "return 1", "return 2").plant(self.package)
        working_tree.Bug("another", "lang/api.py", "pass", "return 1").plant(self.package)
        changed = working_tree.changed(self.package, self.release)
        self.assertEqual(changed, ["srt/disaggregation/prefill.py: Scheduler.send", "lang/api.py: gen"])
        self.assertIn("return 1", (self.release / "srt/disaggregation/prefill.py").read_text())

    def test_what_does_not_parse_and_what_is_new(self):
        working_tree.Bug("no syntax", "lang/api.py", "def gen", "def def gen").plant(self.package)
        (self.package / "lang/new.py").write_text("")
        found = working_tree.changed(self.package, self.release)
        self.assertEqual(found, ["lang/api.py: line 1: invalid syntax", "lang/new.py: a new file"])

    def test_what_python_compiles_of_a_planted_bug_stays_with_the_copy(self):
        compiled = self.write("release/lang/__pycache__/api.pyc", "the release's")
        package = working_tree.copy(self.release, self.root / "another")
        working_tree.Bug("another", "lang/api.py", "pass", "return 1").plant(package)
        self.write("written", "the copy's").replace(package / "lang/__pycache__/api.pyc")
        self.assertEqual(compiled.read_text(), "the release's")

    def test_a_bug_that_fits_nowhere_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "0 places like 'return 7'"):
            working_tree.Bug("none", "lang/api.py", "return 7", "").plant(self.package)

    def test_each_bug_of_the_library_fits_the_release(self):
        for bug in (*planted_bugs.BUGS, *planted_bugs.STATE_BUGS):
            with self.subTest(bug.name):
                text = (drift.installed_package() / bug.file).read_text()
                self.assertEqual(text.count(bug.old), 1)
                ast.parse(text.replace(bug.old, bug.new))


class TestPlan(unittest.TestCase):
    def test_a_working_tree_comes_before_the_release(self):
        with tempfile.TemporaryDirectory() as tree:
            Path(tree, "python", "sglang").mkdir(parents=True)
            path = plan.python_path(plan.source({plan.SOURCE_VARIABLE: tree}), {"PYTHONPATH": "/else"})
        self.assertEqual(path.split(os.pathsep)[:2], [str(plan.SITE), f"{tree}/python"])
        self.assertTrue(path.endswith(f"{os.pathsep}/else"))

    def test_site_stands_for_packages_that_need_a_gpu(self):
        code = "import sgl_kernel, flash_mla\nprint(sgl_kernel.verify_tree_greedy_cpu.__name__)\nsgl_kernel.moe_align()"
        run = subprocess.run([sys.executable, "-c", code], env=server_environment(), capture_output=True, text=True)
        self.assertEqual(run.stdout, "verify_tree_greedy_cpu\n", run.stderr)
        self.assertIn("sgl_kernel.moe_align was called: there is no GPU", run.stderr)


class TestCheckpoints(unittest.TestCase):
    def test_the_dsv4_is_the_same_each_time_and_transformers_reads_its_geometry(self):
        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory() as directory:
            stored = []
            for name in ("one", "two"):
                checkpoints.make_dsv4(Path(directory, name))
                stored.append(load_file(Path(directory, name, "model.safetensors")))
            config = json.loads(Path(directory, "one", "config.json").read_text())
        one, two = stored
        self.assertEqual(one.keys(), two.keys())
        self.assertTrue(all(bool((one[name] == two[name]).all()) for name in one))
        self.assertEqual((config["head_dim"], config["index_head_dim"], config["sliding_window"]), (512, 128, 128))
        self.assertLess(sum(tensor.numel() for tensor in one.values()), 6_000_000)

    def test_the_llama_is_the_recorded_one(self):
        import hashlib

        path = checkpoints.provide("llama")
        record = json.loads((path / "training.json").read_text())
        self.assertEqual(hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest(), record["sha256"])
        self.assertLess((path / "model.safetensors").stat().st_size, 10_000_000)


class TestDocs(unittest.TestCase):
    def test_the_list_in_the_docs_is_the_registry(self):
        """Renewed by `python3 -m pdkit.deployment.cpu.listing docs/sglang-cpu.md`."""
        text = Path(__file__).parents[3].joinpath("docs", "sglang-cpu.md").read_text(encoding="utf-8")
        self.assertIn(f"{listing.BEGIN}\n{listing.table()}\n{listing.END}", text)


class TestShimsAreSmall(unittest.TestCase):
    def test_shims_import_nothing_of_sglang_at_module_level(self):
        """So that the drift check and the docs read their list without SGLang."""
        for file in Path(registry.__file__).parent.glob("shims/*.py"):
            tree = ast.parse(file.read_text())
            modules = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
            modules += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
            self.assertEqual([module for module in modules if module.startswith("sglang")], [], file.name)


if __name__ == "__main__":
    unittest.main()
