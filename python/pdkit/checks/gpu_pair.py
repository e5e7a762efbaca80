"""What each pair on GPUs is asked that has a monolithic server to compare with, beside it or before it."""

from pdkit.checks.acceptance import DraftChecks
from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.parity.checks import ParityChecks
from pdkit.checks.placement import PlacementChecks


class GpuPairChecks(AccountingChecks, DraftChecks, PlacementChecks, ParityChecks):
    """Requests are accounted for, drafts accepted, GPUs those of the plan, answers those of one server."""
