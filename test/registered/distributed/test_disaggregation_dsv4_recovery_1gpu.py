"""SGLang's own servers on one GPU: parts die and freeze, clients hear of it, service resumes."""

import unittest

from pdkit.checks.recovery.bootstrap_messages import BootstrapMessageChecks
from pdkit.checks.recovery.few_shot import few_shot_asks
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
        return few_shot_asks(cls.gsm8k_data_path, LONG, 1000)


if __name__ == "__main__":
    unittest.main()
