"""What clients meet of SGLang's own prefill and decode on a machine without a GPU, and SGLang's own kits beside it.

Also integrity: SGLang's checksum of KV pages, of which it makes a share fail by itself; and two pairs behind one router.
"""

import json
import unittest
from typing import ClassVar

import test_disaggregation_dsv4_protocol as protocol
from pdkit.checks.integrity import IntegrityChecks, kv_checksum_args
from pdkit.checks.parity.exact import ExactParityArms
from pdkit.checks.parity.plan import PlanOptions
from pdkit.checks.protocol.checks import ProtocolChecks
from pdkit.checks.scale_out import ScaleOutChecks
from pdkit.deployment import quirks
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.servers import SglangCpuServers
from pdkit.deployment.fleet import TwoPairs
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.deployment.router import RustRouterBeside
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kits.json_constrained_kit import JSONConstrainedMixin
from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin

register_cpu_ci(est_time=230, suite="stage-a-test-cpu", nightly=True)


NAME, POPULATION = {"type": "string", "pattern": "^[a-z]{1,8}$"}, {"type": "integer", "minimum": 0, "maximum": 999}
CITY = json.dumps(
    {
        "type": "object",
        "properties": {"name": NAME, "population": POPULATION},
        "required": ["name", "population"],
        "additionalProperties": False,
    }
)
"""What SGLang's JSON kit asks, of bounded length: a small model would not end a name by itself."""


class Kits(JSONConstrainedMixin, PauseResumeInPlaceMixin, protocol.SGLangKits):
    """SGLang's own that run here."""

    pause_num_requests = 8
    pause_max_new_tokens = 1500
    pause_ignore_eos = True

    def test_pause_resume_in_place(self) -> None:
        self.pause_target_urls = [self.prefill_url, self.decode_url]
        super().test_pause_resume_in_place()


class TestDisaggregationSglangCpuProtocol(ProtocolChecks, RustRouterBeside, Kits, MonolithicBeside, SglangCpuServers):
    cpu_model = plan.LLAMA
    json_schema = CITY  # the kit's; ours asks whether there is one
    more_server_args = ("--constrained-json-disable-any-whitespace",)  # a small model would write blanks for ever
    near_tie = 1e-3  # who else is served changes the sixth decimal
    empty_text_is_fatal = quirks.empty_text_is_fatal()
    prefix_cache_tokens = 256
    rendered_chat = "<|user|>{}<|assistant|>"
    extra_prefill_args = extra_decode_args = kv_checksum_args()  # of sound transfers, which none may be rejected for
    unending_tokens = 7500
    sustained_seconds = idle_seconds = 10


class TestDisaggregationSglangCpuIntegrity(IntegrityChecks, ExactParityArms, MonolithicBeside, SglangCpuServers):
    cpu_model = plan.LLAMA  # SGLang 0.5.23 has no checksum for DeepSeek-V4's pools
    parity_options = PlanOptions(longest=520, extra_lengths=(), rooms=16)
    corruption_is_random = True
    server_env: ClassVar[dict[str, str]] = {"SGLANG_TEST_DISAGG_KV_CHECKSUM_MISMATCH_PROB": "0.2"}  # read by decode

    extra_prefill_args = extra_decode_args = kv_checksum_args()

    @classmethod
    def take_references(cls) -> None:
        """Nothing is compared where chance rejects answers."""


class TestDisaggregationSglangCpuScaleOut(ScaleOutChecks, TwoPairs, SglangCpuServers):
    cpu_model = plan.LLAMA
    prefill_2_nccl_port = decode_2_nccl_port = None

    @classmethod
    def prefill_2_args(cls) -> list[str]:
        return [cls.prefill_2_nccl_port if each == cls.prefill_nccl_port else each for each in super().prefill_2_args()]

    @classmethod
    def decode_2_args(cls) -> list[str]:
        return [cls.decode_2_nccl_port if each == cls.decode_nccl_port else each for each in super().decode_2_args()]


if __name__ == "__main__":
    unittest.main()
