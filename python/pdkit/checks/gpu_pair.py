"""What each pair on GPUs is asked that has a monolithic server to compare with, beside it or before it."""

from pdkit.checks.acceptance import DraftChecks
from pdkit.checks.accounting.checks import AccountingChecks
from pdkit.checks.parity.checks import ParityChecks
from pdkit.checks.parity.plan import Round
from pdkit.checks.placement import PlacementChecks
from pdkit.deployment.one_gpu import PAGE


class GpuPairChecks(AccountingChecks, DraftChecks, PlacementChecks, ParityChecks):
    """Requests are accounted for, drafts accepted, GPUs those of the plan, answers those of one server."""

    @classmethod
    def expected_from_cache(cls, round_: Round) -> frozenset[str]:
        """With EAGLE the cache is keyed by pairs of tokens: of a prompt of a page and a token it keeps nothing."""
        return round_.cached & {probe.name for probe in round_.probes if (probe.prompt_length or 0) > 2 * PAGE}
