"""From how the answers of compared requests differ to the part that is most likely wrong, in words.

Pure: what was recorded in, a sentence or nothing out. A hint says where to look, never that something is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ComparedRequest:
    """One request, and how its answer differs from the one that is right.

    prompt     tokens; None of a text
    in_flight  requests that were sent at a time; 1: alone
    cached     tokens of the prompt that came from a prefix cache
    token      first output token that differs, counted from 0; None where none does
    logprob    first output token whose logprobs differ
    size       largest difference of a logprob, in nats
    other      what else differs: "text", "finish", ...
    answer_of  request of the same round whose answer it got, and that is not its own
    """

    name: str
    prompt: int | None = None
    in_flight: int = 1
    cached: int = 0
    token: int | None = None
    logprob: int | None = None
    size: float = 0.0
    other: tuple[str, ...] = ()
    answer_of: str | None = None

    @property
    def differs(self) -> bool:
        return self.token is not None or self.logprob is not None or bool(self.other)


@dataclass(frozen=True)
class Evidence:
    """What one round of compared requests showed.

    condition   how they were sent
    boundaries  where the state of a prompt changes its shape: what -> tokens
    """

    condition: str
    requests: tuple[ComparedRequest, ...]
    boundaries: Mapping[str, int]

    def as_event(self) -> dict[str, Any]:
        """For the event `compared`: one list per request, without what is as by default at its end."""
        rows = []
        for request in self.requests:
            row = list(asdict(request).values())
            while row and row[-1] in (None, 0, 0.0, ()):
                row.pop()
            rows.append(row)
        return {"condition": self.condition, "boundaries": dict(self.boundaries), "requests": rows}

    @classmethod
    def of_event(cls, event: Mapping[str, Any]) -> Evidence:
        """Raises TypeError or KeyError where it is not one."""
        requests = (
            ComparedRequest(*(tuple(cell) if isinstance(cell, list) else cell for cell in row))
            for row in event["requests"]
        )
        return cls(event["condition"], tuple(requests), event["boundaries"])
