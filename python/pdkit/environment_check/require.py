"""The check in front of a suite."""

from collections.abc import Iterable

from pdkit.environment_check import needs
from pdkit.environment_check.check import check
from pdkit.environment_check.finding import Level
from pdkit.exit_codes import NotReady
from pdkit.registry import Registration


def require(registrations: Iterable[Registration]):
    """Prints what may spoil these files, of one suite, here. Raises NotReady where they cannot run at all."""
    findings = check(needs.of(registrations))
    errors = [str(finding) for finding in findings if finding.level is Level.ERROR]
    for finding in findings:
        if finding.level is Level.WARNING:
            print(f"environment: warning: {finding}", flush=True)
    if errors:
        raise NotReady("\n".join(errors))
