"""What every verdict of a check has: problems or none, a report, and an assertion whose message is the report."""

from pdkit.core import events


class Judgement:
    """A verdict that is derived from what was measured.

    A subclass has `report()` and either `problems`, one text for each thing that is wrong, or a `passed` of its own.
    """

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, one text each."""
        return ()

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def report(self) -> str:
        """What was measured, by which rule it is judged, and what is wrong."""
        raise NotImplementedError

    @property
    def sentence(self) -> str:
        """What was found, in plain words: by default the first line of the report, without its verdict."""
        head = self.report().partition("\n")[0]
        return head.replace(": PASS, ", ": ").replace(": FAIL, ", ": ").replace(": PASS at ", ": decided at ")

    def assert_passed(self) -> None:
        """Prints the report, records what was found. Raises AssertionError with the report where something is wrong."""
        print(self.report(), flush=True)
        events.finding(self.sentence, self.passed)
        if not self.passed:
            raise AssertionError(self.report())
