"""The main job against a deployment that somebody else runs: `pdkit check http://host:port`.

Not registered: it needs a deployment. See `pdkit.deployment.attached` for what the environment says of it.
"""

import unittest

from pdkit.checks.external import ExternalChecks
from pdkit.deployment.external import ExternalServers


class TestDisaggregationDSV4Attached(ExternalChecks, ExternalServers):
    pass


if __name__ == "__main__":
    unittest.main()
