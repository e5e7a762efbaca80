"""What goes wrong between SGLang's own prefill and decode must be seen, on a machine without a GPU.

The Python module of the transfer backend is wrapped (`pdkit.faults.real_engine`), SGLang itself is as released but for its
kernels. The model is a random DeepSeek-V4, so that each piece of its state shows in its logprobs.
"""

import unittest
from dataclasses import replace

from pdkit.checks.parity.exact import ExactParityArms
from pdkit.checks.parity.plan import PlanOptions
from pdkit.checks.parity.verdict import Parity
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.checkpoints import DSV4_FIELDS
from pdkit.deployment.cpu.servers import SglangCpuServers
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.faults.real_engine.checks import TransferFaultChecks
from pdkit.faults.real_engine.library import LIBRARY
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=900, suite="stage-a-test-cpu", nightly=True)

DRAFTS = "draft-window-lost", "first-draft-lost"  # nothing drafts here


class TestDisaggregationSglangCpuFaults(TransferFaultChecks, ExactParityArms, MonolithicBeside, SglangCpuServers):
    cpu_model = plan.DSV4
    compress_ratios = DSV4_FIELDS["compress_ratios"][: DSV4_FIELDS["num_hidden_layers"]]
    parity_options = PlanOptions(longest=300, extra_lengths=(300,), rooms=4, room_length=300, indexed=1)
    transfer_faults = tuple(name for name in LIBRARY if name not in DRAFTS)
    first_drafts_prompts = 4  # at once, before each fault
    transfer_timeout, fault_timeout = 60, 120  # a prompt of 3072 tokens on a machine that does other work, too
    shortest = 120  # tokens: of a shorter prompt not every piece of the state is used

    @classmethod
    def take_references(cls) -> None:
        plan_ = cls.parity_plan()
        for round_ in (*plan_.alone, *plan_.rooms, *plan_.indexed):
            cls.reference_alone(round_)

    def fault_checks(self):
        plan_ = self.parity_plan()
        long = tuple(probe for probe in plan_.alone[0].probes if (probe.prompt_length or 0) >= self.shortest)
        rounds = {"alone": replace(plan_.alone[0], probes=long), "rooms": plan_.rooms[0], "indexed": plan_.indexed[0]}
        return {name: lambda round_=round_: self.exactly(round_) for name, round_ in rounds.items()}

    def exactly(self, round_):
        """What is wrong with the answers to a round, each request alone; None if they are the monolithic server's."""
        names = tuple(probe.name for probe in round_.probes)
        alone = self.answers(replace(round_, in_flight=1))
        parity = Parity(round_.condition, names, self.reference_alone(round_), alone)
        return "; ".join(parity.problems) or None


class TestDisaggregationSglangCpuFaultsNixl(TestDisaggregationSglangCpuFaults):
    backend = "nixl"


if __name__ == "__main__":
    unittest.main()
