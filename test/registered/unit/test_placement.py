"""On which GPUs servers are, as the driver tells, against the plan."""

import subprocess
import unittest
from types import SimpleNamespace
from unittest import mock

from pdkit.checks import placement
from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")


class TestPlacement(unittest.TestCase):
    def setUp(self):
        # Each server is a shell; what uses the GPU is its child.
        self.servers = [self.server() for _ in range(2)]
        self.gpus = []
        observe = lambda environ: {"gpus": tuple(self.gpus)}  # noqa: E731
        self.enterContext(mock.patch.object(placement, "observe", observe))

    def server(self):
        process = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
        child = int(process.stdout.readline())
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        self.addCleanup(subprocess.run, ["kill", str(child)])
        return process, child

    def check(self, prefill, decode):
        """What the test says where the children of the servers use these GPUs."""
        for (_, child), used in zip(self.servers, (prefill, decode)):
            for gpu in used:
                self.gpus[gpu].processes += (SimpleNamespace(pid=child),)

        class Case(AccountingChecks, placement.PlacementChecks, unittest.TestCase):
            lb_url = prefill_url = decode_url = None
            prefill_gpus, decode_gpus = range(0, 2), range(2, 4)
            process_prefill, process_decode = (process for process, _ in self.servers)

        with mock.patch("builtins.print"):
            result = Case("test_servers_are_on_the_gpus_of_the_plan").run()
        return "skipped" if result.skipped else "passed" if result.wasSuccessful() else "failed"

    def test_where_the_servers_are(self):
        for what, prefill, decode, verdict in (
            ("as planned", (0, 1), (2, 3), "passed"),
            ("decode beside prefill", (0, 1), (0, 1), "failed"),
            ("a rank is missing", (0, 1), (2,), "failed"),
            ("a driver that names none of ours", (), (), "skipped"),
        ):
            with self.subTest(what):
                self.gpus[:] = [SimpleNamespace(processes=()) for _ in range(4)]
                self.assertEqual(self.check(prefill, decode), verdict)


if __name__ == "__main__":
    unittest.main()
