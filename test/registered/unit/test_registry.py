"""Collecting registrations by SGLang's rules, and selecting among them."""

import ast
import json
import unittest
from enum import Enum
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from unittest.mock import patch

from cases import FolderCase
from pdkit.core import ci_register, paths, registration, top_level
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import UsageError
from pdkit.core.registry import Registration, collect, syntax_errors
from pdkit.core.suggest import nearest
from pdkit.runner.options import Options
from pdkit.runner.select import select, with_estimates
from suite_trees import CPU, IMPORTS, MAIN, source_of, write_tree

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")


def fresh_rules():
    spec = spec_from_file_location("fresh_ci_register", ci_register.locate())
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TreeCase(FolderCase):
    def collect(self, files, rules=None):
        return collect(write_tree(self.root, files), rules)


class TestCollect(TreeCase):
    def test_a_registration(self):
        collection = self.collect({"unit/test_a.py": source_of()})
        self.assertEqual(collection.errors, ())
        (found,) = collection.registrations
        self.assertEqual(found.filename, str(self.root / "registered/unit/test_a.py"))
        self.assertEqual((found.name, found.hw), ("registered/unit/test_a.py", "cpu"))
        self.assertEqual((found.suite, found.est_time), ("stage-a-test-cpu", 5.0))
        self.assertEqual((found.nightly, found.disabled), (False, None))

    def test_stage_and_runner_config_make_a_suite(self):
        registration = 'register_cuda_ci(est_time=250, stage="stage-c", runner_config="dsv4-8-gpu-h200")'
        (found,) = self.collect({"test_a.py": source_of(registration=registration)}).registrations
        self.assertEqual((found.hw, found.suite), ("cuda", "stage-c-test-dsv4-8-gpu-h200"))

    def test_several_registrations_of_one_file(self):
        lines = f'{CPU}\nregister_cuda_ci(9, "nightly-x", nightly=True, disabled="see #123 (flaky)")'
        cpu, cuda = self.collect({"test_a.py": source_of(registration=lines)}).registrations
        self.assertTrue(cpu.is_enabled and not cpu.nightly)
        self.assertEqual((cuda.nightly, cuda.disabled, cuda.is_enabled), (True, "see #123 (flaky)", False))

    def test_which_files_are_read(self):
        files = {
            "test_a.py": source_of(),
            "bench_b.py": source_of(),
            "helper.py": "def f(): pass\n",
            "templates.py": f'T = """\n{CPU}\n"""\n',
            "notes.txt": CPU,
            "__pycache__/test_c.py": source_of(),
        }
        collection = self.collect(files)
        self.assertEqual(collection.errors, ())
        self.assertEqual([r.name for r in collection.registrations], ["registered/bench_b.py", "registered/test_a.py"])

    def collected(self, rules):
        """What is collected by SGLang's `rules` or ours; they stay as they are."""
        kept = dict(vars(rules))
        try:
            return collect(self.root / "registered", rules)
        finally:
            vars(rules).update(kept)

    def test_what_is_right_and_which_rule_each_mistake_breaks(self):
        """Read alike with and without an installed SGLang; each error names the file and the rule."""
        calls = {
            'register_cpu_ci(5, "s")': None,
            'register_cuda_ci(est_time=5.5, suite="s", nightly=True, disabled="why")': None,
            'register_cuda_ci(5, stage="base-c", runner_config="8-gpu-h200")': None,
            'register_amd_ci(5, suite="")': None,
            'register_cpu_ci(suite="s")': "est_time is a required constant",
            'register_cpu_ci(est_time=N, suite="s")': "est_time is a required constant",
            'register_cpu_ci(est_time=2 * 5, suite="s")': "est_time is a required constant",
            'register_cpu_ci(est_time="5", suite="s")': "est_time must be a number",
            "register_cpu_ci(est_time=5)": "got stage=False, runner_config=False, suite=False",
            'register_cpu_ci(5, "s", stage="a", runner_config="b")': "got stage=True, runner_config=True, suite=True",
            'register_cpu_ci(5, stage="a")': "got stage=True, runner_config=False, suite=False",
            "register_cpu_ci(5, suite=7)": "suite must be a string",
            "register_cpu_ci(5, suite=None)": "names no suite",
            'register_cpu_ci(5, "s", nightly=1)': "nightly must be a boolean",
            'register_cpu_ci(5, "s", disabled=1)': "disabled must be a string",
            'register_cpu_ci(*[5, "s"])': "starred arguments",
            'register_cpu_ci(**{"est_time": 5, "suite": "s"})': "**kwargs",
            'register_cpu_ci(5, suit="s")': "unknown argument 'suit'",
            'register_cpu_ci(5, "s", suite="t")': "duplicated argument 'suite'",
            'register_cpu_ci(5, "s", False, None, 1)': "too many positional",
            'if True:\n    register_cpu_ci(5, "s")': "No CI registry found",
            'register_tpu_ci(5, "s")': "No CI registry found",
            "": "No CI registry found",
        }
        for call, rule in calls.items():
            for main in (MAIN, "", '\nif __name__ == "__main__":\n    pass\n'):
                with self.subTest(call, main=main):
                    write_tree(self.root, {"test_x.py": f"import unittest\n{call}\n{main}"})
                    ours, theirs = (self.collected(rules) for rules in (registration, ci_register.load()))
                    self.assertEqual(ours.registrations, theirs.registrations)
                    errors = [not (rule is None and (main == MAIN or "disabled" in call))]
                    self.assertEqual([bool(each.errors) for each in (ours, theirs)], errors * 2)
                    self.assertNotEqual([bool(ours.registrations)], errors)
                    for line in theirs.errors:
                        is_about_main = rule is None or (rule not in line and main != MAIN)
                        self.assertIn("missing `if __name__" if is_about_main else rule, line)
                        self.assertRegex(line, r"^.*/registered/test_x\.py.*\Z")

    def test_errors_are_of_their_files_alone(self):
        broken = f"{IMPORTS}{CPU}\ndef broken(:\n{MAIN}"
        collection = self.collect({"test_a.py": source_of(main=""), "test_b.py": broken, "test_good.py": source_of()})
        self.assertEqual([r.name for r in collection.registrations], ["registered/test_good.py"])
        for line, says in zip(collection.errors, ("test_a.py: missing `if", "not valid Python"), strict=True):
            self.assertIn(says, line)

    def test_the_tree_of_this_repository(self):
        (self.root / "registered").symlink_to(paths.registered_tests())
        ours, theirs = (self.collected(rules) for rules in (registration, ci_register.load()))
        self.assertGreater(len(theirs.registrations), 50)
        self.assertEqual(ours.registrations, theirs.registrations)

    def test_hardware_is_what_the_release_knows(self):
        old = fresh_rules()
        old.HWBackend = Enum("HWBackend", ["CPU", "CUDA"])
        self.assertEqual(self.collect({}, old).hardware, ("cpu", "cuda"))
        self.assertLess({"cpu", "cuda", "amd", "npu"}, {*self.collect({}).hardware, "any"})

    def test_syntax_errors_below_the_registration(self):
        write_tree(self.root, {"test_a.py": source_of("def test_it(self):\n    a b\n"), "test_b.py": source_of()})
        registrations = collect(self.root / "registered").registrations
        self.assertEqual(len(registrations), 2)
        (line,) = syntax_errors(registrations)
        self.assertRegex(line, r"test_a\.py:\d+: not valid Python")


class TestExcerpt(TreeCase):
    """Reading only the top level finds what SGLang finds in the whole file, or leaves the file to SGLang."""

    SOURCES = {
        "plain": source_of(),
        "in a docstring": f'"""\n{CPU}\n"""\n' + source_of(registration=""),
        "docstring and real": f'"""\n{CPU}\n"""\n' + source_of(),
        "in a string that has quotes": f"A = '''\n\"\"\"\n{CPU}\n'''\n" + source_of(),
        "commented out": source_of(registration="# " + CPU),
        "in brackets": source_of(registration=f"print(\n{CPU})"),
        "after a semicolon": source_of(registration="import os; " + CPU),
        "one more after a semicolon": source_of(registration=f'{CPU}\nimport os; register_cuda_ci(7, "b")'),
        "one more that is not literal": source_of(registration=f'{CPU}\nregister_cuda_ci(est_time=int(7), suite="b")'),
        "continued line": source_of(registration="A = \\\n" + CPU),
        "conditional": source_of(registration=f"{CPU} if 1 else 0"),
        "indented": source_of(registration="if True:\n    " + CPU),
        "several lines": source_of(registration='register_cpu_ci(\n    est_time=5,  # s\n    suite="a",\n)'),
        "parenthesis in a reason": source_of(registration='register_cpu_ci(5, "a", disabled="see (b")'),
        "nested call": source_of(registration='register_cpu_ci(est_time=int(5), suite="a")'),
        "implicit concatenation": source_of(registration='register_cpu_ci(5, "a" "b")'),
        "other quotes": source_of(registration="register_cpu_ci(5, 'a')", main="\nif __name__ == '__main__':\n  f()"),
        "main with else": source_of(main=MAIN + "else:\n    x = 1\n"),
        "main in a string": source_of(main=f'\nA = """{MAIN}"""\n'),
        "two mains": source_of(main='\nif __name__ == "__main__":\n    pass\n' + MAIN),
        "main reversed": source_of(main='\nif "__main__" == __name__:\n    f()\n'),
        "main and more": source_of(main='\nif __name__ == "__main__" and X:\n    f()\n'),
        "main with a long string": source_of(main='\nif __name__ == "__main__":\n    f("""\nx\n""")\n'),
        "main on one line": source_of(main='\nif __name__ == "__main__": f()\n'),
        "unclosed bracket": source_of("def test_it(self): (\n"),
        "unclosed string": source_of('def test_it(self): """\n'),
        "windows": source_of().replace("\n", "\r\n"),
        "attribute": source_of(registration='ci.register_cpu_ci(5, "a")'),
        "raw and formatted strings": source_of("def test_it(self): return r'\\d', f'{self}', b'#', '(', \"'\"\n"),
    }

    @staticmethod
    def outcome(parse, filename):
        try:
            registries, has_main = parse(filename)
        except (SyntaxError, ValueError) as error:
            return type(error).__name__
        return [(r.backend.name, r.effective_suite, r.est_time, r.nightly, r.disabled) for r in registries], has_main

    def test_equals_sglang(self):
        patched, original = fresh_rules(), fresh_rules()
        self.collect({}, patched)
        for name, source in self.SOURCES.items():
            with self.subTest(name):
                path = self.root / "test_it.py"
                path.write_bytes(source.encode())
                expected = self.outcome(original.ut_parse_one_file, str(path))
                self.assertEqual(self.outcome(patched.ut_parse_one_file, str(path)), expected)

    def test_a_plain_file_is_not_parsed_as_a_whole(self):
        source = source_of("def test_it(self): pass\n" * 50).encode()
        self.assertEqual(len(top_level.parse(source, "f").body), 2)
        whole = ast.dump(ast.parse(source))
        self.assertLess(len(ast.dump(top_level.parse(source, "f"))), len(whole) / 10)
        body_is_broken = source.replace(b"pass", b"a b")
        self.assertEqual(len(top_level.parse(body_is_broken, "f").body), 2)


class TestSelect(TreeCase):
    FILES = {
        f"test_{letter}.py": source_of(registration=f'register_cpu_ci(est_time={est_time}, suite="stage-a-test-cpu")')
        for letter, est_time in zip("abcdef", (60, 50, 40, 30, 20, 10), strict=True)
    }
    NIGHTLY = source_of(registration='register_cuda_ci(est_time=7, suite="nightly-1-gpu", nightly=True)')
    DISABLED = source_of(registration='register_cpu_ci(est_time=7, suite="stage-a-test-cpu", disabled="broken")')

    def select(self, files=None, hw="cpu", suite="stage-a-test-cpu", **options):
        collection = self.collect(self.FILES if files is None else files)
        return select(collection, Options(test_root=self.root, hw=hw, suite=suite, **options))

    def names(self, selection):
        return [Path(r.filename).stem[-1] for r in selection.enabled]

    def test_by_hardware_and_suite(self):
        selection = self.select(self.FILES | {"test_n.py": self.NIGHTLY, "test_x.py": self.DISABLED})
        self.assertEqual(self.names(selection), list("abcdef"))
        self.assertEqual([r.disabled for r in selection.disabled], ["broken"])
        self.assertEqual(selection.est_time, 210)

    def test_nightly_only_when_asked(self):
        files = {"test_n.py": self.NIGHTLY}
        selection = self.select(files, "cuda", "nightly-1-gpu")
        self.assertEqual(selection.enabled, ())
        self.assertIn("add --nightly", selection.why_empty)
        self.assertEqual(self.names(self.select(files, "cuda", "nightly-1-gpu", nightly=True)), ["n"])
        self.assertIn("leave --nightly out", self.select(nightly=True).why_empty)

    def test_without_names_everything_is_selected(self):
        files = self.FILES | {"test_n.py": self.NIGHTLY}
        self.assertEqual(len(self.select(files, None, None, list_only=True).enabled), 7)
        self.assertEqual(self.names(self.select(files, None, None, list_only=True, nightly=True)), ["n"])

    def test_only_disabled_registrations(self):
        self.assertIn("all 1 registrations are disabled", self.select({"test_x.py": self.DISABLED}).why_empty)

    def test_suites_of_the_project_and_of_the_installed_release_are_known_without_a_file(self):
        for suite in ("stage-c-test-dsv4-8-gpu-h200", "base-c-test-deepep-8-gpu-h200"):
            selection = self.select({}, "cuda", suite)
            self.assertEqual((selection.enabled, selection.why_empty), ((), "no file is registered"))
        with self.assertRaisesRegex(UsageError, "not for hardware 'cpu' but for: cuda"):
            self.select({}, "cpu", "base-c-test-deepep-8-gpu-h200")
        with self.assertRaisesRegex(UsageError, "nearest known: base-c-test-deepep-8-gpu-h200"):
            self.select({}, "cuda", "base-c-test-deepep-8-gpu-h201")
        with patch.object(ci_register.load(), "register_cuda_ci", lambda est_time, suite: None):
            with self.assertRaisesRegex(UsageError, "unknown suite 'base-c-test-deepep-8-gpu-h200'"):
                self.select({}, "cuda", "base-c-test-deepep-8-gpu-h200")

    def test_a_file_in_a_suite_by_stage_and_runner_configuration(self):
        pair = 'register_cuda_ci(est_time=5, stage="base-c", runner_config="deepep-8-gpu-h200")'
        files = {"test_a.py": source_of(registration=pair)}
        self.assertEqual(self.names(self.select(files, "cuda", "base-c-test-deepep-8-gpu-h200")), ["a"])

    def test_files_of_sglang_that_name_no_suite(self):
        nameless = 'register_npu_ci(est_time=400, suite="", nightly=True)'
        imported = "from pdkit.core.ci_register import register_npu_ci\n"
        files = {"test_npu.py": source_of(registration=f"{imported}{nameless}"), "test_a.py": source_of()}
        self.assertEqual(self.names(self.select(files)), ["a"])
        collection = self.collect(files)
        self.assertEqual((collection.errors, collection.suites("npu")), ((), set()))
        errors = self.collect({"test_b.py": source_of(registration='register_cuda_ci(est_time=4, suite="")')}).errors
        self.assertEqual(len(errors), 1)

    def test_nearest(self):
        self.assertEqual(nearest("cpy", ["cuda", "cpu", "npu"], limit=1), ["cpu"])
        self.assertEqual(nearest("zzz", ["b", "a"]), ["a", "b"])

    def test_partitions_are_disjoint_complete_and_even(self):
        parts = [self.select(partition_id=rank, partition_size=3) for rank in range(3)]
        self.assertEqual(sorted(sum(map(self.names, parts), [])), list("abcdef"))
        self.assertEqual({part.est_time for part in parts}, {70})

    def test_an_empty_partition_says_why(self):
        selection = self.select(partition_id=7, partition_size=8)
        self.assertEqual(selection.why_empty, "partition 7 of 8 is empty: the suite has 6 files")

    def test_measured_times_replace_registered_ones(self):
        model = self.root / "model.json"
        plain = {"registered/test_f.py": 1000, "other/test_a.py": 3}
        timings = "noise\n" + "\n".join(json.dumps({"file": f, "elapsed": s}) for f, s in plain.items())
        of_sglang = {"est": {"stage-a-test-cpu": plain, "other": {"registered/test_a.py": 5000}}, "groups": []}
        for text in (json.dumps(plain), timings, json.dumps(of_sglang)):
            model.write_text(text)
            selection = self.select(partition_id=0, partition_size=2, partition_model_file=model)
            self.assertEqual((self.names(selection), selection.est_time), (["f"], 1000))

    def test_the_longest_matching_path_wins(self):
        registration = Registration("/a/b/test_x.py", "b/test_x.py", "cpu", "s", 5)
        times = self.root / "times.json"
        times.write_text(json.dumps({"test_x.py": 1, "b/test_x.py": 2}))
        (found,), _ = with_estimates([registration], times, "s")
        self.assertEqual(found.est_time, 2)

    def test_without_measured_times_the_registered_ones_stand(self):
        """As in SGLang's runner, which is given the file where its CI could fetch one."""
        model = self.root / "model.json"
        expected = self.select(partition_id=0, partition_size=2)

        def assert_falls_back(says, path=model):
            selection = self.select(partition_id=0, partition_size=2, partition_model_file=path)
            self.assertEqual((selection.enabled, selection.est_time), (expected.enabled, expected.est_time))
            self.assertRegex(selection.measured, f"^no times from {path}: {says}.*; est_time of all files$")

        wrong_values = ('{"a": "x"}', '{"a": -1}', '{"a": NaN}', '{"a": true}', '{"file": "a"}')
        for text in ("", "x", "[]", "{}", "[1]", *wrong_values):
            model.write_text(text)
            with self.subTest(text):
                assert_falls_back("expected ")
        model.write_text('{"est": {"other": {"a.py": 5}}}')
        assert_falls_back("it has no times for stage-a-test-cpu")
        model.write_bytes(b"\xff")
        assert_falls_back("not a text file")
        assert_falls_back("No such file", self.root / "absent")
        assert_falls_back("Is a directory", self.root)


if __name__ == "__main__":
    unittest.main()
