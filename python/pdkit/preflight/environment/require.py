"""The check in front of a suite."""

from collections.abc import Iterable

from pdkit.core.errors import NotReady
from pdkit.core.registry import Registration
from pdkit.preflight.environment import needs
from pdkit.preflight.environment.check import check
from pdkit.preflight.finding import Level


def require(registrations: Iterable[Registration]) -> None:
    """Prints what may spoil these files, of one suite, here. Raises NotReady where they cannot run at all."""
    findings = check(needs.of(registrations))
    errors = [str(finding) for finding in findings if finding.level is Level.ERROR]
    for finding in findings:
        if finding.level is Level.WARNING:
            print(f"environment: warning: {finding}", flush=True)
    if errors:
        raise NotReady("\n".join(errors))
