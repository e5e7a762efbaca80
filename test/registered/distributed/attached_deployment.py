"""The main job against a deployment that somebody else runs: `scripts/run.sh --base-url http://host:port`.

Not registered: it needs a deployment. See `pdkit.attached` for what the environment says of it.
"""

import unittest

import test_disaggregation_dsv4 as dsv4
from pdkit.accounting_kit import RequestAccountingMixin
from pdkit.attached_kit import ApiMixin, AttachedMixin
from pdkit.parity_kit import ParityMixin


class TestDisaggregationDSV4Attached(
    AttachedMixin, ApiMixin, RequestAccountingMixin, ParityMixin, dsv4.TestDisaggregationDSV4
):
    model_name = "whatever is served"

    @classmethod
    def setUpClass(cls):
        dsv4.require_inputs(cls)
        super().setUpClass()


if __name__ == "__main__":
    unittest.main()
