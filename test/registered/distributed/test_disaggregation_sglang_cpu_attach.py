"""PD test files that SGLang ships run unedited on its own servers on a machine without a GPU, under `attach`."""

import unittest
from pathlib import Path

import sglang
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.errors import ExitCode
from pdkit.deployment.cpu import requirements
from test_attach import Attached

register_cpu_ci(est_time=460, suite="stage-a-test-cpu", nightly=True)

SHIPPED = Path(sglang.__file__).parent / "test" / "manual" / "disaggregation"
LONG = "--context-length 131072 --max-total-tokens 131072"  # their prompts are of 20,000 to 75,000 of our small tokens


class TestSglangCpuAttached(Attached):
    @classmethod
    def setUpClass(cls) -> None:
        requirements.require_machine()

    def run_file(self, name: str, *tests: str) -> None:
        code, _ = self.attach(
            SHIPPED / name,
            *tests,
            model=None,
            PDKIT_SERVER_MODULE="pdkit.deployment.cpu.launch",
            PDKIT_SERVER_FLAGS=LONG,
            SGLANG_TEST_PD_DISAGG_BACKEND="mooncake_tcp",
            SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN="1",
        )
        self.assertEqual(code, ExitCode.PASSED)
        self.assertEqual([event["name"] for event in self.events("launch")][:2], ["prefill", "decode"])
        self.assertEqual({event["state"] for event in self.events("test")}, {"passed"})

    def test_chunked_prefill_abort(self) -> None:
        self.run_file("test_disaggregation_chunked_prefill_abort.py")

    def test_peer_liveness_abort(self) -> None:
        """But for its other class, which expects words that no error of SGLang 0.5.23 has: see docs/sglang-cpu.md."""
        self.run_file("test_disaggregation_peer_liveness_abort.py", "TestDisaggregationPeerLivenessCleanRecovery")


del Attached

if __name__ == "__main__":
    unittest.main()
