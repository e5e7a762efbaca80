"""What is run by name: FILE, `-k NAME`, `--last-failed`, `--repeat N`."""

import json
import unittest

from cases import FolderCase
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import UsageError
from pdkit.core.registry import Collection, Registration
from pdkit.runner import narrow
from suite_trees import SUITE, CommandCase, source_of, write_tree

register_cpu_ci(est_time=9, suite="stage-a-test-cpu")

TWO = source_of("def test_apple(self): pass\ndef test_pear(self): self.fail('a pear')")
FLAKY = source_of(
    """
    def test_it(self):
        from pathlib import Path
        seen = Path(__file__ + ".seen")
        seen.write_text(seen.read_text() + "x" if seen.exists() else "x")
        self.assertNotEqual(seen.read_text(), "xx")
    """
)
BOTH = 'register_cuda_ci(est_time=9, suite="g")\nregister_cpu_ci(est_time=5, suite="c")'


class TestNames(FolderCase):
    def setUp(self):
        super().setUp()
        files = {"unit/test_a.py": TWO, "far/test_a.py": TWO, "unit/test_b.py": source_of(registration=BOTH)}
        files["unit/broken.py"] = "a b"
        tree = write_tree(self.root, files)
        b = "unit/test_b.py"
        names = [("far/test_a.py", "cpu"), ("unit/test_a.py", "cpu"), (b, "cuda"), (b, "cpu")]
        found = [Registration(str(tree / name), f"registered/{name}", hw, "s", 1) for name, hw in names]
        self.collection = Collection(tuple(found), (), ("cpu", "cuda"))

    def names(self, *words):
        return [(each.name, each.hw) for each in narrow.named(self.collection, words)]

    def test_files_of_the_tree(self):
        far, near, both = (f"registered/{name}" for name in ("far/test_a.py", "unit/test_a.py", "unit/test_b.py"))
        path = str(self.root / near)
        for words, expected in (
            (["unit/test_a"], [near]),
            (["registered/unit/test_a.py"], [near]),
            (["test_a.py"], [far, near]),
            ([path, "test_a"], [near, far]),
            ([str(self.root / "registered" / "far")], [far]),
            (["test_b"], [both]),
        ):
            with self.subTest(words):
                self.assertEqual(self.names(*words), [(name, "cpu") for name in expected])

    def test_files_elsewhere(self):
        source = source_of(registration='register_cuda_ci(est_time=300, suite="base-c")')
        registered = self.write("elsewhere/test_x.py", source)
        plain = self.write("elsewhere/y.py", 'SOURCE = """\nregister_cpu_ci(est_time=1, suite="s")\n"""\n')
        x, y = narrow.named(self.collection, [str(registered), str(plain)])
        self.assertEqual(narrow.named(self.collection, [str(self.root / "elsewhere")]), [x])
        self.assertEqual((x.hw, x.suite, x.est_time, x.filename), ("cuda", "base-c", 300, str(registered)))
        self.assertEqual((y.hw, y.suite, y.filename), ("cpu", "", str(plain)))

    def test_what_nobody_knows(self):
        empty = self.root / "empty"
        empty.mkdir()
        for word, expected in (
            ("tset_a", "tset_a: neither a path nor the name of a registered file; nearest known: test_a"),
            ("t_a", "neither a path nor the name"),
            (str(empty), "no test file in this directory"),
        ):
            with self.subTest(word), self.assertRaisesRegex(UsageError, expected):
                self.names(word)

    def test_tests_by_name(self):
        a = self.collection.registrations[0]
        for pattern in ("apple", "T.test_p", "*pear"):
            self.assertTrue(narrow.has_test(a, pattern), pattern)
        for pattern in ("pear*", "Apple", "setUp"):
            self.assertFalse(narrow.has_test(a, pattern), pattern)
        self.assertTrue(narrow.is_file_named(a, "test_a"))
        self.assertFalse(narrow.is_file_named(a, "apple"))

    def test_inherited_tests_have_names_too(self):
        path = self.write("registered/unit/test_c.py", "from test_a import T\n\n\nclass TestC(T):\n    pass\n")
        self.assertTrue(narrow.has_test(Registration(str(path), "c", "cpu", "s", 1), "TestC.test_apple"))


class TestLastFailed(FolderCase):
    def test_what_failed_and_is_still_there(self):
        path = self.root / "state" / "last-failed.json"
        a, b = (str(self.write(name)) for name in "ab")
        narrow.keep(path, [a, b, str(self.root / "c")], [])
        self.assertEqual(narrow.last_failed(path), [a, b])
        narrow.keep(path, [b], [a, b])
        self.assertEqual(narrow.last_failed(path), [b])

    def test_where_nothing_is_known(self):
        path = self.root / "x.json"
        for given, expected in ((None, "nothing is kept"), (path, f"no run is kept in {path}")):
            with self.assertRaisesRegex(UsageError, f"^--last-failed: {expected}"):
                narrow.last_failed(given)
        path.write_text("{}")
        with self.assertRaisesRegex(UsageError, "cannot be read: not a list"):
            narrow.last_failed(path)


class TestCommand(CommandCase):
    FILES = {"test_a.py": TWO, "test_b.py": source_of(), "test_c.py": FLAKY}

    def run_these(self, *words):
        return self.run_suite(self.FILES, "--history", "history.jsonl", "--jobs", "1", *words)

    def test_a_name_and_a_file_elsewhere(self):
        self.write("test_elsewhere.py", source_of(registration=""))
        done = self.run_these("test_b", "test_elsewhere.py")
        self.assert_ended(done, 0, "2 passed, 0 failed, 0 skipped")
        self.assertRegex(done.stdout, "^2 files, estimated")
        self.assertFalse((self.root / "history.jsonl").exists())

    def test_tests_with_a_name(self):
        done = self.run_these("-k", "apple")
        self.assert_ended(done, 0, "1 passed, 0 failed, 0 skipped")
        self.assertIn("tests: 1 run, 0 skipped, 0 failed", done.stdout)
        self.assertEqual(self.run_these("-k", "pear").returncode, 1)
        done = self.run_these("-k", "test_b")
        self.assert_ended(done, 0, "1 passed, 0 failed, 0 skipped")

    def test_no_test_with_that_name(self):
        done = self.run_these("-k", "plum")
        self.assert_ended(done, 4, "0 passed, 0 failed, 0 skipped")
        self.assertIn("nothing ran: nothing in 3 files is called like 'plum' (-k)\n", done.stdout)

    def test_last_failed(self):
        self.assertIn("no run is kept in last-failed.json", self.run_these("--last-failed").stderr)
        self.assert_ended(self.run_these(*SUITE, "--continue-on-error"), 1, "2 passed, 1 failed, 0 skipped")
        done = self.run_these("--last-failed")
        self.assert_ended(done, 1, "0 passed, 1 failed, 0 skipped")
        self.assertIn("failed: registered/test_a.py", done.stdout)
        self.assertEqual(self.run_these("-k", "apple", "--last-failed").returncode, 0)
        kept = json.loads((self.root / "last-failed.json").read_text())
        self.assertEqual(kept, [f"{self.root}/registered/test_a.py"])
        (self.root / "registered" / "test_a.py").unlink()
        self.FILES = {}
        done = self.run_these("--last-failed")
        self.assertEqual(done.returncode, 4)
        self.assertIn("nothing ran: no file failed when it last ran", done.stdout)

    def test_repeat(self):
        done = self.run_these("--repeat", "3", "--continue-on-error", "test_c", "test_b")
        self.assert_ended(done, 1, "5 passed, 1 failed, 0 skipped")
        shares = "\nregistered/test_c.py: 2 of 3 runs passed\nregistered/test_b.py: 3 of 3 runs passed\n"
        self.assertIn(shares, done.stdout)
        self.assertRegex(done.stdout, r"\n\[3/6\] failed: registered/test_c.py; ")


if __name__ == "__main__":
    unittest.main()
