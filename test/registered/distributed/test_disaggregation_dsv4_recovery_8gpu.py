"""The same scenarios with DeepSeek-V4-Flash on 8xH200: parts die and freeze, clients hear of it, service resumes."""

import unittest

from pdkit.checks.recovery.bootstrap_messages import BootstrapMessageChecks
from pdkit.checks.recovery.clients import Query
from pdkit.checks.recovery.few_shot import few_shot_asks
from pdkit.checks.recovery.in_flight import BEFORE, DURING, IDLE, STREAMING
from pdkit.checks.recovery.scenarios import RecoveryChecks
from pdkit.deployment.fleet import Fleet
from pdkit.deployment.multi_gpu import EightGpuServers
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=3600, suite="stage-c-test-dsv4-8-gpu-h200")

PAGES = "The following pages are left blank. " * 1500
COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"
LONG = 110  # solved problems of about 70 tokens, where a small model takes the place of the Flash weights


class TestDisaggregationDSV4Recovery8GPU(RecoveryChecks, BootstrapMessageChecks, Fleet, EightGpuServers):
    router_timeout = 90
    bootstrap_timeout = waiting_timeout = 60
    settling = 60
    returning = 1200
    # How long a decode rank stays blacklisted by a prefill rank after it is back: 30 to 300 s by default.
    probes = {"SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "2", "SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S": "8"}
    server_env = EightGpuServers.server_env | probes
    if EightGpuServers.gsm8k_data_path:  # a small model answers soon, and its long prompts are to take their time
        router_timeout, bootstrap_timeout, waiting_timeout = 30, 15, 15
        server_args = [*EightGpuServers.server_args, "--chunked-prefill-size", "2048", "--disable-radix-cache"]

    @classmethod
    def asks(cls):
        """Nothing holds a KV transfer here: prompts that take long are in the phases before, a long answer streams."""
        if cls.gsm8k_data_path:
            return few_shot_asks(cls.gsm8k_data_path, LONG, 600)
        return {
            BEFORE: Query(f"{PAGES}\n{COUNTING}", 8),
            DURING: Query(f"{PAGES}{PAGES}\n{COUNTING}", 8),
            STREAMING: Query(COUNTING, 600, stream=True),
            IDLE: Query(COUNTING, 8),
        }


if __name__ == "__main__":
    unittest.main()
