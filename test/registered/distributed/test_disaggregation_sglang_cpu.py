"""The main job with SGLang's own prefill and decode on a machine without a GPU; what is replaced: `pdkit.deployment.cpu`.

A DeepSeek-V4 with the KV pages of the real one, trained to solve GSM8K-like problems, is scored. Requests that are sent one
at a time must be answered as SGLang's own monolithic server answers them, to the bit. Among them are prompts that end just
before, at and after multiples of 128 and 256: what a compressor's ring holds of an unfinished entry shows there alone, and
in logprobs only. Other models and longer prompts: test_disaggregation_sglang_cpu_parity.py.
"""

import unittest

from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.checks.parity.exact import ExactAloneChecks
from pdkit.checks.parity.plan import PlanOptions
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.servers import SglangCpuServers
from pdkit.deployment.monolithic import MonolithicBeside
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=75, suite="stage-a-test-cpu", nightly=True)


class TestDisaggregationSglangCpuTrained(
    AccountingChecks, GSM8KChecks, ExactAloneChecks, MonolithicBeside, SglangCpuServers
):
    cpu_model = plan.TRAINED_DSV4
    parity_options = PlanOptions(longest=520, extra_lengths=())


if __name__ == "__main__":
    unittest.main()
