"""What one request got, read from each kind of answer that SGLang's endpoints give."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class AnswerError(ValueError):
    """An answer that lacks what was asked for."""


@dataclass(frozen=True)
class Answer:
    """What one request got.

    logprobs        log P of each output token, in nats
    alternatives    for each output token the most likely ones, as (logprob, token), most likely first
    prompt_logprobs log P of each prompt token that was asked for (None for the first of a prompt)
    cached_tokens   prompt tokens that came from a prefix cache; no part of the comparison
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    alternatives: tuple[tuple[tuple[float, int], ...], ...] = ()
    prompt_logprobs: tuple[float | None, ...] = ()
    text: str | None = None
    finish: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int = 0

    @classmethod
    def of_generate(cls, body: Mapping[str, Any], asked_logprobs: bool = True) -> "Answer":
        """From what `/generate` answers. Raises AnswerError."""
        try:
            meta = body["meta_info"]
            logprobs = _pairs(meta.get("output_token_logprobs"))
            tokens = tuple(body["output_ids"]) if "output_ids" in body else tuple(token for _, token in logprobs)
            if asked_logprobs and [token for _, token in logprobs] != list(tokens):
                raise AnswerError(
                    f"logprobs are of tokens {[token for _, token in logprobs][:8]}, the output is {list(tokens)[:8]}"
                )
            return cls(
                tokens=tokens,
                logprobs=tuple(logprob for logprob, _ in logprobs),
                alternatives=tuple(_pairs(row) for row in meta.get("output_top_logprobs") or ()),
                prompt_logprobs=tuple(logprob for logprob, *_ in meta.get("input_token_logprobs") or ()),
                text=body.get("text"),
                finish=_finish(meta.get("finish_reason")),
                prompt_tokens=meta.get("prompt_tokens"),
                cached_tokens=meta.get("cached_tokens") or 0,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise AnswerError(f"not an answer of /generate ({error!r}): {str(body)[:200]}") from None

    @classmethod
    def of_completion(cls, body: Mapping[str, Any]) -> "Answer":
        """From what `/v1/completions` answers; it tells a text, no tokens. Raises AnswerError."""
        try:
            (choice,), usage = body["choices"], body["usage"]
            finish = f"{choice['finish_reason']} {choice.get('matched_stop')} after {usage['completion_tokens']} tokens"
            return cls(
                tokens=(),
                text=choice["text"],
                finish=finish,
                prompt_tokens=usage["prompt_tokens"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise AnswerError(f"not an answer of /v1/completions ({error!r}): {str(body)[:200]}") from None

    @classmethod
    def of_stream(cls, events: Sequence[Mapping[str, Any]]) -> "Answer":
        """From the events of a `/generate` stream, whose texts grow. Raises AnswerError."""
        try:
            texts = [event["text"] for event in events]
            if not texts or any(not after.startswith(before) for before, after in zip(texts, texts[1:])):
                raise AnswerError(f"a stream of {len(texts)} events, each of which should go on from the one before")
            meta = events[-1]["meta_info"]
            return cls((), text=texts[-1], finish=_finish(meta["finish_reason"]), prompt_tokens=meta["prompt_tokens"])
        except (KeyError, TypeError) as error:
            raise AnswerError(f"not a stream of /generate ({error!r}): {str(events)[-200:]}") from None


def _pairs(triples: Iterable[Sequence[Any]] | None) -> tuple[tuple[float, int], ...]:
    """(logprob, token) of SGLang's (logprob, token, text)."""
    return tuple((logprob, token) for logprob, token, *_ in triples or ())


def _finish(reason: object) -> str | None:
    if not isinstance(reason, Mapping):
        return None if reason is None else str(reason)
    return " ".join(str(reason[name]) for name in ("type", "matched", "length") if name in reason)


Arm = Sequence[Answer]
