"""What is recorded in test/data is still so: test/record.py says what that is, and records an intended change."""

import sys
import unittest
from pathlib import Path

from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")

TEST = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TEST))
import record  # noqa: E402


class TestRecords(unittest.TestCase):
    maxDiff = None

    def assert_as_recorded(self, name):
        difference = record.difference(name, record.RECORDS[name]())
        command = f"scripts/env.sh python3 test/record.py --update {name}"
        self.assertFalse(difference, f"{name} is not as recorded; if that is meant: {command}\n{difference}")

    def test_launch_contract(self):
        from pdkit.preflight.contract.release import installed

        if f"launch_contract-{installed().version}" != record.INSTALLED_CONTRACT:
            self.skipTest(f"sglang {installed().version} is installed, {record.INSTALLED_CONTRACT} is recorded")
        self.assert_as_recorded(record.INSTALLED_CONTRACT)

    def test_test_names(self):
        self.assert_as_recorded("test_names")

    def test_runner_output(self):
        self.assert_as_recorded("runner_output")

    def test_exit_codes(self):
        self.assert_as_recorded("exit_codes")

    def test_detection_matrix(self):
        self.assert_as_recorded("detection_matrix")

    def test_every_record_is_compared(self):
        others = {path.stem for path in record.DATA.glob("*.json")} - set(record.RECORDS)
        self.assertEqual(others, {"launch_contract-0.5.17"}, "compared by the workflow `contract` alone")


class TestNormalising(unittest.TestCase):
    def test_ports(self):
        ports = record.PortNames()
        self.assertEqual(ports.in_text("--port 24631 --nccl-port 21300 --at 127.0.0.1:24635"),
                         "--port <port 1> --nccl-port 21300 --at 127.0.0.1:<port 2>")  # fmt: skip
        self.assertEqual(ports.in_text("http://127.0.0.1:24631"), "http://127.0.0.1:<port 1>")
        self.assertEqual(ports.derived(24637), "<port 2> + 2")
        self.assertEqual(ports.derived(21334), "21334")
        self.assertEqual(ports.in_text("0.25613 1256311"), "0.25613 1256311")

    def test_flags_and_their_values(self):
        lines = record.flag_lines(["word", "--a", "1", "-2", "--b", "--c", "{ }"])
        self.assertEqual(lines, ["word", "--a 1 -2", "--b", "--c '{ }'"])


if __name__ == "__main__":
    unittest.main()
