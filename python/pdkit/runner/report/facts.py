"""What the events of one test file's run say: its phases, its score, the figures beside it."""

from typing import Any

from pdkit.core.events import Events
from pdkit.runner.report.model import UNFINISHED, Phase, Score

ACCEPTANCE_LENGTH = "acceptance length"


def phases_of(events: Events, seconds: float = 0.0) -> tuple[Phase, ...]:
    """In the order of their begin; those that have not ended last until the file did, after `seconds`."""
    start = next((event["ts"] for event in events), 0.0)
    begun: dict[str, float] = {}
    phases = []
    for event in events.of("phase"):
        name, at = event["name"], event["ts"] - start
        if event["state"] == "begins":
            begun.pop(name, None)
            begun[name] = at
        else:
            took = event["seconds"]
            phases.append(Phase(name, event["state"], begun.pop(name, max(at - took, 0.0)), took))
    phases += [Phase(name, UNFINISHED, at, max(seconds - at, 0.0)) for name, at in begun.items()]
    return tuple(sorted(phases, key=lambda phase: phase.start))


def open_phase(events: Events) -> str | None:
    """The phase that began last and has not ended."""
    unfinished = [phase.name for phase in phases_of(events) if phase.state == UNFINISHED]
    return unfinished[-1] if unfinished else None


def scores_of(events: Events) -> list[dict[str, Any]]:
    """The events of evals that scored at least one example, by a share of right answers."""
    return [event for event in events.of("score") if 0 <= event["score"] <= 1 and event["examples"] > 0]


def score_event_of(events: Events) -> dict[str, Any] | None:
    """The last score that a gate was asked about, else the last one: evals beside the main one have no gate."""
    scores = scores_of(events)
    gated = [event for event in scores if event.get("gate") is not None]
    return next(reversed(gated or scores), None)


def score_of(events: Events) -> Score | None:
    event = score_event_of(events)
    if event is None:
        return None
    correct = round(event["score"] * event["examples"])
    gate, throughput = event.get("gate"), event.get("throughput")
    return Score(event.get("target"), event.get("engine"), correct, event["examples"], gate, throughput)


def acceptance_length_of(events: Events) -> float | None:
    """Tokens per verification step, as a test of it measured, or the eval."""
    measured = [event["value"] for event in events.of("measurement") if event["name"] == ACCEPTANCE_LENGTH]
    return measured[-1] if measured else (score_event_of(events) or {}).get("acceptance_length")
