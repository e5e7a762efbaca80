"""Streams of a server whose torch thread goes on while an event is being written."""

import asyncio
import threading
import unittest
from types import SimpleNamespace

from pdkit.core.ci_register import register_cpu_ci
from pdkit.engine.fields import BadRequest
from pdkit.engine.request import Request, SamplingParams
from pdkit.engine.service import Service as EngineService
from pdkit.engine.streams import interleave

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")


class Service:
    """Yields `steps` times for each request, then finishes it; `ahead` steps before anybody can look."""

    def __init__(self, steps, error=None):
        self.steps, self.error = steps, error

    async def generate(self, request, ask):
        for _ in range(self.steps):
            yield
        if self.error is not None:
            raise self.error
        request.finish_reason = {"type": "length", "length": 1}
        yield


def request():
    return SimpleNamespace(finish_reason=None, lock=threading.Lock())


class TestInterleave(unittest.IsolatedAsyncioTestCase):
    async def collect(self, service, requests):
        def render(index):
            self.assertTrue(requests[index].lock.locked())
            return index, requests[index].finish_reason

        return [event async for event in interleave(service, requests, requests, render)]

    async def test_a_finished_request_is_shown_once(self):
        for steps in (0, 1, 5):
            requests = [request(), request()]
            events = await self.collect(Service(steps), requests)
            last = {"type": "length", "length": 1}
            self.assertEqual([event for event in events if event[1] is not None], [(0, last), (1, last)])
            self.assertEqual(len(events), 2, "the consumer never ran before both had finished")
            self.assertFalse(any(each.lock.locked() for each in requests))

    async def test_an_error_reaches_the_client(self):
        with self.assertRaisesRegex(BadRequest, "room 1 is in use"):
            await self.collect(Service(0, BadRequest("room 1 is in use")), [request()])


class TestLock(unittest.TestCase):
    def test_a_request_is_locked_while_it_takes_a_token(self):
        tokenizer = SimpleNamespace(decode=lambda ids, **_: "x" * len(ids))
        one, seen = Request([1], SamplingParams(), tokenizer, frozenset()), []
        one.notify = lambda: seen.append(one.lock.locked())
        one.add_output(5)
        one.abort("gone")
        self.assertEqual(seen, [True, True])
        self.assertFalse(one.lock.locked())


class TestAbort(unittest.IsolatedAsyncioTestCase):
    async def test_many_end_at_one_step_and_nobody_waits_for_it(self):
        """As in SGLang, whose /abort_request answers at once: its kit gives it 10 s for 32 requests."""
        tokenizer, steps, closed = SimpleNamespace(decode=lambda ids, **_: ""), [], []
        requests = [Request([1], SamplingParams(), tokenizer, frozenset(), room=room) for room in (7, 8)]
        service = EngineService.__new__(EngineService)
        service.scheduler = SimpleNamespace(call=lambda action, done: steps.append(lambda: done(action())))
        service.sender = SimpleNamespace(close=lambda room, why: closed.append(room))
        service.abort(requests)
        self.assertEqual((len(steps), closed), (1, []))
        steps[0]()
        self.assertEqual([each.finish_reason["type"] for each in requests], ["abort"] * 2)
        await asyncio.sleep(0)
        self.assertEqual(closed, [7, 8])


if __name__ == "__main__":
    unittest.main()
