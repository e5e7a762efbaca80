"""What the detection matrix runs: the tests of the embedded rung, their servers with a switch for faults."""

import test_disaggregation_dsv4_embedded as embedded
import test_disaggregation_dsv4_integrity as integrity
from pdkit.accounting_kit import RequestAccountingMixin
from pdkit.faults.kit import FaultSwitchMixin
from pdkit.gate_kit import AccuracyGateMixin


class Trained(FaultSwitchMixin, RequestAccountingMixin, AccuracyGateMixin, embedded.TestDisaggregationDSV4Embedded):
    attempt_timeout = 120


class RandomWeights(FaultSwitchMixin, integrity.TestDisaggregationDSV4Integrity):
    attempt_timeout = request_timeout = 120
