"""What SGLang's own detector, --kv-canary, sees of wrong transfers of DeepSeek-V4, on one GPU.

It writes a chain of token hashes beside the slots of the window's pool, hands it over with the window, and compares
before and after each forward pass. As of 0.5.23 it has no buffers for compressed entries, for the indexer's and for the
compressors' states, and reads no byte of the window itself (`kv_canary/pool_patcher/adapters/dsv4.py`). On an H200 it saw
a window that did not come together with what the canary keeps of it, and nothing else: not that bytes of the window
did not come, nor the whole window of another request of the same length, whose chain is as sound, neither with nor
without SGLANG_KV_CANARY_ENABLE_VERIFY_TOKEN_ASSERT.
"""

import re
import unittest
from pathlib import Path

import test_disaggregation_dsv4_1gpu as one_gpu
from pdkit.checks.accounting.checks import unaccounted
from pdkit.checks.http import RequestFailed
from pdkit.checks.parity.references import collect
from pdkit.core import events
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.deployment.one_gpu import OneGpuServers
from pdkit.faults.real_engine.checks import NO_FAULT, TransferFaults
from pdkit.faults.real_engine.library import LIBRARY, WITH_CANARY
from pdkit.models.cuda.config import FIELDS
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=220, suite="stage-b-test-1-gpu-large")

SEEN = {"window-skipped"}
VIOLATION = re.compile(r"kv_canary violation: launch_tag=(\S+) fail_reason=(\S+)")
PROTECTED = re.compile(r"\[canary\] step=\d+ protected_tokens=(\d+)")


@unittest.skipUnless(hasattr(ServerArgs, "kv_canary"), "this release of SGLang has no --kv-canary")
class TestDisaggregationDSV4CanaryOneGpu(TransferFaults, MonolithicBeside, OneGpuServers):
    kv_canary = True
    # The canary refuses graphs of prefill that are made piece by piece.
    server_args = [*OneGpuServers.server_args, "--kv-canary", "log", "--cuda-graph-backend-prefill", "disabled"]
    server_env = {**OneGpuServers.server_env, "SGLANG_KV_CANARY_STATS_PRINT_EVERY_N_STEPS": "20"}
    compress_ratios = FIELDS["compress_ratios"][: FIELDS["num_hidden_layers"]]
    parity_options = one_gpu.TestDisaggregationDSV4OneGpu.parity_options
    transfer_faults = (
        "4x-compressed-lost",
        "indexer-compressed-lost",
        "128x-compressed-lost",
        "buffers-lost",
        "window-lost",
        *WITH_CANARY,
    )

    @classmethod
    def take_references(cls):
        """The canary needs none."""

    @unaccounted
    def test_what_the_canary_sees(self):
        found = {}
        for name in (None, *self.transfer_faults):
            self.overwrite()
            self.empty_caches(self.prefill_url, self.decode_url)
            before = len(self.violations())
            self.transfer_switch.turn(name)
            try:
                collect(self.lb_url, self.parity_plan().rooms[0], self.fault_timeout)
            except RequestFailed as failure:
                print(f"  {failure}", flush=True)
            self.until_served()
            met = self.transfer_switch.met()
            self.transfer_switch.turn(None)
            found[name or NO_FAULT] = self.violations()[before:]
            reasons = sorted({reason for _, reason in found[name or NO_FAULT]})
            print(
                f"{LIBRARY[name] if name else NO_FAULT}: met {met} times, {len(found[name or NO_FAULT])} violations "
                f"{', '.join(reasons)}",
                flush=True,
            )
            self.assertEqual(bool(met), bool(name))
        events.table(
            f"kv canary, {self.backend}", ["fault", "violations"], [[name, str(len(v))] for name, v in found.items()]
        )
        self.assertGreater(self.protected(), 0, "the canary of decode guarded no token")
        self.assertEqual({name for name, violations in found.items() if violations}, SEEN)

    def violations(self):
        """(launch tag, reason) of each that decode logged."""
        return VIOLATION.findall(Path(self.log_path("decode")).read_text(errors="replace"))

    def protected(self):
        """Tokens that decode's canary has looked at."""
        told = PROTECTED.findall(Path(self.log_path("decode")).read_text(errors="replace"))
        return max(map(int, told), default=0)


if __name__ == "__main__":
    unittest.main()
