import json
import os
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from pdkit.ci_register import register_cpu_ci
from pdkit.report.record import FILE, VARIABLE, record, record_table

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")


class TestRecord(unittest.TestCase):
    def setUp(self):
        self.directory = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(mock.patch.dict(os.environ, {VARIABLE: str(self.directory)}))

    def lines(self):
        return [json.loads(line) for line in (self.directory / FILE).read_text().splitlines()]

    def test_a_line_each(self):
        record("acceptance", lengths=[1.9, 1.8])
        record_table("recovery", ["event", "eval"], [("SIGKILL prefill", 3)], note="two rounds")
        acceptance, table = self.lines()
        self.assertEqual((acceptance["kind"], acceptance["lengths"]), ("acceptance", [1.9, 1.8]))
        self.assertEqual(
            (table["title"], table["rows"], table["note"]), ("recovery", [["SIGKILL prefill", 3]], "two rounds")
        )
        self.assertLessEqual(acceptance["ts"], table["ts"])

    def test_writers_do_not_cut_each_other(self):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: record("x", text="y" * 5000, i=i), range(64)))
        self.assertEqual({line["i"] for line in self.lines()}, set(range(64)))

    def test_without_a_report_nothing_is_written(self):
        with mock.patch.dict(os.environ, {VARIABLE: ""}):
            record("x")
        self.assertFalse((self.directory / FILE).exists())

    def test_a_table_that_is_none(self):
        with self.assertRaisesRegex(AssertionError, "recovery: a row has not the 2 cells"):
            record_table("recovery", ["event", "eval"], [["SIGKILL"]])


if __name__ == "__main__":
    unittest.main()
