"""DeepSeek-V4-Flash on 8xH200: prefill and decode must answer as one monolithic server does that ran there before."""

import unittest

import test_disaggregation_dsv4 as dsv4
from pdkit.accounting_kit import RequestAccountingMixin
from pdkit.gate_kit import AcceptanceLengthMixin, FirstDraftsMixin
from pdkit.integrity_kit import TransferIntegrityMixin
from pdkit.monolithic_kit import MonolithicFirstMixin
from pdkit.parity_kit import ParityMixin
from pdkit.placement_kit import PlacementMixin
from sglang.test.ci.ci_register import register_cuda_ci

register_cuda_ci(est_time=900, suite="stage-c-test-dsv4-8-gpu-h200")


class TestDisaggregationDSV4Integrity8GPU(
    RequestAccountingMixin,
    TransferIntegrityMixin,
    AcceptanceLengthMixin,
    FirstDraftsMixin,
    PlacementMixin,
    ParityMixin,
    MonolithicFirstMixin,
    dsv4.TestDisaggregationDSV4,
):
    test_gsm8k = None  # test_disaggregation_dsv4.py asks that

    @classmethod
    def take_references(cls):
        super().take_references()
        cls.take_acceptance_reference()
        cls.take_first_drafts_reference()


if __name__ == "__main__":
    unittest.main()
