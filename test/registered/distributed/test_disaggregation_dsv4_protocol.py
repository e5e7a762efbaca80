"""What clients of prefill and decode meet: every endpoint, edge and refusal, through the mini LB and the Rust router.

The servers answer as SGLang's do; SGLang's own kits, run from the installed package, say so too.
"""

import unittest
from dataclasses import replace
from unittest import mock

import openai
import requests
from broken_router import BREAKAGES, BrokenRouter
from pdkit.checks.base import Checks
from pdkit.checks.http import MINI_LB, Client
from pdkit.checks.protocol.checks import ProtocolChecks
from pdkit.deployment.embedded import EmbeddedServers
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.deployment.router import RustRouterBeside
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kits.abort_timeout_kit import AbortAllMixin
from sglang.test.kits.basic_api_contract_kit import BasicAPIContractMixin
from sglang.test.kits.pd_parity_kit import PDLogprobParityMixin

register_cpu_ci(est_time=80, suite="stage-a-test-cpu")


class SGLangKits(PDLogprobParityMixin, BasicAPIContractMixin, AbortAllMixin, Checks):
    """The parity kit starts SGLang for its references, and then the pair; here all are up."""

    needs = ("monolithic_url", "process_monolithic", "process_lb", "launch_all")

    references = None
    parity_logprob_delta = 0
    parity_cached_prefix_min_prompt_tokens = 128
    abort_all_max_new_tokens = 3500
    abort_all_sleep = 4

    @classmethod
    def take_references(cls):
        cls.references = [cls._generate(base_url=cls.monolithic_url, input_ids=ids) for ids in cls.parity_prompts]

    def _collect_references(self):
        return self.references

    @classmethod
    def launch_all(cls):
        if cls.process_lb is None:
            super().launch_all()

    def test_abort_all(self):
        self.base_url, self.process = self.monolithic_url, self.process_monolithic
        super().test_abort_all()


class TestDisaggregationDSV4Protocol(ProtocolChecks, RustRouterBeside, SGLangKits, MonolithicBeside, EmbeddedServers):
    bitwise = True
    parallel_samples = True
    json_schema = False
    prefix_cache_tokens = 256
    rendered_chat = "<|user|>{}<|assistant|>"
    unending_tokens = 3500
    sustained_seconds = 3
    idle_seconds = 6

    def test_each_scenario_can_fail(self):
        self.sustained_seconds, self.idle_seconds = 1, 1.5
        for name, breakage, pattern in BREAKAGES:
            soon = mock.patch.object(self, "settle_seconds", 0.5)
            with self.subTest(scenario=name), soon, BrokenRouter(self.lb_url, breakage) as router:
                client = Client(replace(MINI_LB, tells_of_leaving=True), router.url, self.model, self.request_timeout)
                self.clients, self.lone_router_url = [client], router.url
                method = getattr(type(self), name)
                with self.assertRaisesRegex((AssertionError, openai.OpenAIError), pattern) as seen:
                    method.scenario(self, client) if hasattr(method, "scenario") else method(self)
                print(f"broken router: {name} fails: {str(seen.exception)[:120]!r}", flush=True)
            client.close()
            for url in (self.prefill_url, self.decode_url):
                requests.post(f"{url}/abort_request", json={"abort_all": True}, timeout=self.request_timeout)
            self.assertIdle()


if __name__ == "__main__":
    unittest.main()
