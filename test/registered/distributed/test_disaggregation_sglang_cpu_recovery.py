"""SGLang's own servers on a machine without a GPU: parts die and freeze, a scheduler inside a server among them."""

import json
import unittest

import test_disaggregation_dsv4 as dsv4
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.schedulers import SchedulerDeathsMixin
from pdkit.fleet_kit import FleetMixin
from pdkit.recovery.clients import Ask
from pdkit.recovery.kit import BEFORE, DURING, IDLE, STREAMING, RecoveryMixin
from pdkit.recovery.messages import BootstrapMessagesMixin
from sglang.test.ci.ci_register import register_cpu_ci
from test_disaggregation_sglang_cpu import SglangCpuPlan

register_cpu_ci(est_time=600, suite="stage-a-test-cpu", nightly=True)

LONG = 40  # solved problems of about 70 tokens: eleven chunks of prefill


class TestDisaggregationSglangCpuRecovery(
    SchedulerDeathsMixin, RecoveryMixin, BootstrapMessagesMixin, FleetMixin, SglangCpuPlan, dsv4.TestDisaggregationDSV4
):
    cpu_model = plan.LLAMA
    more_server_args = ["--max-total-tokens", "65536", "--disable-radix-cache"]  # long prompts are to stay long
    bitwise = False
    router_timeout = 30
    bootstrap_timeout = waiting_timeout = 15

    test_gsm8k = None
    test_a_bootstrap_message_is_duplicate = None  # what SGLang does with it is not defined

    @classmethod
    def asks(cls):
        """Nothing holds a KV transfer here: long prompts queue for prefill, whose chunks leave one by one."""
        with open(cls.gsm8k_data_path, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        shots = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows]
        question = f"Question: {rows[-1]['question']}\nAnswer:"
        return {
            BEFORE: Ask("".join(shots[:LONG]) + question, 8),
            DURING: Ask("".join(shots[LONG : 2 * LONG]) + question, 8),
            STREAMING: Ask("".join(shots[:5]) + question, 700, stream=True),
            IDLE: Ask("".join(shots[:5]) + question, 8),
        }


if __name__ == "__main__":
    unittest.main()
