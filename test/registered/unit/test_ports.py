"""Claimed ports: concurrent runs do not meet, neither each other nor SGLang's fixtures."""

import random
import socket
import subprocess
import sys
import unittest
from unittest import mock

from pdkit.core import ports
from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

CLAIM = (
    "import sys\nfrom pdkit.core import ports\nports.BLOCKS = [int(word) for word in sys.argv[1:]]\n"
    "blocks = [ports.claim() for _ in range(5)]\n"
    "print(*(port for block in blocks for port in block.ports), flush=True)\nsys.stdin.read()"
)


class TestClaim(unittest.TestCase):
    def claim(self):
        block = ports.claim()
        self.addCleanup(block.release)
        return block

    def test_processes_that_claim_at_the_same_time_do_not_meet(self):
        few = [str(base) for base in random.sample(ports.BLOCKS, 40)]
        processes = []
        for _ in range(4):
            command = [sys.executable, "-c", CLAIM, *few]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            processes.append(self.enterContext(process))
            self.addCleanup(process.kill)
        claimed = [int(port) for process in processes for port in process.stdout.readline().split()]
        self.assertEqual(len(claimed), 4 * 5 * (ports.BLOCK_SIZE - 1))
        self.assertEqual(len(set(claimed)), len(claimed))

    def test_clear_of_the_ports_of_sglang_s_fixtures(self):
        for gpu in range(10):
            for base in (10_000 + 2000 * gpu + 1000, 20_000 + 1000 * gpu + 1000):  # in SGLang's CI, and outside of it
                derived = range(base, base + 600)
                self.assertEqual([block for block in ports.BLOCKS if block in derived], [])
        self.assertLess(max(ports.BLOCKS) + ports.BLOCK_SIZE, 32768)

    def test_a_listener_within_the_block_spoils_it(self):
        with mock.patch.object(ports, "BLOCKS", ports.BLOCKS[:1]):
            block = self.claim()
            with self.assertRaises(RuntimeError):
                ports.claim()
            block.release()
            with socket.create_server(("", block.ports[-1])), self.assertRaisesRegex(RuntimeError, "no 10 free ports"):
                ports.claim()
            self.assertEqual(self.claim().ports, block.ports)


if __name__ == "__main__":
    unittest.main()
