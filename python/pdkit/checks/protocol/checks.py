"""All that clients of prefill and decode meet."""

from pdkit.checks.protocol.answers import AnswerChecks
from pdkit.checks.protocol.leaving import LeavingChecks
from pdkit.checks.protocol.load import LoadChecks
from pdkit.checks.protocol.operation import OperationChecks
from pdkit.checks.protocol.refusals import RefusalChecks


class ProtocolChecks(AnswerChecks, RefusalChecks, LeavingChecks, LoadChecks, OperationChecks):
    """Each scenario once through each load balancer."""
