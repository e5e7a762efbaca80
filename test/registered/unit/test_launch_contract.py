"""The contract on a small release made for the purpose, rule by rule, and on the installed one."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from cases import FolderCase, pdkit
from pdkit.core import forked
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode
from pdkit.preflight.contract import launches
from pdkit.preflight.contract.release import ReleaseNotFound, installed, unpacked
from release_wheels import SERVER_ARGS, write_wheel

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")

DSV4 = Path(__file__).parents[1] / "distributed" / "test_disaggregation_dsv4.py"

TEST = """
import os
import subprocess
import unittest

import numpy
from sglang.test.server_fixtures.disaggregation_fixture import PDDisaggregationServerBase
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=1, suite="stage-c-test-8-gpu-h200")


class TestPD(PDDisaggregationServerBase):
    extra_decode_args = ["--base-gpu-id", "4"]
    BODY

    def test_it(self):
        raise AssertionError("no test is run while a plan is read")
"""
LAUNCHES = """
@classmethod
def setUpClass(cls):
    super().setUpClass()
    cls.launch_all()
"""


def source_of(body):
    """A test file whose class has `body`."""
    return TEST.replace("BODY", textwrap.dedent(body).replace("\n", "\n    "))


class TestSmallRelease(FolderCase):
    def ask(self, *argv, env=None, body=LAUNCHES, changes=None):
        """The contract of a test whose servers get `argv` and `env` on top."""
        test = self.write("test_pd.py", source_of(body))
        with unpacked(write_wheel(self.root / "sglang.whl", changes)) as release:
            return launches.ask(release, test, argv, env)

    def ask_each(self, *bodies, changes=None):
        """The contracts of tests with these bodies, asked of one process."""
        tests = [self.write(f"test_{number}.py", source_of(body)) for number, body in enumerate(bodies)]
        with unpacked(write_wheel(self.root / "sglang.whl", changes)) as release:
            return launches.ask_each(release, tests)

    def ask_with_flags(self, *flags, changes=None):
        """The contract of a test for each of these lines of flags, which its servers get."""
        bodies = (f"{LAUNCHES}\nextra_prefill_args = extra_decode_args = {each.split()!r}" for each in flags)
        return self.ask_each(*bodies, changes=changes)

    def line(self, contract, level="error"):
        """The only finding, without whom it is about."""
        self.assertEqual(len(contract.errors), level == "error", contract.errors)
        (line,) = contract.errors if level == "error" else contract.warnings
        whom = "TestPD: prefill, decode: "
        self.assertTrue(line.startswith(whom), line)
        return line.removeprefix(whom)

    def test_taken(self):
        contract = self.ask("--tensor-parallel-size", "4", env={"SGLANG_DISPATCH_TOKENS": "256"})
        self.assertEqual((contract.errors, contract.warnings), ([], []))
        (test,) = contract.tests
        prefill, decode = test.processes
        self.assertEqual((prefill.name, decode.name, decode.module), ("prefill", "decode", "sglang.launch_server"))
        self.assertEqual(prefill.argv[:2], ("--model-path", "some/model"))
        self.assertEqual((prefill.settings["tp_size"], prefill.settings["base_gpu_id"]), (4, 0))
        self.assertEqual((decode.settings["tp_size"], decode.settings["base_gpu_id"]), (4, 4))
        self.assertEqual(prefill.env, {"MC_TCP_ENABLE_CONNECTION_POOL": "true", "SGLANG_DISPATCH_TOKENS": "256"})
        self.assertEqual(contract.suites, ("stage-c-test-8-gpu-h200",))
        self.assertEqual(contract.variables, ("SGLANG_DISPATCH_TOKENS", "SGLANG_NEW_NAME"))

    def test_flags(self):
        rows = (
            ("--mem-fraction-statics 0.7", "error", "no such flag; nearest: --mem-fraction-static, "),
            ("--cuda-graph-max-bs 128", "error",
             "ambiguous, could match --cuda-graph-max-bs-decode, --cuda-graph-max-bs-prefill$"),
            ("--tp 4", "warning", "abbreviates --tp-size: refused once another flag starts like that$"),
            ("--tp-size four", "error", "invalid int value: 'four'$"),
            ("--tp-size=four", "error", "invalid int value: 'four'$"),
            ("--moe-a2a-backend depep", "error", "invalid choice: 'depep'"),
            ("--tp-size", "error", "expected one argument$"),
            ("--trust-remote-code yes", "error", "takes no value, given 'yes'$"),
            ("--deepep-config {", "error", "not valid JSON: {$"),
            ("--enable-dp-attention", "warning", "deprecated, use --attn-dp-size N$"),
            ("--old-switch", "warning", r"\[Deprecated\] Use --new-switch instead.$"),
        )  # fmt: skip
        *contracts, fine = self.ask_with_flags(*(argv for argv, *_ in rows), '--deepep-config {"a":1}')
        for (argv, level, pattern), contract in zip(rows, contracts, strict=True):
            with self.subTest(argv):
                self.assertRegex(self.line(contract, level), f"^{argv.split()[0]}: {pattern}")
        self.assertEqual(fine.errors, [])

    def test_one_refusal_hides_no_other(self):
        contract = self.ask("--tp-size", "four", "--no-such", "--moe-a2a-backend", "depep", env={"SGLANG_X": "1"})
        self.assertEqual(len(contract.errors), 4)

    def test_variables(self):
        for name, value, level, pattern in (
            ("SGLANG_DISPATCH_TOKEN", "256", "error",
             "no such variable, nobody reads it; nearest: SGLANG_DISPATCH_TOKENS, "),
            ("SGLANG_DISPATCH_TOKENS", "many", "error", '"many" is not a valid integer value'),
            ("SGLANG_OLD_NAME", "1", "warning", "deprecated, use SGLANG_NEW_NAME$"),
            ("SGLANG_GONE", "1", "warning", ".* deprecated. Please use SGLANG_DISPATCH_TOKENS instead.$"),
            ("SGLANG_UNREGISTERED", "1", "warning", "not in the registry, yet read by sglang/srt/utils.py$"),
        ):  # fmt: skip
            with self.subTest(name):
                self.assertRegex(self.line(self.ask(env={name: value}), level), f"^{name}: {pattern}")
        self.assertEqual(self.ask(env={"NCCL_DEBUG": "INFO"}).errors, [], "those of others are not judged")

    def test_variables_that_a_test_sets(self):
        body = f"{LAUNCHES}\nos.environ['SGLANG_MODULE_LEVEL'] = '1'\nserve = classmethod(lambda cls, *argv: "
        body += "PDDisaggregationServerBase.serve.__func__(cls, *argv, env={'SGLANG_IN_POPEN': '1'}))"
        errors = self.ask(body=body).errors
        self.assertEqual([line.split(": ")[2] for line in errors], ["SGLANG_IN_POPEN", "SGLANG_MODULE_LEVEL"])

    def test_only_what_tests_look_at_is_inherited(self):
        body = f"{LAUNCHES}\nextra_prefill_args = ['--host', os.getenv('SGLANG_TEST_HOST', 'nowhere')]"
        with mock.patch.dict(os.environ, SGLANG_TEST_HOST="there", SGLANG_TYPO="1", SGLANG_DISPATCH_TOKENS="many"):
            contract = self.ask(body=body)
            self.assertEqual(contract.errors, [])
            same = "os.environ['SGLANG_DISPATCH_TOKENS'] = 'many'"
            self.assertEqual(len(self.ask(body=f"{LAUNCHES}\n{same}").errors), 1)
        self.assertEqual(contract.tests[0].processes[0].settings["host"], "there")

    def test_ports(self):
        prefill, decode = self.ask("--nccl-port", "21300").tests[0].processes
        self.assertEqual(prefill.ports, {"http": 21100, "bootstrap": 8998, "nccl": 21300})
        self.assertEqual(decode.ports, {"http": 21200, "nccl": 21300})

    def test_ports_of_dp_attention(self):
        contracts = self.ask_with_flags("--enable-dp-attention --dp-size 4", "--enable-dp-attention")
        prefill, alone = (contract.tests[0].processes[0] for contract in contracts)
        self.assertEqual(prefill.ports, {"http": 21100, "bootstrap": 8998, "dist_init": 21333})
        self.assertEqual(prefill.settings["attention_dp"], 4)
        self.assertEqual(alone.ports, {"http": 21100, "bootstrap": 8998})

    def test_attention_width_that_is_a_flag_of_its_own(self):
        flag = '        add("--attn-dp-size", type=int, default=1)'
        changes = {"srt/server_args.py": SERVER_ARGS.replace("EXTRA_FLAG", flag)}
        new, old = "--attn-dp-size=4", "--enable-dp-attention"
        flags = (new, f"{old} --dp-size=4", f"{new} {old}", "--dp-size 4")
        *wide, replicated = (each.tests[0].processes[0] for each in self.ask_with_flags(*flags, changes=changes))
        for prefill in wide:
            self.assertEqual((prefill.settings["attention_dp"], prefill.settings["replicas"]), (4, 1))
            self.assertIn("dist_init", prefill.ports)
        self.assertEqual((replicated.settings["attention_dp"], replicated.settings["replicas"]), (1, 4))

    def test_checksum_of_kv_transfers(self):
        """Its parser takes the flag; the release's checksum has no indices of DeepSeek-V4's pools."""
        flag = "--disaggregation-enable-kv-checksum"
        added = SERVER_ARGS.replace("EXTRA_FLAG", f'        add("{flag}", action="store_true")')
        lacking = {"srt/server_args.py": added, "srt/disaggregation/checksum.py": "class KvChecksumComputer: pass\n"}
        knowing = lacking | {"srt/disaggregation/checksum.py": "DeepSeekV4TokenToKVPool = 1\n"}
        dsv4 = "--model-path sgl-project/DeepSeek-V4-Flash-FP8"
        both, *others = self.ask_with_flags(f"{flag} {dsv4}", flag, dsv4, changes=lacking)
        why = "checksum.py knows no DeepSeekV4TokenToKVPool; prefill's first request ends it"
        self.assertEqual(self.line(both), f"{flag}: not for DeepSeek-V4: {why}")
        others += self.ask_with_flags(f"{flag} {dsv4}", changes=knowing)
        self.assertEqual([other.errors for other in others], [[]] * 3, "another model, no flag, a release that knows")

    def test_facts_of_the_fixture(self):
        facts = {"pins NCCL ports": True, "NICs by GPU": False, "watches processes": False}
        self.assertEqual(self.ask().fixture, facts)

    def test_nothing_is_started(self):
        witness = self.root / "started"
        program = f"open({str(witness)!r}, 'w')"
        body = f"""
            @classmethod
            def setUpClass(cls):
                subprocess.Popen(["{sys.executable}", "-m", "timeit", "-n1", "-r1", {program!r}])
                try:
                    subprocess.run(["{sys.executable}", "-c", {program!r}], check=True)
                except FileNotFoundError:
                    super().setUpClass()
                    cls.launch_all()
        """
        contract = self.ask(body=body)
        self.assertEqual([p.name for p in contract.tests[0].processes], ["timeit", "prefill", "decode"])
        self.assertFalse(contract.tests[0].processes[0].checked)
        self.assertFalse(witness.exists())

    def test_class_with_configure(self):
        body = """
            @classmethod
            def setUpClass(cls):
                raise unittest.SkipTest("no GPU")

            @classmethod
            def configure(cls):
                cls.extra_prefill_args = ["--tp-size", "2"]
        """
        prefill, _ = self.ask(body=body).tests[0].processes
        self.assertEqual(prefill.settings["tp_size"], 2)

    def test_classes_that_are_not_tests_of_the_file(self):
        self.write("test_elsewhere.py", source_of(LAUNCHES))
        base = "class Base(PDDisaggregationServerBase):\n    pass\n"
        source = f"{source_of(LAUNCHES)}\n\nfrom test_elsewhere import TestPD as Elsewhere\n{base}"
        test = self.write("test_pd.py", source)
        with unpacked(write_wheel(self.root / "sglang.whl")) as release:
            self.assertEqual([plan.test for plan in launches.ask(release, test).tests], ["TestPD"])

    def test_a_test_that_looks_for_sglang_first(self):
        looks = "import importlib.util\nassert importlib.util.find_spec('sglang').submodule_search_locations"
        self.assertEqual(self.ask(body=f"{LAUNCHES}\n{looks}").errors, [])

    def test_tests_that_do_not_launch(self):
        bodies = {
            "setUpClass = classmethod(lambda cls: cls.skipTest(cls, 'no GPU'))": "skips before it launches: no GPU",
            "setUpClass = classmethod(lambda cls: cls.port)": "raises before all is launched: AttributeError: .*port",
            "launch_all = classmethod(lambda cls: None)": "launches nothing",
        }
        for contract, problem in zip(self.ask_each(*bodies), bodies.values(), strict=True):
            with self.subTest(problem):
                self.assertRegex(contract.errors[0], f"^TestPD: {problem}")

    def test_what_fails_after_the_load_balancer(self):
        launch = "subprocess.Popen(['python3', '-m', '{}']), cls.launch_all(), cls.speak_to_it()]"
        body = f"setUpClass = classmethod(lambda cls: [{launch})"
        modules = "sglang_router.launch_router", "another.module"
        router, another = self.ask_each(*(body.format(module) for module in modules))
        self.assertEqual(router.errors, [])
        self.assertRegex(another.errors[0], "raises .* 'speak_to_it'")

    def test_what_cannot_be_read(self):
        for source in ("srt/server_args.py", "srt/environ.py", "test/server_fixtures/disaggregation_fixture.py"):
            with self.subTest(source), self.assertRaisesRegex(launches.ContractUnreadable, "OSError: no"):
                self.ask(changes={source: "raise OSError('no')"})
        with self.assertRaisesRegex(launches.ContractUnreadable, "test_pd.py: cannot be imported: NameError"):
            self.ask(body="x = undefined")

    def test_module_that_breaks_is_named_and_not_needed(self):
        self.assertEqual([*self.ask().assumed], ["sglang.srt.breaks_without_torch"])

    def test_no_answer_rests_on_a_stand_in(self):
        for choices in ("torch.kernels()", "['a', torch.kernels]"):
            flag = f'        add("--kernel", choices={choices})'
            changes = {"srt/server_args.py": SERVER_ARGS.replace("EXTRA_FLAG", flag)}
            with self.assertRaisesRegex(launches.ContractUnreadable, "--kernel: its values come from a package"):
                self.ask(changes=changes)

    def test_command(self):
        self.ask()
        test, wheel = self.root / "test_pd.py", self.root / "sglang.whl"
        code, out, err = pdkit("contract", test, "--sglang-wheel", wheel)
        self.assertEqual((code, err), (ExitCode.PASSED, ""))
        self.assertIn("prefill         3 flags, 0 variables, 0 refused", out)

        code, out, err = pdkit("contract", test, "--sglang-wheel", wheel, "--flags", "--tp-size four", "--json")
        wanted = "TestPD: prefill, decode: --tp-size: invalid int value: 'four'"
        self.assertEqual((code, err), (ExitCode.BAD_USAGE, f"pdkit contract: error: {wanted} (sglang 0.5.99)\n"))
        self.assertEqual(json.loads(out)["errors"], [wanted])

        source = "import unittest\n\n\nclass TestOther(unittest.TestCase):\n    def test_it(self): pass\n"
        other, of_x = self.write("test_other.py", source), write_wheel(self.root / "x.whl", name="x")
        without_pd = "test_other.py has no test class on top of SGLang's PDDisaggregationServerBase"
        for file, whl, error in (
            (self.root / "none.py", wheel, "none.py: no such file; name a test file$"),
            (test, self.root / "none.whl", "none.whl: No such file or directory$"),
            (test, test, "test_pd.py: not a wheel$"),
            (test, of_x, ": a wheel of x, not of sglang$"),
            (other, wheel, without_pd),
        ):
            code, out, err = pdkit("contract", file, "--sglang-wheel", whl)
            self.assertEqual((code, out.strip(), err.count("\n")), (ExitCode.BAD_USAGE, "", 1))
            self.assertRegex(err, error)

    def test_no_sglang_at_all(self):
        with mock.patch.object(launches, "installed", side_effect=ReleaseNotFound("sglang is not installed")):
            self.assertEqual(pdkit("contract", DSV4).returned, ExitCode.NOT_READY)


class TestMatrix(FolderCase):
    def test_releases_that_differ(self):
        self.enterContext(mock.patch.dict(os.environ, COLUMNS="120"))
        test = self.write("test_pd.py", source_of(LAUNCHES))
        flag = '        add("--cuda-graph-max-bs", type=int)'
        old = {"srt/server_args.py": SERVER_ARGS.replace("EXTRA_FLAG", flag)}
        write_wheel(self.root / "sglang-0.5.18.whl", old, "0.5.18")
        write_wheel(self.root / "sglang-0.5.100.whl", None, "0.5.100")
        arguments = ["contract", test, "--wheels", self.root, "--flags", "--cuda-graph-max-bs 128"]
        for more, versions in (([], ["0.5.18", "0.5.100"]), (["--newest"], ["0.5.100"])):
            run = pdkit(*arguments, "--json", *more)
            found = json.loads(run.out)
            self.assertEqual([release["release"] for release in found["releases"]], versions)
            self.assertEqual(found["releases"][-1]["errors"][0].split(": ")[2], "--cuda-graph-max-bs")
            self.assertFalse(len(versions) > 1 and found["releases"][0]["errors"])
            self.assertEqual(run.returned, ExitCode.BAD_USAGE)
            self.assertRegex(run.err, "^pdkit contract: error: sglang 0.5.100: TestPD: .*ambiguous")
        table = pdkit(*arguments, "--flags=--old-switch").out
        rows = [line.split() for line in table.splitlines()]
        for version, names in (("0.5.18", "14"), ("0.5.100", "15")):
            (row,) = (row for row in rows if row[:1] == [version])
            self.assertEqual(row[3:], [names, "yes", "no", "no", "--old-switch", "(deprecated)", "taken"], table)
        self.assertNotEqual(*(row[1] for row in rows if row[:1] in (["0.5.18"], ["0.5.100"])))
        only_newer = "disaggregation_fixture.terminate_and_kill_process_tree (from 0.5.100 on)"
        self.assertIn(f"  sglang.test.server_fixtures.{only_newer}\n", table)


class TestInstalledRelease(unittest.TestCase):
    def test_flag_that_was_renamed(self):
        env = {"SGLANG_DSV4_FP4_EXPERT": "0"}
        flag, variable = launches.ask(installed(), DSV4, ["--cuda-graph-max-bs", "128"], env).errors
        self.assertRegex(flag, "--cuda-graph-max-bs: ambiguous, could match --cuda-graph-max-bs-decode, ")
        self.assertRegex(variable, "SGLANG_DSV4_FP4_EXPERT: no such variable.* nearest: SGLANG_DSV4_FP4_EXPERTS, ")

    def test_main_job_is_taken_and_stand_ins_change_no_answer(self):
        def run(command, capture_output, text, **options):
            return forked.run(command, **options)  # from a process that may have imported what it needs

        quick = launches.ask(installed(), DSV4)
        of_fork_server = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
        with mock.patch.object(launches, "subprocess", of_fork_server):
            real = launches.ask(installed(), DSV4, real_imports=True)
        (test,) = quick.tests
        self.assertEqual([process.name for process in test.processes], ["prefill", "decode", "load balancer"])
        self.assertTrue(all(process.checked for process in test.processes))
        self.assertEqual(quick.errors, [])
        self.assertGreater(len(real.flags), 400)
        self.assertEqual(dict(quick.flags), dict(real.flags))
        self.assertEqual(dataclasses.replace(quick, assumed={}), dataclasses.replace(real, assumed={}))


if __name__ == "__main__":
    unittest.main()
