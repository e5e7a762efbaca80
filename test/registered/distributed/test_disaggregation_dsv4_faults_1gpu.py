"""What goes wrong between SGLang's own prefill and decode must be seen: wrong transfers, on one GPU, in one launch.

SGLang is as it is; the Python module of its transfer backend is wrapped (`pdkit.transfer_shim`).
"""

import unittest

import test_disaggregation_dsv4 as dsv4
import test_disaggregation_dsv4_1gpu as one_gpu
from pdkit.kernel_nano.config import FIELDS
from pdkit.monolithic_kit import MonolithicBesideMixin
from pdkit.transfer_shim.kit import TransferFaultsMixin
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=300, suite="stage-b-test-1-gpu-large")


class TestDisaggregationDSV4FaultsOneGpu(
    TransferFaultsMixin, MonolithicBesideMixin, one_gpu.OneGpuPlan, dsv4.TestDisaggregationDSV4
):
    compress_ratios = FIELDS["compress_ratios"][: FIELDS["num_hidden_layers"]]
    parity_options = one_gpu.TestDisaggregationDSV4OneGpu.parity_options

    test_gsm8k = None

    @classmethod
    def setUpClass(cls):
        dsv4.require_gpus(cls)
        cls.require_training()
        super().setUpClass()


if __name__ == "__main__":
    unittest.main()
