"""The main job against a deployment that somebody else runs: `scripts/run.sh --base-url http://host:port`.

Not registered: it needs a deployment. See `pdkit.attached` for what the environment says of it.
"""

import unittest

import test_disaggregation_dsv4 as dsv4
from deployment_bridge import PDServers
from pdkit.checks.external import ExternalChecks, ExternalServers


class TestDisaggregationDSV4Attached(ExternalChecks, ExternalServers, PDServers):
    model_name = "whatever is served"

    @classmethod
    def setUpClass(cls):
        dsv4.require_inputs(cls)
        super().setUpClass()


if __name__ == "__main__":
    unittest.main()
