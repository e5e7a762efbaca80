"""The recovery table: what each event did to the requests of each phase, and how long it took to be over."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pdkit.checks.recovery.clients import Fate, Outcome

FILE_NAME = "recovery_table.json"
BEGIN, END = "<!-- recovery table -->", "<!-- end of recovery table -->"
COLUMNS = "event", "requests", "answered", "failed", "wrong"
BY_HAND = "by hand"  # in place of a router: prefill and decode are sent a request each


@dataclass(frozen=True)
class Row:
    """Requests of one phase through one router.

    to_error     seconds from the event to the last client's error, or from sending what was sent after the event
    to_recovery  seconds from the restart, or the thaw, to the first right answer
    """

    event: str
    phase: str
    router: str
    served: int
    failed: int
    wrong: int
    to_error: float | None
    to_recovery: float | None = None

    @classmethod
    def of(cls, event: str, phase: str, router: str, outcomes: Sequence[Outcome], seconds: Sequence[float]) -> "Row":
        """seconds: for each outcome, from the event, or from its request, to its end."""
        fates = [outcome.fate for outcome in outcomes]
        ends = [after for after, fate in zip(seconds, fates) if fate in (Fate.FAILED, Fate.HUNG)]
        failed = fates.count(Fate.FAILED) + fates.count(Fate.HUNG)
        longest = max(ends, default=None)
        return cls(event, phase, router, fates.count(Fate.SERVED), failed, fates.count(Fate.WRONG), longest)


def parts(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(title, rows) of what went through routers and of what was sent by hand, where there is any."""
    by_hand = [row for row in rows if row.router == BY_HAND]
    routed = [row for row in rows if row.router != BY_HAND]
    return [(title, part) for title, part in (("recovery", routed), ("bootstrap messages", by_hand)) if part]


def grid(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(columns, lines): a line for each event and phase; each router has its times."""
    routers = list(dict.fromkeys(row.router for row in rows))
    times = [f"{what}, {router}" for what in ("time to error", "time to recovery") for router in routers]
    lines: list[list[str]] = []
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault((row.event, row.phase), {}).setdefault(row.router, []).append(row)
    for (event, phase), by_router in groups.items():
        every = [row for each in by_router.values() for row in each]
        counts = [str(sum(getattr(row, name) for row in every)) for name in ("served", "failed", "wrong")]
        spans = [
            _longest(getattr(row, name) for row in by_router.get(router, ()))
            for name in ("to_error", "to_recovery")
            for router in routers
        ]
        lines.append([event, phase, *counts, *spans])
    return [*COLUMNS, *times], lines


def markdown(rows: Sequence[Row]) -> str:
    tables = []
    for _, part in parts(rows):
        columns, lines = grid(part)
        tables.append("\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines)))
    return "\n\n".join(tables)


def _longest(spans: Iterable[float | None]) -> str:
    longest = max((span for span in spans if span is not None), default=None)
    return "-" if longest is None else f"{longest:.1f} s"


def save(rows: Sequence[Row], path: Path | str, **about: object) -> None:
    """about: what else the reader must know, by name (target, engine, bounds)."""
    Path(path).write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """(about, rows). Raises ValueError with one line if it is no such file."""
    try:
        record = json.loads(Path(path).read_text())
        rows = [Row(**row) for row in record.pop("rows")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no {FILE_NAME} of a recovery test: {error}") from None
    return record, rows


def insert(document: str, table: str) -> str:
    """`document` with `table` between its two markers. Raises ValueError without them."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document has no {BEGIN} ... {END}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"
