"""Before an eval is timed: requests until no kernel is compiled any more."""

import threading
import unittest

from pdkit.deployment import warm_up
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from stub_server import StubServer

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")


class TestWarmUp(CustomTestCase):
    def served(self, at_once, status=200):
        """URL of a server that answers when as many requests have arrived."""
        barrier = threading.Barrier(at_once, timeout=60)
        return StubServer(self, reply=lambda path, body: (status, {"place": barrier.wait()})).url

    def test_passes_go_on_until_two_take_about_as_long(self):
        for seconds, used in (([300, 20, 3, 2.9, 1], 4), ([5, 4.9], 2), ([3, 6, 5.9], 3), ([64, 32, 16, 8, 4, 2], 5)):
            left = iter(seconds)
            self.assertEqual(warm_up.until_settled(lambda left=left: next(left)), seconds[:used])

    def test_every_size_of_batch_up_to_the_threads(self):
        for threads, sizes in ((1, [1]), (8, [1, 2, 4, 8]), (128, [1, 2, 4, 8, 16, 32, 64, 128]), (5, [1, 2, 4, 5])):
            self.assertEqual([len(batch) for batch in warm_up.batches(threads)], sizes)
        lengths = {len(prompt) for batch in warm_up.batches(128) for prompt in batch}
        self.assertGreater(max(lengths), 30 * min(lengths))

    def test_a_batch_is_sent_at_once(self):
        self.assertGreater(warm_up.send(self.served(4), "model", warm_up.batches(4)[-1:], 90), 0)

    def test_a_refused_request_fails(self):
        with self.assertRaisesRegex(warm_up.requests.HTTPError, "503"):
            warm_up.send(self.served(1, 503), "model", warm_up.batches(1), 90)


if __name__ == "__main__":
    unittest.main()
