"""The suite must see what goes wrong: a quick subset of the detection matrix, by its own command."""

import csv
import sys
import tempfile
import unittest
from pathlib import Path

from pdkit.core import forked
from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=45, suite="stage-a-test-cpu")

MATRIX = (sys.executable, "-m", "pdkit", "matrix")
SEEN_BY = {
    "128x-compressed-zeroed": "parity alone",
    "indexer-compressed-zeroed": "parity alone",
    "compressed-aliased": "parity shared prefix",
    "rooms-swapped": "parity rooms",
    "seed-lost": "parity request parameters",
    "transfer-fails-one-in-ten": "request accounting",
}


class TestDisaggregationDSV4Faults(unittest.TestCase):
    def test_quick_matrix(self):
        with tempfile.TemporaryDirectory() as out:
            run = forked.run([*MATRIX, "--quick", "--out", out], has_fork_server=True)
            print(run.stdout, run.stderr, flush=True)
            self.assertEqual(run.returncode, 0)
            with open(Path(out, "matrix.csv"), newline="") as file:
                caught = {(row["fault"], row["check"]) for row in csv.DictReader(file) if row["caught"] == "1"}

        self.assertEqual({fault for fault, _ in caught}, SEEN_BY.keys(), "the run without a fault caught nothing")
        self.assertLessEqual(SEEN_BY.items(), caught)


if __name__ == "__main__":
    unittest.main()
