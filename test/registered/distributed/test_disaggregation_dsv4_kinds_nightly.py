"""Each family of faults that is about a kind is caught by the check of that kind, in words that name it; see `pdkit.faults.kinds`.

And a pair without a fault passes them all, over thousands of requests.
"""

import tempfile
import unittest
from pathlib import Path

import pdkit
from pdkit.core import events
from pdkit.core.ci_register import register_cpu_ci
from pdkit.faults import LIBRARY
from pdkit.faults.kinds import TESTS, families
from pdkit.faults.matrix.session import Session, Subject

register_cpu_ci(est_time=1200, suite="stage-a-test-cpu", nightly=True)

SUBJECTS = Path(pdkit.__file__).parent / "faults" / "matrix" / "subjects.py"


class TestDisaggregationDSV4Kinds(unittest.TestCase):
    def test_each_kind_is_caught_in_words_that_name_it(self):
        faults = [fault.name for fault in families()]
        rows, wrong = [], []
        with tempfile.TemporaryDirectory() as out:
            with Session([Subject("kinds", SUBJECTS, "Kinds", by_request=True)], Path(out, "logs")) as session:
                asked = {test for tests in TESTS.values() for test in tests}
                self.assertLessEqual(asked, set(session.tests["kinds"]), "tests that no subject has")
                for fault in (None, *faults):
                    run = session.run(fault)
                    messages = [each.message for each in run.verdicts.values() if each.caught]
                    rows.append([fault or "no fault", run.met, ", ".join(run.caught_by), f"{run.seconds:.0f}"])
                    print(*rows[-1], *messages[:2], sep=" | ", flush=True)
                    if fault is None:
                        wrong += [f"no fault: {message}" for message in messages]
                    elif not run.met:
                        wrong.append(f"{fault}: it met no request")
                    elif run.headline is None:
                        wrong.append(f"{fault}: expected {LIBRARY[fault].says!r}, got {messages}")
        events.table("faults by kind", ["fault", "met", "caught by", "seconds"], rows)
        self.assertFalse(wrong, "\n".join(wrong))


if __name__ == "__main__":
    unittest.main()
