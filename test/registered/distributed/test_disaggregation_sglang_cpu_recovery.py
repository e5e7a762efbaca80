"""SGLang's own servers on a machine without a GPU: parts die and freeze, a scheduler inside a server among them."""

import unittest

from pdkit.checks.recovery.bootstrap_messages import BootstrapMessageChecks
from pdkit.checks.recovery.few_shot import few_shot_asks
from pdkit.checks.recovery.schedulers import SchedulerDeathChecks
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.servers import SglangCpuServers
from pdkit.deployment.fleet import Fleet
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=660, suite="stage-a-test-cpu", nightly=True)

LONG = 24  # solved problems of about 70 tokens: seven chunks of prefill


class TestDisaggregationSglangCpuRecovery(SchedulerDeathChecks, BootstrapMessageChecks, Fleet, SglangCpuServers):
    cpu_model = plan.LLAMA
    more_server_args = ["--max-total-tokens", "65536", "--disable-radix-cache"]  # long prompts are to stay long
    bitwise = False
    router_timeout = 45
    bootstrap_timeout = waiting_timeout = 60  # after a router gave up: a starved machine is told from a loss

    @classmethod
    def asks(cls):
        return few_shot_asks(cls.gsm8k_data_path, LONG, 700)


if __name__ == "__main__":
    unittest.main()
