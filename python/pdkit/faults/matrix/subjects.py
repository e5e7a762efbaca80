"""What the detection matrix runs: the checks of the embedded target, their servers with a switch for faults."""

from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.accuracy.checks import AccuracyGateChecks
from pdkit.checks.integrity import IntegrityChecks
from pdkit.checks.parity.checks import ParityChecks
from pdkit.deployment.embedded import EmbeddedServers, RandomEmbeddedServers
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.engine.test_backends import BIT_FLIPS
from pdkit.faults.servers import FaultSwitchServers


class Trained(FaultSwitchServers, AccountingChecks, AccuracyGateChecks, EmbeddedServers):
    attempt_timeout = 120


class RandomWeightsIntact(AccountingChecks, IntegrityChecks, ParityChecks, MonolithicBeside, RandomEmbeddedServers):
    bitwise = True
    corrupted_lengths = tuple(BIT_FLIPS)

    @classmethod
    def prefill_args(cls):
        return super().prefill_args() + ["--disaggregation-transfer-backend", "pdkit.engine.test_backends:BitFlip"]


class RandomWeights(FaultSwitchServers, RandomWeightsIntact):
    attempt_timeout = request_timeout = 120
