"""SGLang's own servers on one GPU: parts die and freeze, clients hear of it, service resumes."""

import json
import unittest

from pdkit.checks.recovery.bootstrap_messages import BootstrapMessageChecks
from pdkit.checks.recovery.clients import Ask
from pdkit.checks.recovery.in_flight import BEFORE, DURING, IDLE, STREAMING
from pdkit.checks.recovery.scenarios import RecoveryChecks
from pdkit.deployment.fleet import Fleet
from pdkit.deployment.one_gpu import TrainedOneGpuServers
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=600, suite="stage-b-test-1-gpu-large")

LONG = 110  # solved problems of about 70 tokens: sixteen chunks of prefill


class TestDisaggregationDSV4RecoveryOneGpu(RecoveryChecks, BootstrapMessageChecks, Fleet, TrainedOneGpuServers):
    bitwise = False
    router_timeout = 20
    bootstrap_timeout = waiting_timeout = 10
    server_args = [*TrainedOneGpuServers.server_args, "--disable-radix-cache"]  # long prompts are to stay long

    @classmethod
    def asks(cls):
        """Nothing holds a hand-over here: long prompts queue for prefill, whose chunks leave one by one."""
        with open(cls.gsm8k_data_path, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        shots = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows]
        question = f"Question: {rows[-1]['question']}\nAnswer:"
        return {
            BEFORE: Ask("".join(shots[:LONG]) + question, 8),
            DURING: Ask("".join(shots[LONG : 2 * LONG]) + question, 8),
            STREAMING: Ask("".join(shots[:5]) + question, 1000, stream=True),
            IDLE: Ask("".join(shots[:5]) + question, 8),
        }


if __name__ == "__main__":
    unittest.main()
