"""What single requests do not show: the kinds of `pdkit.faults.kinds`, each by a general check."""

from pdkit.checks.age import AgeChecks
from pdkit.checks.crossed import CrossedParameterChecks
from pdkit.checks.latency import LatencyChecks
from pdkit.checks.length import LengthChecks
from pdkit.checks.memory import MemoryChecks
from pdkit.checks.parity.checks import ParityChecks
from pdkit.checks.races import RaceChecks
from pdkit.checks.seam import SeamChecks
from pdkit.checks.streams import StreamChecks
from pdkit.checks.work import WorkChecks


class EdgeChecks(CrossedParameterChecks, LengthChecks, SeamChecks):
    """Where parameters, the context limit and the first tokens of an answer meet."""


class KindChecks(EdgeChecks, RaceChecks, StreamChecks, WorkChecks):
    """Those that a few dozen requests show."""


class LifeChecks(AgeChecks, LatencyChecks, MemoryChecks):
    """Those that take the life of a launch."""


class LifeAndKindChecks(KindChecks, LifeChecks):
    """All of them."""


class ParityAndKindChecks(KindChecks, ParityChecks):
    """Parity in all conditions, and the kinds."""
