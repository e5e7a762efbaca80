"""Turns a fault on, asks each check, turns it off: what every table of faults and checks is made of."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pdkit.core import events
from pdkit.faults.switch import Switch

NO_FAULT = "no fault"
SHORT = 300  # characters of a message in a table

Check = Callable[[], str | None]


@dataclass(frozen=True)
class Observation:
    """What became of one fault, or of none.

    met   requests that met it
    seen  message of each check that was asked; None of one that saw nothing
    """

    fault: str | None
    met: int
    seen: Mapping[str, str | None]

    @property
    def is_seen(self) -> bool:
        return any(self.seen.values())

    def shortfall(self, harmful: bool) -> str | None:
        """Why this is not what is expected of a fault that does harm, or does none; None where it is."""
        name = self.fault or NO_FAULT
        if self.fault and not self.met:
            return f"{name}: it met no request, so nothing is known of it"
        if self.fault is None and self.met:
            return f"{name}: {self.met} requests met something"
        if self.is_seen == harmful:
            return None
        return f"{name}: not seen by any check" if harmful else f"{name}: seen where there is nothing to see"

    def lines(self) -> list[str]:
        shown = {check: textwrap.shorten(message, SHORT, placeholder=" ...") for check, message in self.seen.items()
                 if message}  # fmt: skip
        head = f"  {self.fault or NO_FAULT:<28} {'seen' if shown else 'not seen'}, met by {self.met} requests"
        return [head, *(f"      {check}: {message}" for check, message in shown.items())]


def observe(
    switch: Switch, fault: str | None, checks: Mapping[str, Check], goes_on: Callable[[], bool] = lambda: True
) -> Observation:
    """Asks `checks` in turn while `fault` is on (None: none is); no further one once `goes_on()` is false."""
    switch.turn(fault)
    seen: dict[str, str | None] = {}
    for name, check in checks.items():
        seen[name] = check()
        if not goes_on():
            break
    met = switch.met()
    switch.turn(None)
    if fault:
        events.harm(f"fault {fault}", met > 0, "it met no request")
    return Observation(fault, met, seen)


def tabulate(title: str, observations: Sequence[Observation], harmful: Callable[[str | None], bool]) -> list[str]:
    """Prints and records one row per fault; returns what is not as expected, one text each."""
    checks = list(dict.fromkeys(check for each in observations for check in each.seen))
    rows = [
        [each.fault or NO_FAULT, each.met, *("seen" if each.seen.get(check) else "" for check in checks)]
        for each in observations
    ]
    print(title, *(line for each in observations for line in each.lines()), sep="\n", flush=True)
    events.table(title, ["fault", "met", *checks], rows)
    return [wrong for each in observations if (wrong := each.shortfall(harmful(each.fault)))]
