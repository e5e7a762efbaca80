"""One sequence being generated: what was asked for, what came out, and when it is finished."""

import secrets
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pdkit.engine.fields import SAMPLING, BadRequest

GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class SamplingParams:
    """SGLang's names, defaults and ranges.

    max_new_tokens None: as many as fit; temperature 0: greedy; top_k -1: the whole vocabulary.
    """

    max_new_tokens: Annotated[int, Field(ge=0)] | None = 128
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Literal[-1] | Annotated[int, Field(ge=1)] = -1
    stop: Annotated[tuple[str, ...], Field(max_length=32, strict=False)] = ()
    stop_token_ids: Annotated[frozenset[int], Field(strict=False)] = frozenset()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    n: Annotated[int, Field(ge=1)] = 1
    sampling_seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> "SamplingParams":
        """From a JSON object as a client sent it; null is the default. Raises BadRequest."""
        wanted: dict[str, Any] = {}
        SAMPLING.refuse(given or {})
        for name, value in (given or {}).items():
            if name in SAMPLING.neutral:
                continue
            if name not in _ADAPTERS:
                raise BadRequest(f"unknown sampling parameter {name!r}; known are {', '.join(_ADAPTERS)}", name)
            if value is None and name != "max_new_tokens":
                continue
            given_value = [value] if name == "stop" and isinstance(value, str) else value
            try:
                wanted[name] = _ADAPTERS[name].validate_python(given_value)
            except ValidationError as error:
                raise BadRequest(f"{name}: {error.errors()[0]['msg']}, got {value!r}", name) from None
        return cls(**wanted)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


_ADAPTERS = {
    name: TypeAdapter(hint, config=ConfigDict(strict=True))
    for name, hint in get_type_hints(SamplingParams, include_extras=True).items()
}


def finish(kind: str, **detail: Any) -> dict[str, Any]:
    """SGLang's finish_reason."""
    return {"type": kind, **detail}


Scored = tuple[float | None, int]


@dataclass(eq=False)
class Request:
    """ids: the prompt's token ids. notify: called from the torch thread when there is something new to read.

    logprob_start_len: first prompt position whose logprob is wanted (len(ids): none). top_logprobs_num: alternatives
    a position. room: bootstrap room. Logprobs are kept as (logprob, token id), alternatives as lists of them.
    """

    ids: list[int]
    params: SamplingParams
    tokenizer: Any
    eos_ids: frozenset[int]
    notify: Callable[[], Any] = lambda: None
    rid: str = field(default_factory=lambda: uuid.uuid4().hex)
    return_logprob: bool = False
    logprob_start_len: int | None = None
    top_logprobs_num: int = 0
    extra_key: str | None = None
    room: int | None = None

    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    output_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: dict[str, Any] | None = None
    text: str = ""
    input_logprobs: list[Scored] = field(default_factory=list)
    input_top_logprobs: list[list[Scored] | None] = field(default_factory=list)
    output_logprobs: list[Scored] = field(default_factory=list)
    output_top_logprobs: list[list[Scored]] = field(default_factory=list)

    def __post_init__(self) -> None:
        start = self.logprob_start_len if self.return_logprob else None
        self._scored_from = len(self.ids) if start is None else start
        seed = self.params.sampling_seed
        self._seed = secrets.randbits(32) if seed is None else seed

    @property
    def length(self) -> int:
        return len(self.ids) + len(self.output_ids)

    @property
    def keep_from(self) -> int:
        """First prompt position whose logits are needed, for a logprob or for the next token; none before it may be."""
        return min(len(self.ids) - 1, self._scored_from)

    def add_prompt_logits(self, start: int, logits: torch.Tensor) -> None:
        """logits [m, V] of prompt positions start..start+m-1; each scores the prompt token that follows it."""
        if self._scored_from >= len(self.ids) or not len(logits) or not self._takes(logits):
            return
        if start == self._scored_from:
            self.input_logprobs.append((None, self.ids[start]))
            self.input_top_logprobs.append(None)
        for row, token in zip(logits, self.ids[start + 1 : start + 1 + len(logits)]):
            logprobs = row.log_softmax(-1)
            self.input_logprobs.append((logprobs[token].item(), token))
            self.input_top_logprobs.append(self._top(logprobs))

    def add_output_logits(self, logits: torch.Tensor) -> None:
        """Choose the next token from logits [V] of the last position."""
        if not self._takes(logits):
            return
        if self.params.greedy:
            token = int(logits.argmax())
        else:
            logits = logits / self.params.temperature
            token = self._sample(logits)
        logprob: float | None = None
        top: list[Scored] = []
        if self.return_logprob:
            logprobs = logits.log_softmax(-1)
            logprob, top = logprobs[token].item(), self._top(logprobs)
        self.add_output(token, logprob, top)

    def add_output(self, token: int, logprob: float | None = None, top: Iterable[Scored] = ()) -> None:
        assert self.finish_reason is None
        with self.lock:
            self.output_ids.append(token)
            if self.return_logprob:
                self.output_logprobs.append((logprob, token))
                self.output_top_logprobs.append(list(top))
            self._update_text_and_finish(token)
            self.notify()

    def _takes(self, logits: torch.Tensor) -> bool:
        """Whether to go on with `logits` [..., V]; ends the request where they can be neither drawn from nor sent.

        JSON has no NaN. A greedy request without logprobs goes on, as SGLang's does.
        """
        if (self.return_logprob or not self.params.greedy) and not logits.isfinite().all():
            place = len(self.output_ids)
            self.abort(f"logits at output token {place} are not finite: model or state is corrupt", status=500)
        return not self.is_aborted

    @property
    def is_aborted(self) -> bool:
        return self.finish_reason is not None and self.finish_reason["type"] == "abort"

    def abort(self, message: str, status: int | None = None) -> None:
        """End here; with a status the client gets it as an HTTP error."""
        if self.finish_reason is None:
            with self.lock:
                detail = {"status_code": status} if status else {}
                self.finish_reason = finish("abort", message=message, **detail)
                self.notify()

    def _top(self, logprobs: torch.Tensor) -> list[Scored]:
        if not self.top_logprobs_num:
            return []
        values, tokens = logprobs.topk(min(self.top_logprobs_num, len(logprobs)))
        return list(zip(values.tolist(), tokens.tolist()))

    def _sample(self, logits: torch.Tensor) -> int:
        """Seeded by request and position, so that a sequence goes on elsewhere as it would have here."""
        probabilities = logits.softmax(-1)
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        keep = ordered.cumsum(-1) - ordered < self.params.top_p
        if self.params.top_k != -1:
            keep[self.params.top_k :] = False
        position = torch.Generator().manual_seed((self._seed * 1_000_003 + self.length) % 2**63)
        return int(tokens[torch.multinomial(ordered * keep, 1, generator=position)])

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.params.skip_special_tokens)

    def _update_text_and_finish(self, token: int) -> None:
        """A stop string wins over a stop token, a stop token over the length: as SGLang decides."""
        params, text = self.params, self._decode(self.output_ids)
        limit = params.max_new_tokens
        assert limit is not None, "whoever makes a Request says how many tokens fit"
        stop_ids = () if params.ignore_eos else self.eos_ids | params.stop_token_ids
        if len(self.output_ids) > limit:
            self.output_ids.clear()
            self.finish_reason = finish("length", length=0)
        elif (stop := self._matched_stop()) is not None:
            position = text.find(stop)
            if position >= 0:
                text = text[: position + len(stop) * params.no_stop_trim]
            self.text = text
            self.finish_reason = finish("stop", matched=stop)
        elif token in stop_ids:
            self.text = text if params.no_stop_trim else self._decode(self.output_ids[:-1])
            self.finish_reason = finish("stop", matched=token)
        elif len(self.output_ids) == limit:
            self.text = text
            self.finish_reason = finish("length", length=limit)
        else:
            self.text = text[: len(text) - self._held_back(text)]

    def _matched_stop(self) -> str | None:
        """The first of the stop strings that the output holds; special tokens count as their names."""
        if not self.params.stop:
            return None
        output = self.tokenizer.decode(self.output_ids)
        return next((stop for stop in self.params.stop if stop in output), None)

    def _held_back(self, text: str) -> int:
        """Characters at the end that may still become part of a stop string or of an unfinished UTF-8 character."""
        broken = len(text) - len(text.rstrip("�"))
        longest = max(
            (size for stop in self.params.stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        return max(broken, longest)
