"""Each family of faults that is about a kind is caught by the check of that kind, in words that name it; see `pdkit.faults.kinds`.

And a pair without a fault passes them all, over thousands of requests.
"""

import tempfile
import unittest
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pdkit
from pdkit.core import events
from pdkit.core.ci_register import register_cpu_ci
from pdkit.faults.kinds import FAMILIES, families
from pdkit.faults.library import LIBRARY
from pdkit.faults.matrix.session import Session, Subject

register_cpu_ci(est_time=1800, suite="stage-a-test-cpu", nightly=True)

SUBJECTS = Path(pdkit.__file__).parent / "faults" / "matrix" / "subjects.py"


class TestDisaggregationDSV4Kinds(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.session = cls.enterClassContext(cls.servers())
        cls.rows = []
        cls.addClassCleanup(events.table, "faults by kind", ["fault", "met", "caught by", "seconds"], cls.rows)

    @classmethod
    @contextmanager
    def servers(cls):
        with tempfile.TemporaryDirectory() as directory:
            with Session([Subject("kinds", SUBJECTS, "Kinds", by_request=True)], Path(directory, "logs")) as session:
                yield session

    def run_under(self, fault, session=None):
        run = (session or self.session).run(fault)
        messages = [each.message for each in run.verdicts.values() if each.caught]
        self.rows.append([fault or "no fault", run.met, ", ".join(run.caught_by), f"{run.seconds:.0f}"])
        print(*self.rows[-1], *messages[:2], sep=" | ", flush=True)
        return run, messages

    def test_no_fault(self):
        self.assertEqual(self.run_under(None)[1], [])

    def test_each_family_has_its_test_here_and_those_that_it_asks_for(self):
        own = {name.removeprefix("test_") for name in dir(self) if name.startswith("test_")}
        self.assertLessEqual(FAMILIES.keys(), own)
        asked = {test for _, tests in FAMILIES.values() for test in tests}
        self.assertLessEqual(asked, set(self.session.tests["kinds"]), "tests that no subject has")

    def assert_caught(self, family, fresh=False):
        """fresh: each fault meets servers of its own."""
        for fault in families(family):
            with self.subTest(fault.name), self.servers() if fresh else nullcontext() as session:
                run, messages = self.run_under(fault.name, session)
                self.assertGreater(run.met, 0, "it met no request")
                self.assertIsNotNone(run.headline, f"expected {LIBRARY[fault.name].says!r}, got {messages}")

    def test_age(self):
        self.assert_caught("age")

    def test_silence(self):
        self.assert_caught("silence")

    def test_memory(self):
        """What earlier requests left free in a server's heap hides what is kept until it is filled."""
        self.assert_caught("memory", fresh=True)

    def test_length(self):
        self.assert_caught("length")

    def test_answers(self):
        self.assert_caught("answers")

    def test_seam(self):
        self.assert_caught("seam")

    def test_streams(self):
        self.assert_caught("streams")

    def test_latency(self):
        self.assert_caught("latency")

    def test_load_balancer(self):
        self.assert_caught("load_balancer")

    def test_races(self):
        self.assert_caught("races")

    def test_aborts(self):
        self.assert_caught("aborts")

    def test_samples(self):
        self.assert_caught("samples")

    def test_crossed_parameters(self):
        self.assert_caught("crossed_parameters")

    def test_work(self):
        self.assert_caught("work")


if __name__ == "__main__":
    unittest.main()
