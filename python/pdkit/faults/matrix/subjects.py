"""What the detection matrix runs: the checks of the embedded target, their servers with a switch for faults."""

from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.accuracy.checks import AccuracyGateChecks
from pdkit.checks.integrity import IntegrityChecks
from pdkit.checks.kinds import LifeAndKindChecks
from pdkit.checks.parity.checks import ParityChecks
from pdkit.deployment.embedded import EmbeddedServers, RandomEmbeddedServers
from pdkit.deployment.monolithic import MonolithicBeside
from pdkit.engine.test_backends import BIT_FLIPS, WITHHELD
from pdkit.faults.servers import FaultSwitchServers


class Trained(FaultSwitchServers, AccountingChecks, AccuracyGateChecks, EmbeddedServers):
    attempt_timeout = 120


class RandomWeightsIntact(AccountingChecks, IntegrityChecks, ParityChecks, MonolithicBeside, RandomEmbeddedServers):
    bitwise = True
    corrupted_lengths = tuple(BIT_FLIPS)

    @classmethod
    def prefill_args(cls) -> list[str]:
        return super().prefill_args() + ["--disaggregation-transfer-backend", "pdkit.engine.test_backends:BitFlip"]


class RandomWeights(FaultSwitchServers, RandomWeightsIntact):
    attempt_timeout = request_timeout = 120


class KindsIntact(AccountingChecks, IntegrityChecks, LifeAndKindChecks, MonolithicBeside, RandomEmbeddedServers):
    """What one request at a time, or a few, do not show; see `pdkit.faults.kinds`."""

    bitwise = True
    age_requests = 450
    stream_count = 300
    latency_requests = 200
    parallel_samples = True
    corrupted_lengths = failing_lengths = tuple(BIT_FLIPS)
    withheld_lengths = WITHHELD

    @classmethod
    def take_references(cls) -> None:
        """The monolithic server stays up: it is asked when a test needs it."""

    @classmethod
    def prefill_args(cls) -> list[str]:
        return super().prefill_args() + ["--disaggregation-transfer-backend", "pdkit.engine.test_backends:BitFlip"]


class Kinds(FaultSwitchServers, KindsIntact):
    attempt_timeout = request_timeout = 120
