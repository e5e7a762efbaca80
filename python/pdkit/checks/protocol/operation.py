"""What operators use: flushing caches while requests are served, health, readiness of a router."""

import time
from itertools import islice

from pdkit.checks.http import RUST_ROUTER, Client, status_of
from pdkit.checks.protocol.reference import LoadBalancerChecks, through_each_load_balancer
from pdkit.core import ports
from pdkit.core.processes import wait_until
from pdkit.deployment.relay import Relay
from pdkit.deployment.router import is_ready


class OperationChecks(LoadBalancerChecks):
    """Operation of a deployment harms nobody, and readiness is what it says.

    Beside the others it starts a router that waits for a decode server at an address where none is.
    """

    needs: tuple[str, ...] = ("launch_router", "base_host")

    lone_router_url: str
    late_decode: tuple[str, int]

    @classmethod
    def launch_lb(cls) -> None:
        block = ports.claim()
        cls.addClassCleanup(block.release)
        cls.lone_router_url = f"http://{cls.base_host}:{block.ports[0]}"
        cls.late_decode = (cls.base_host, block.ports[1])
        cls.launch_router("router without decode", cls.lone_router_url, "http://{}:{}".format(*cls.late_decode))
        super().launch_lb()

    @through_each_load_balancer
    def test_flush_cache_while_serving(self, client: Client) -> None:
        """It is refused where a request is, and harms nobody (`Scheduler.flush_cache`)."""
        reference = self.reference(self.prompts(1)[0], 192)
        stream = client.open_stream(reference.prompt, 192)
        chunks = list(islice(stream, 2))
        self.assertEqual(self.flush(self.decode_url), 400, "decode is at work")
        self.assertLess(self.flush(client.url), 500)
        text = "".join(chunk.choices[0].text for chunk in (*chunks, *stream) if chunk.choices)
        self.assertGoesOn(text, reference)
        self.assertIdle()
        if self.prefix_cache_tokens:
            ask = {"text": self.shared_prefix(), "sampling_params": {"max_new_tokens": 1}}
            client.generate(**ask)
            self.assertGreater(client.generate(**ask)["meta_info"]["cached_tokens"], 0)
            deadline = time.monotonic() + self.settle_seconds
            while self.flush(client.url) != 200 or client.generate(**ask)["meta_info"]["cached_tokens"]:
                self.assertLess(time.monotonic(), deadline, "the cache was not flushed through the load balancer")

    def test_health_and_readiness(self) -> None:
        """A Rust router without decode is alive but not ready and refuses; it becomes ready when decode appears.

        The mini LB knows no readiness: its /health is 200 as soon as it listens.
        """
        lone = Client(RUST_ROUTER, self.lone_router_url, self.model, self.request_timeout)
        self.addCleanup(lone.close)
        for url in (self.prefill_url, self.decode_url, self.lb_url, self.router_url):
            for path in ("/health", "/health_generate"):
                self.assertEqual(status_of(url + path, self.request_timeout), 200, url + path)
        self.assertTrue(is_ready(self.router_url))

        self.assertEqual(status_of(f"{lone.url}/liveness", 10), 200)
        self.assertFalse(is_ready(lone.url), "a router that has no decode server says that it is ready")
        refusal = lone.post("/v1/completions", {"model": self.model, "prompt": "1", "max_tokens": 1})
        self.assertEqual(refusal.status_code, 503, refusal.text)
        host, port = self.decode_url.removeprefix("http://").split(":")
        with Relay(self.late_decode, (host, int(port))):
            ready = wait_until(lambda: is_ready(lone.url), self.request_timeout)
            self.assertTrue(ready, "decode appeared, and the router is not ready")
            self.assertServes(lone)
