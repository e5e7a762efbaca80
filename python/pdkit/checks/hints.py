"""From how the answers of compared requests differ to the part that is most likely wrong, in words.

Pure: what was recorded in, a sentence or nothing out. A hint says where to look, never that something is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import gcd
from typing import Any


@dataclass(frozen=True)
class ComparedRequest:
    """One request, and how its answer differs from the one that is right.

    prompt     tokens; None of a text
    in_flight  requests that were sent at a time; 1: alone
    tokens     of the right answer
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
    tokens: int = 0
    cached: int = 0
    token: int | None = None
    logprob: int | None = None
    size: float = 0.0
    other: tuple[str, ...] = ()
    answer_of: str | None = None

    @property
    def differs(self) -> bool:
        return self.token is not None or self.logprob is not None or bool(self.other)

    @property
    def first(self) -> int | None:
        """The first output token that shows a difference."""
        return min((at for at in (self.token, self.logprob) if at is not None), default=None)


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
        rows: list[list[Any]] = [
            [tuple(cell) if isinstance(cell, list) else cell for cell in row] for row in event["requests"]
        ]
        return cls(event["condition"], tuple(ComparedRequest(*row) for row in rows), event["boundaries"])


PARAMETERS = "request parameters"  # conditions that begin so send one prompt with other parameters each
PREFIXES = "shared prefix"
AGE = "requests from "
ANY_WIDTH = 64
SHOWN = 0.6  # share of the requests that a suspect says will differ, and that must


@dataclass(frozen=True)
class Suspect:
    """A part that may be wrong: which requests differ if it is, in words and as a function.

    edge  (prompt length from which on it shows, within how many tokens above and below it requests must bear that out);
          None: it is about something else
    """

    pattern: str
    part: str
    shows: Callable[[ComparedRequest], bool]
    edge: tuple[int, int] | None = None

    def fits(self, requests: Sequence[ComparedRequest]) -> bool:
        """Whether all that differ are those that it explains, and most of those that it explains differ."""
        expected = [request for request in requests if self.shows(request)]
        wrong = [request for request in requests if request.differs]
        if not all(map(self.shows, wrong)) or len(wrong) < SHOWN * len(expected):
            return False
        if self.edge is None:
            return True
        low, width = self.edge
        shortest = sorted(expected, key=lambda request: request.prompt or 0)[:2]
        is_borne_out = any(request.differs and (request.prompt or 0) < low + width for request in shortest)
        below = [request for request in requests if (request.prompt or 0) < low]
        return is_borne_out and (not below or any((request.prompt or 0) >= low - width for request in below))


def hint(evidence: Sequence[Evidence]) -> str | None:
    """Where to look, by which of the compared requests differ; None where nothing does or no pattern is plain."""
    requests = [request for each in evidence for request in each.requests]
    wrong = [request for request in requests if request.differs]
    if not wrong:
        return None
    if crossed := _crossed(wrong):
        return crossed
    if cached := _cached(requests):
        return cached
    if aged := _aged([request for each in evidence if each.condition.startswith(AGE) for request in each.requests]):
        return aged
    alone = [each for each in evidence if all(request.in_flight == 1 for request in each.requests)]
    if not alone:
        return _together(evidence) or _shape(requests, _boundaries(evidence))
    lonely = [request for each in alone for request in each.requests]
    if any(request.differs for request in lonely):
        return _first_token(lonely) or _shape(lonely, _boundaries(evidence)) or _one_in_many(lonely)
    return _together(evidence)


def _boundaries(evidence: Sequence[Evidence]) -> dict[str, int]:
    return {what: tokens for each in evidence for what, tokens in each.boundaries.items()}


def _crossed(wrong: Sequence[ComparedRequest]) -> str | None:
    """Answers that are another request's."""
    others = [request for request in wrong if request.answer_of not in (None, request.name)]
    if len(others) < 2 and len(others) * 2 < len(wrong) or not others:
        return None
    first = others[0]
    return (
        f"{len(others)} requests got another request's answer ({first.name} that of {first.answer_of}): look at how the "
        "load balancer pairs requests and bootstrap rooms"
    )


def _cached(requests: Sequence[ComparedRequest]) -> str | None:
    """Prompts of which a part came from a cache, while as long ones that did not are answered right."""
    wrong = [request for request in requests if request.differs]
    least = min(request.prompt or 0 for request in wrong)
    fresh = [each for each in requests if not each.differs and not each.cached and (each.prompt or 0) >= least]
    if not all(request.cached for request in wrong) or not fresh:
        return None
    return "only prompts with a cached prefix differ: look at the prefix cache, and at what prefill sends of its pages"


def _aged(requests: Sequence[ComparedRequest]) -> str | None:
    """The same requests were answered right before, and from one of them on are not."""
    first = next((index for index, request in enumerate(requests) if request.differs), None)
    if not first or not all(request.differs for request in requests[first:]):
        return None
    if not {request.name for request in requests[first:]} & {request.name for request in requests[:first]}:
        return None
    return (
        f"the same requests were answered right until number {first}, and wrong from then on: look at what fills up or "
        "wraps around over the life of a server"
    )


def _first_token(requests: Sequence[ComparedRequest]) -> str | None:
    """Decode computes from the second output token on; the first is prefill's."""
    wrong = [request for request in requests if request.differs]
    if any(request.first != 0 for request in wrong):
        return None
    length = _threshold([request for request in requests if request.prompt is not None])
    return (f"{length}; " if length else "") + (
        "the first output token is wrong already, which prefill computes and sends beside the state: look at prefill, or "
        "at how decode receives the first token and its logprob"
    )


# What a compressor holds beside its entries -> whether it counts in a prompt(tokens, tokens an entry)
_OF_AN_ENTRY: Mapping[str, Callable[[int, int], bool]] = {
    "buffers": lambda prompt, ratio: prompt % ratio > 0,
    "overlap": lambda prompt, ratio: prompt >= ratio,
    "buffers, overlap and count": lambda prompt, ratio: True,
}


def _suspects(boundaries: Mapping[str, int]) -> Iterator[Suspect]:
    """Of several that explain the same, the first is the most specific."""
    ratios = {what: tokens for what, tokens in boundaries.items() if what.endswith("compressor")}
    for what, ratio in ratios.items():
        pattern = f"answers differ from the token on that completes an entry of {ratio} tokens, which the prompt began"
        for part, counts in _OF_AN_ENTRY.items():
            yield Suspect(pattern, f"the {part} of the {what}", partial(_completes, ratio, counts))
    for what, ratio in ratios.items():
        for least in (ratio, 2 * ratio):
            pattern = f"only prompts of {least} tokens and more differ"
            yield Suspect(pattern, f"the {what}", partial(_from, least), (least, ratio))
    for what, tokens in boundaries.items():
        if what not in ratios:
            pattern = f"only prompts of more than {tokens} tokens differ"
            yield Suspect(pattern, f"the {what}", partial(_from, tokens + 1), (tokens + 1, tokens + 1))
    every = "prompts of every length differ, short ones too"
    yield Suspect(every, "the sliding window, or what every transfer has", partial(_from, 0), (0, ANY_WIDTH))


def _from(least: int, request: ComparedRequest) -> bool:
    return (request.prompt or 0) >= least


def _completes(ratio: int, counts: Callable[[int, int], bool], request: ComparedRequest) -> bool:
    """Whether the answer reaches the end of the entry that the prompt began, and differs, if so, from there on."""
    prompt = request.prompt or 0
    left = ratio - prompt % ratio
    return counts(prompt, ratio) and left < request.tokens and (request.first is None or request.first >= left)


def _shape(requests: Sequence[ComparedRequest], boundaries: Mapping[str, int]) -> str | None:
    """The suspect that explains all differences and the fewest other requests; two that explain the same, both."""
    known = [request for request in requests if request.prompt is not None]
    if sum(request.differs for request in known) < 2:
        return None
    fitting = [suspect for suspect in _suspects(boundaries) if suspect.fits(known)]
    if not fitting:
        return _threshold(known)
    expected = [sum(map(suspect.shows, known)) for suspect in fitting]
    best = [suspect for suspect, count in zip(fitting, expected, strict=True) if count == min(expected)]
    same = [suspect for suspect in best[1:] if suspect.edge and suspect.edge == best[0].edge]
    return f"{best[0].pattern}: look at {' or '.join(suspect.part for suspect in (best[0], *same))}"


def _threshold(requests: Sequence[ComparedRequest]) -> str | None:
    """A length that parts right from wrong, and that stands for nothing known."""
    wrong = [request.prompt or 0 for request in requests if request.differs]
    right = [request.prompt or 0 for request in requests if not request.differs]
    if not wrong or len(right) < 2 or min(wrong) <= max(right):
        return None
    return f"only prompts of {min(wrong)} tokens and more differ; up to {max(right)} tokens all are right"


def _one_in_many(requests: Sequence[ComparedRequest]) -> str | None:
    """Differences at equal distances in the order of the requests."""
    at = [index for index, request in enumerate(requests) if request.differs]
    distance = gcd(*(later - earlier for earlier, later in zip(at, at[1:]))) if len(at) > 2 else 0
    if distance < 2 or len(at) < SHOWN * (len(requests) - at[0]) / distance:
        return None
    return f"one request in {distance} differs, whatever its prompt: look at one of {distance} workers or ranks"


def _together(evidence: Sequence[Evidence]) -> str | None:
    """What only requests show that were sent together with others, or beside other parameters."""
    bad = [each for each in evidence if any(request.differs for request in each.requests)]
    good = [each for each in evidence if each not in bad]
    if not good:
        return None
    if all(each.condition.startswith(PARAMETERS) for each in bad):
        names = dict.fromkeys(request.name for each in bad for request in each.requests if request.differs)
        return f"only other request parameters show it ({', '.join(names)}): look at whether decode gets them"
    requests = [request for each in evidence for request in each.requests]
    wrong = [request for request in requests if request.differs]
    if all(each.condition.startswith(PREFIXES) for each in bad):
        return (
            "only requests that share a prefix with another differ: look at slots of the state that two requests share, "
            "and at the prefix cache"
        )
    least = min(request.in_flight for request in wrong)
    if all(request.in_flight < least for each in good for request in each.requests):
        return (
            f"only requests with {least} and more in flight differ: look at batches, at bootstrap rooms and at the load "
            "balancer"
        )
    return None
