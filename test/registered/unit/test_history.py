"""The history of runs: records survive each other and broken lines, patches apply."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import unittest
import unittest.mock
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cases import FolderCase, pdkit
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode, UsageError
from pdkit.core.registry import Registration, collect
from pdkit.runner.history import est_time, store
from pdkit.runner.history.record import FileRecord, Measurement, Record
from suite_trees import SUITE as WORDS
from suite_trees import run_tree, source_of, write_tree

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

MAIN_JOB = "test/registered/distributed/test_disaggregation_dsv4_embedded.py"
SUITE = "stage-a-test-cpu"

MEASURES = source_of(
    """
    def test_it(self):
        from pdkit.core import events

        events.emit("phase", name="launch prefill", state="passed", seconds=2.5)
        events.measurement("acceptance length", 1.8312)
        events.score("gsm8k", 0.985, 200, gate=0.95, target="embedded", engine="pdkit.engine")
    """
)


def record(number=0, correct=197, seconds=(100.0,), gsm8k=11.0, accepted=None, **changes):
    """Run `number` of one a day; `seconds` of each file, the first of which is the main job's."""
    names = [MAIN_JOB, *(f"test/registered/unit/test_{i}.py" for i in range(1, len(seconds)))]
    files = tuple(FileRecord(name, "cpu", SUITE, "passed", s, 90, 1) for name, s in zip(names, seconds))
    phases = {"launch prefill": 20.0 + number % 3, "gsm8k": gsm8k}
    measured = Measurement(MAIN_JOB, "embedded", "pdkit.engine", correct, 200, ">0.95", 600.0, accepted, phases)
    began = datetime(2026, 10, 1, 3, tzinfo=timezone.utc) + timedelta(days=number)
    values = {
        **{"version": 1, "time": began, "commit": f"{number:040x}", "modified": False, "sglang": "0.5.23"},
        **{"python": "3.11", "host": "ci", "cpus": 2, "hw": "cpu", "suite": SUITE, "seconds": sum(seconds)},
        **{"exit_code": 0, "files": files, "measurements": (measured,)},
    }
    return Record(**{**values, **changes})


class HistoryCase(FolderCase):
    def setUp(self):
        super().setUp()
        self.file = self.root / "history.jsonl"

    def add(self, *records):
        for each in records:
            store.append(self.file, each)

    def history(self, *words):
        shown = pdkit("history", *words)
        self.assertEqual(shown.returned, ExitCode.PASSED)
        return shown

    def shown(self, *words):
        return {series["name"]: series for series in json.loads(self.history(self.file, "--json", *words).out)}


class TestStore(HistoryCase):
    def test_a_record_comes_back_as_it_was(self):
        self.add(record(1, accepted=1.5), record(0))
        self.assertEqual(store.read([self.file]).records, (record(0), record(1, accepted=1.5)))

    def test_a_record_that_calls_the_target_by_its_older_name(self):
        self.file.write_text(record(0).to_json().replace('"target": ', '"rung": ') + "\n")
        self.assertEqual(store.read([self.file]), store.History((record(0),), ()))

    def test_writers_do_not_break_each_other(self):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda n: self.add(*map(record, range(n, n + 20))), (0, 20, 40)))
        history = store.read([self.file])
        self.assertEqual((len(history.records), history.skipped), (60, ()))

    def test_a_torn_line_costs_itself_only(self):
        self.add(record(0))
        whole = self.file.read_bytes()
        self.file.write_bytes(whole + whole[:300])
        self.add(record(1))
        history = store.read([self.file])
        self.assertEqual(history.records, (record(0), record(1)))
        self.assertEqual(len(history.skipped), 1)
        self.assertIn(f"{self.file}:2: skipped, no record: Invalid JSON", history.skipped[0])

    def test_nothing_is_left_of_a_line_that_does_not_fit(self):
        self.add(record(0))
        before = self.file.read_bytes()
        limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        limited += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 100},) * 2)\n"
        limited += "from pathlib import Path; from pdkit.runner.history import store\n"
        limited += "store.append(Path(sys.argv[1]), store.read([Path(sys.argv[1])]).records[0])"
        done = subprocess.run([sys.executable, "-c", limited, str(self.file)], capture_output=True, text=True)
        self.assertIn("File too large", done.stderr)
        self.assertEqual(self.file.read_bytes(), before)

    def test_each_line_that_is_no_record_is_told(self):
        self.add(record(0))
        good = json.loads(self.file.read_text())
        broken = {
            "not json": "Invalid JSON",
            "[]": "object",
            json.dumps({**good, "version": 2}): "a record of version 2, not 1",
            json.dumps({**good, "seconds": float("nan")}): "finite number",
            json.dumps({key: value for key, value in good.items() if key != "files"}): "files: Field required",
            json.dumps({**good, "time": "yesterday"}): "time: ",
            "\udcff\udcfe": "Invalid JSON",
        }
        with self.file.open("a", errors="surrogateescape") as file:
            file.writelines(f"{line}\n" for line in broken)
        history = store.read([self.file])
        self.assertEqual(len(history.records), 1)
        for number, (line, reason) in enumerate(zip(history.skipped, broken.values(), strict=True), start=2):
            self.assertTrue(line.startswith(f"{self.file}:{number}: skipped, "), line)
            self.assertIn(reason, line)


class TestEstTime(HistoryCase):
    FORMS = {
        "keyword": 'register_cpu_ci(est_time=90, suite="stage-a-test-cpu")',
        "positional": 'register_cpu_ci(90, "stage-a-test-cpu")',
        "float": 'register_cpu_ci(suite="stage-a-test-cpu", est_time=90.5)  # est_time=90',
        "lines": 'register_cpu_ci(\n    suite="stage-a-test-cpu",\n    est_time=90,  # é: 90\n)',
        "two": 'register_cuda_ci(est_time=90, suite="s-1-gpu-large")\nregister_cpu_ci(est_time=90, suite="stage-a-test-cpu")',
        "pair": 'register_cpu_ci(est_time=90, stage="stage-a", runner_config="cpu")',
        "é": 'X = "é"; register_cpu_ci(est_time=90, suite="stage-a-test-cpu")',
    }

    def tree(self, ends=("\n", "\r\n", "")):
        files = {}
        for (name, registration), end in zip(self.FORMS.items(), itertools.cycle(ends)):
            source = source_of(registration=registration)
            source = source.replace("\n", "\r\n") if end == "\r\n" else source
            files[f"test_{name}.py"] = source if end else source.rstrip("\n")
        (self.root / "test").mkdir()
        root = write_tree(self.root / "test", {})
        for name, source in files.items():
            (root / name).write_bytes(source.encode())
        return root, files

    def test_the_patch_applies_and_changes_the_literal_only(self):
        root, files = self.tree()
        subprocess.run(["git", "init", "-q", str(self.root)], check=True)
        passed = [FileRecord(f"test/registered/{name}", "cpu", SUITE, "passed", 41.0, 90, 1) for name in files]
        self.add(*(record(n, files=tuple(passed)) for n in range(5)))
        done = self.history(self.file, "--est-time", "--test-root", root)
        self.assertEqual(done.err.count(" -> 45, p90 of 5 runs is 41.0 s"), len(files), done.err)
        subprocess.run(["git", "-C", str(self.root), "apply", "-"], input=done.out, text=True, check=True)
        for name, source in files.items():
            was = {"float": "est_time=90.5", "positional": "(90,"}.get(name[5:-3], "est_time=90")
            new = {"float": "est_time=45.0", "positional": "(45,"}.get(name[5:-3], "est_time=45")
            place = source.rindex(was) if "two" in name else source.index(was)
            expected = source[:place] + new + source[place + len(was) :]
            self.assertEqual((root / name).read_bytes().decode(), expected)
        times = {(r.name, r.hw): r.est_time for r in collect(root).registrations}
        self.assertEqual({hw: times[name, hw] for name, hw in times if "two" in name}, {"cpu": 45, "cuda": 90})

    def test_a_file_that_is_also_nightly_in_its_suite(self):
        night = 'register_cpu_ci(est_time={}, suite="stage-a-test-cpu", nightly=True)'
        day = night.replace(", nightly=True", "")
        source = source_of(registration=f"{day.format(90)}\n{night.format(70)}")
        both = (Registration("test_x.py", "test_x.py", "cpu", SUITE, 90, nightly) for nightly in (False, True))
        proposals = [est_time.Proposal(each, seconds, seconds, 5) for each, seconds in zip(both, (40, 50))]
        expected = source_of(registration=f"{day.format(40)}\n{night.format(50)}")
        self.assertEqual(est_time.rewrite(source.encode(), proposals).decode(), expected)
        twice = source_of(registration=f"{day.format(90)}\n{day.format(90)}")
        with self.assertRaisesRegex(UsageError, "test_x.py registers 2 times for stage-a-test-cpu"):
            est_time.rewrite(twice.encode(), proposals[:1])

    def test_what_is_proposed(self):
        registration = Registration("/r/test/registered/test_x.py", "registered/test_x.py", "cpu", SUITE, 90)
        key = ("test/registered/test_x.py", "cpu", SUITE)
        for seconds, expected in (
            ([40.0] * 4, []),
            ([40.0] * 9 + [500.0], [40]),
            ([40.0] * 8 + [500.0] * 2, [500]),
            ([88.0] * 5, []),
            ([84.0] * 5, []),
            ([3.2] * 5, [4]),
            ([0.01] * 5, [1]),
            ([1234.0] * 5, [1250]),
        ):
            with self.subTest(seconds=seconds):
                proposals = est_time.propose([registration], {key: seconds}, "test")
                self.assertEqual([proposal.seconds for proposal in proposals], expected)
        self.assertEqual(est_time.propose([registration], {(key[0], "cuda", SUITE): [40.0] * 5}, "test"), [])

    def test_failed_and_retried_runs_tell_no_time(self):
        slow = FileRecord(MAIN_JOB, "cpu", SUITE, "timed out", 1200.0, 90, 1)
        again = FileRecord(MAIN_JOB, "cpu", SUITE, "passed", 500.0, 90, 2)
        self.add(record(0), record(1, files=(slow,)), record(2, files=(again,)))
        done = self.history(self.file, "--estimates")
        self.assertEqual(json.loads(done.out), {MAIN_JOB: 100.0})


class TestPartition(HistoryCase):
    def test_estimates_of_the_history_even_out_the_partitions(self):
        tree = {f"test_{name}.py": source_of() for name in "abcd"}
        prefix = f"{self.root.name}/registered/test_"
        seconds = {"a": 100.0, "b": 10.0, "c": 20.0}
        files = tuple(FileRecord(f"{prefix}{name}.py", "cpu", SUITE, "passed", s, 5, 1) for name, s in seconds.items())
        self.add(record(0, files=files))
        estimates = self.root / "estimates.json"
        estimates.write_text(self.history(self.file, "--estimates").out)
        listed = {}
        for rank in "01":
            words = [*WORDS, "--partition-model-file", str(estimates), "--auto-partition-size", "2", "--no-history"]
            done = run_tree(self.root, tree, *words, "--auto-partition-id", rank)
            self.assertEqual(done.returncode, 0, done.stdout)
            self.assertIn(f"times of 3 of 4 files from {estimates}, est_time of the others\n", done.stdout)
            listed[rank] = sorted(name for name in "abcd" if f"passed: registered/test_{name}.py" in done.stdout)
        self.assertEqual(listed, {"0": ["a"], "1": ["b", "c", "d"]})


class TestRuns(HistoryCase):
    def run_suite(self, files, *words, **environment):
        files = {f"test_{number}.py": source for number, source in enumerate(files)}
        environment = {**os.environ, "XDG_STATE_HOME": str(self.root / "state"), **environment}
        return run_tree(self.root, files, *WORDS, *words, environment=environment)

    def test_a_run_is_recorded_with_what_it_measured(self):
        subprocess.run(["git", "init", "-q", str(self.root)], check=True)
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", str(self.root), *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
        fail = source_of("def test_it(self): self.fail()")
        done = self.run_suite([MEASURES, fail, source_of()], "--history", str(self.file))
        self.assertEqual(done.returncode, 1, done.stdout)
        ((run,), skipped) = store.read([self.file]).records, store.read([self.file]).skipped
        self.assertEqual((skipped, run.exit_code, run.suite, len(run.commit), run.modified), ((), 1, SUITE, 40, False))
        self.assertEqual([file.state for file in run.files], ["passed", "failed"])
        self.assertEqual(run.files[0].file, f"{self.root.name}/registered/test_0.py")
        self.assertGreater(run.files[0].seconds, 0)
        self.assertLess(abs(datetime.now(timezone.utc) - run.time), timedelta(minutes=2))
        (measured,) = run.measurements
        self.assertEqual((measured.correct, measured.examples, measured.gate), (197, 200, ">0.95"))
        self.assertEqual((measured.acceptance_length, measured.phases), (1.8312, {"launch prefill": 2.5}))
        self.addCleanup(shutil.rmtree, run.logs)
        self.assertTrue(list(Path(run.logs).glob("*test_1*.log")), "what failed is not where the record says")

    def test_the_variable_names_the_file_and_empty_means_none(self):
        self.run_suite([source_of()], PDKIT_HISTORY="")
        self.run_suite([source_of()], "--no-history", PDKIT_HISTORY=str(self.file))
        self.assertFalse(self.file.exists())
        self.run_suite([source_of()], PDKIT_HISTORY=str(self.file))
        self.assertEqual([each.logs for each in store.read([self.file]).records], [None], "it passed")

    def test_runs_within_tests_and_of_other_trees_leave_no_trace(self):
        inner = source_of(
            """
            def test_it(self):
                import os
                self.assertEqual(os.environ["PDKIT_HISTORY"], "")
            """
        )
        self.assertEqual(self.run_suite([inner], PDKIT_HISTORY=str(self.file)).returncode, 0)
        environment = {name: value for name, value in os.environ.items() if name != "PDKIT_HISTORY"}
        with unittest.mock.patch.dict("os.environ", environment, clear=True):
            self.run_suite([source_of()])
        self.assertFalse((self.root / "state").exists())

    def test_a_history_that_cannot_be_written_is_told_and_changes_nothing_else(self):
        done = self.run_suite([source_of()], "--history", "/proc/version")
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout, r"cannot be kept: /proc/version: .*\(--history FILE, or --no-history\)")


class TestScript(HistoryCase):
    def test_series(self):
        noise = random.Random(0)
        for number in range(30):
            correct = 197 if number < 24 else 185
            self.add(record(number, correct, gsm8k=round(11 + noise.random(), 1), accepted=1.8 + noise.random() / 10))
        shown = self.shown()
        self.assertEqual(set(shown), {"score", "acceptance length", "launch prefill", "gsm8k", "in all"})
        self.assertEqual(shown["score"]["times"][24], record(24).time.isoformat())
        self.assertEqual(shown["score"]["counts"][-1], [185, 200])
        text = self.history(self.file).out
        self.assertRegex(text, r"score .*█.*▁ +0\.925 +0\.985 +0\.925")
        self.assertIn("185/200 embedded", text)

    def test_a_failed_run_counts_for_the_score_but_not_for_the_times(self):
        failed = FileRecord(MAIN_JOB, "cpu", SUITE, "failed", 900.0, 90, 1)
        self.add(record(0), record(1, correct=150, gsm8k=500.0, files=(failed,)))
        shown = self.shown()
        self.assertEqual(shown["score"]["values"], [0.985, 0.75])
        self.assertEqual((shown["gsm8k"]["values"], shown["in all"]["values"]), ([11.0], [100.0]))

    def test_a_failed_run_names_its_files_and_where_its_report_is(self):
        bad = FileRecord("test/registered/unit/test_gate.py", "cpu", SUITE, "failed", 3, 3, 1)
        good = record(0)
        for kept, way in (
            ({"report_dir": "/reports/1", "logs": "/reports/1"}, "pdkit report /reports/1 --issue"),
            ({"logs": "/tmp/pdkit-logs-1"}, "logs: /tmp/pdkit-logs-1"),
            ({}, "no report: give --report-dir"),
        ):
            self.file.unlink(missing_ok=True)
            self.add(good, record(1, files=(*good.files, bad), exit_code=1, **kept))
            self.assertIn(f"2026-10-02 03:00 failed: test_gate; {way}", self.history(self.file).out)
            self.assertNotIn("2026-10-01 03:00 failed", self.history(self.file).out)

    def test_figures(self):
        self.add(*(record(number, 200 - number % 4, accepted=1.8) for number in range(3)))
        for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
            figure = self.root / f"history{suffix}"
            self.history(self.file, "--out", figure)
            self.assertEqual(figure.read_bytes()[: len(magic)], magic)
        text = figure.read_text()
        for title in ("embedded: score", "embedded: phases", "embedded: acceptance length"):
            self.assertIn(f"<!-- {title} -->", text)

    def test_broken_lines_are_told_and_skipped(self):
        self.add(record(0))
        with self.file.open("a") as file:
            file.write("{\n")
        self.assertIn(f"{self.file}:2: skipped, no record", self.history(self.file).err)


if __name__ == "__main__":
    unittest.main()
