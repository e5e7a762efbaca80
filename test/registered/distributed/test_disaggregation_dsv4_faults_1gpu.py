"""What goes wrong between SGLang's own prefill and decode must be seen: wrong transfers, on one GPU, in one launch.

SGLang is as it is; the Python module of its transfer backend is wrapped (`pdkit.faults.real_engine`).
"""

import unittest

from pdkit.checks.parity.plan import PlanOptions
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.deployment.one_gpu import INDEXED, TrainedOneGpuServers
from pdkit.faults.real_engine.checks import TransferFaultChecks
from pdkit.models.cuda.config import FIELDS
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=520, suite="stage-b-test-1-gpu-large")

# By default the indexer's choice among near equals differs from run to run, and so do answers to prompts that are long
# enough for it to choose: a server is then as far from itself as it is when the indexer's entries are lost.
REPEATABLE_TOPK = ["--dsa-topk-backend", "torch"] if hasattr(ServerArgs, "dsa_topk_backend") else []


class TestDisaggregationDSV4FaultsOneGpu(TransferFaultChecks, MonolithicBeside, TrainedOneGpuServers):
    server_args = [*TrainedOneGpuServers.server_args, *REPEATABLE_TOPK]
    compress_ratios = FIELDS["compress_ratios"][: FIELDS["num_hidden_layers"]]
    parity_options = PlanOptions(
        longest=INDEXED + 600,
        extra_lengths=(*range(300, 2000, 100), INDEXED + 60, INDEXED + 600),
    )


if __name__ == "__main__":
    unittest.main()
