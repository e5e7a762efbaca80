"""SGLang's own prefill and decode on a machine without a GPU: NIXL, DeepSeek-V4 served together, with its draft, spawned."""

import time
import unittest

from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.checks.parity.exact import ExactAloneChecks, ExactIndexerChecks, ExactParityChecks
from pdkit.checks.parity.plan import PlanOptions, Round, generate_probe
from pdkit.checks.parity.references import collect
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.servers import SglangCpuServers
from pdkit.deployment.monolithic import MonolithicBeside
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=800, suite="stage-a-test-cpu", nightly=True)


class _Whole(AccountingChecks, ExactParityChecks, MonolithicBeside, SglangCpuServers):
    cpu_model = plan.DSV4
    parity_options = PlanOptions(longest=1100, rooms=16, in_flight=8, indexed=2, indexed_tokens=6)

    def test_report_throughput(self) -> None:
        """Output tokens a second of 32 requests, 16 at a time; reported only."""
        probes = tuple(
            generate_probe(f"load-{seed}", [5 + seed * index % 499 for index in range(128)], 64)
            for seed in range(3, 35)
        )
        for in_flight in (1, 16):
            some = probes[:4] if in_flight == 1 else probes
            began = time.monotonic()
            answers = collect(self.lb_url, Round(f"{in_flight} at a time", some, in_flight), self.request_timeout)
            rate = sum(len(answer.tokens) for answer in answers) / (time.monotonic() - began)
            print(f"throughput, {in_flight} at a time: {rate:.0f} output tokens/s", flush=True)


class TestDisaggregationSglangCpuLlamaNixl(
    AccountingChecks, GSM8KChecks, ExactParityChecks, MonolithicBeside, SglangCpuServers
):
    cpu_model = plan.LLAMA
    backend = "nixl"
    parity_options = PlanOptions(rooms=24, in_flight=8)


class TestDisaggregationSglangCpuNixl(_Whole):
    backend = "nixl"


class TestDisaggregationSglangCpuEagle(_Whole):
    """Two tokens a step are verified with the model's MTP layer as the draft."""

    more_server_args = plan.EAGLE


class TestDisaggregationSglangCpuEagleNixl(AccountingChecks, ExactAloneChecks, MonolithicBeside, SglangCpuServers):
    cpu_model = plan.DSV4
    backend = "nixl"
    more_server_args = plan.EAGLE
    parity_options = PlanOptions(longest=520, extra_lengths=())


class TestDisaggregationSglangCpuSpawned(AccountingChecks, ExactIndexerChecks, MonolithicBeside, SglangCpuServers):
    """Processes start as in production: what only SGLang's spawned start can show is seen here."""

    cpu_model, parity_options = _Whole.cpu_model, _Whole.parity_options
    forked = False


del _Whole

if __name__ == "__main__":
    unittest.main()
