"""What the detection matrix runs: the tests of the embedded rung, their servers with a switch for faults."""

import test_disaggregation_dsv4_integrity as integrity
from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.accuracy.checks import AccuracyGateChecks
from pdkit.deployment.cpu import EmbeddedServers
from pdkit.faults.kit import FaultSwitchServers


class Trained(FaultSwitchServers, AccountingChecks, AccuracyGateChecks, EmbeddedServers):
    attempt_timeout = 120


class RandomWeights(FaultSwitchServers, integrity.TestDisaggregationDSV4Integrity):
    attempt_timeout = request_timeout = 120
