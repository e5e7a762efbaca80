"""Waiting for GPU memory: what is compared, for how long, and who is named."""

import unittest
from dataclasses import replace
from unittest import mock

from pdkit.core import processes as process_tree
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.gpus import Gpu, GpuProcess
from pdkit.runner import gpu_memory

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

IDLE = Gpu("NVIDIA H200", memory_mib=143_000, free_mib=143_000, capability=(9, 0))
STRANGER = GpuProcess(7, "/usr/bin/train", 20_000)
OURS = GpuProcess(8, "/usr/bin/python3", 100_000)
CONTAINED = GpuProcess(9, "a process outside this container", 30_000)


def holding(*processes):
    return replace(IDLE, free_mib=IDLE.free_mib - sum(p.memory_mib for p in processes), processes=processes)


class TestWaitForRelease(unittest.TestCase):
    def setUp(self):
        self.living = {STRANGER.pid, OURS.pid}
        self.enterContext(mock.patch.object(process_tree, "is_pid_alive", self.living.__contains__))
        self.sleep = self.enterContext(mock.patch.object(gpu_memory.time, "sleep"))

    def wait(self, before, *observed, seconds=60.0):
        """What is told after our process has ended."""
        before = gpu_memory.unaccounted(lambda: before)
        self.living.discard(OURS.pid)
        return gpu_memory.wait_for_release(before, seconds, mock.Mock(side_effect=observed))

    def test_no_gpu(self):
        self.assertEqual(self.wait(()), [])

    def test_until_it_is_free(self):
        self.assertEqual(self.wait((IDLE,), (holding(OURS),), (holding(OURS),), (IDLE,)), [])
        self.assertEqual(self.sleep.call_count, 2)

    def test_what_is_about_to_be_ended_is_waited_for(self):
        self.assertEqual(self.wait((holding(STRANGER, OURS),), (holding(STRANGER, OURS),), (holding(STRANGER),)), [])
        self.assertEqual(self.sleep.call_count, 1)

    def test_what_others_hold_is_not_waited_for(self):
        for before in (IDLE, holding(STRANGER), holding(replace(STRANGER, memory_mib=1000))):
            self.assertEqual(self.wait((IDLE, before), (IDLE, holding(STRANGER))), [])
        self.assertEqual(self.wait((holding(CONTAINED),), (holding(CONTAINED),)), [])

    def test_a_stranger_that_ends_hides_nothing(self):
        (line,) = self.wait((holding(STRANGER),), (holding(OURS),), seconds=0)
        self.assertIn("100000 MiB more in use than before, by pid 8", line)

    def test_some_context_more_is_no_matter(self):
        self.assertEqual(self.wait((IDLE,), (replace(IDLE, free_mib=IDLE.free_mib - gpu_memory.SLACK_MIB),)), [])
        more = replace(IDLE, free_mib=IDLE.free_mib - gpu_memory.SLACK_MIB - 1)
        (line,) = self.wait((IDLE,), (more,), seconds=0)
        self.assertEqual(line, "GPU 0: 513 MiB more in use than before, by no process that the driver names")

    def test_who_holds_it_is_named(self):
        (line,) = self.wait((IDLE, holding(STRANGER)), (IDLE, holding(STRANGER, OURS)), seconds=0)
        self.assertEqual(line, "GPU 1: 100000 MiB more in use than before, by pid 8 (python3, 100000 MiB)")


if __name__ == "__main__":
    unittest.main()
