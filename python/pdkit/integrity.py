"""Which hand-overs were rejected: corrupted ones must be, with an error that says so, and healthy ones never."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The answer to one request. `corrupted`: whether its hand-over was; None where only chance knows."""

    name: str
    status: int
    text: str
    corrupted: bool | None

    @property
    def served(self) -> bool:
        return self.status == 200

    def rejected(self, error: str) -> bool:
        """Is it a server error whose text names `error`?"""
        return self.status >= 500 and error.lower() in self.text.lower()


@dataclass(frozen=True)
class Rejections:
    """Derives from the outcomes of one load what was wrongly served or rejected, reports and asserts it.

    error  what the text of a rejection must name
    """

    outcomes: Sequence[Outcome]
    error: str = "checksum"

    @property
    def rejected(self) -> int:
        return sum(outcome.rejected(self.error) for outcome in self.outcomes)

    @property
    def problems(self) -> tuple[str, ...]:
        found = []
        for outcome in self.outcomes:
            text = " ".join(outcome.text.split())[:200]
            if not outcome.served and not outcome.rejected(self.error):
                found.append(f"{outcome.name}: status {outcome.status}, no error that names {self.error!r}: {text}")
            elif outcome.corrupted is True and outcome.served:
                found.append(f"{outcome.name}: its hand-over was corrupted, and it was served")
            elif outcome.corrupted is False and not outcome.served:
                found.append(f"{outcome.name}: its hand-over was healthy, and it was rejected: {text}")
        if not self.rejected:
            found.append("nothing was rejected")
        if not any(outcome.served for outcome in self.outcomes):
            found.append("nothing was served")
        return tuple(found)

    def report(self) -> str:
        served = sum(outcome.served for outcome in self.outcomes)
        corrupted = sum(outcome.corrupted is True for outcome in self.outcomes)
        lines = [
            f"transfer integrity: {'FAIL' if self.problems else 'PASS'}, {len(self.outcomes)} requests, {corrupted} "
            f"hand-overs known to be corrupted; {self.rejected} rejected, {served} served"
        ]
        first = next((outcome for outcome in self.outcomes if outcome.rejected(self.error)), None)
        if first:
            lines.append(
                f"  first rejection: {first.name}: status {first.status}: {' '.join(first.text.split())[:200]}"
            )
        return "\n".join(lines + [f"  {problem}" for problem in self.problems])

    def assert_passed(self) -> None:
        """Raises AssertionError, whose message is the report."""
        if self.problems:
            raise AssertionError(self.report())
