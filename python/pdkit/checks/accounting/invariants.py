"""What must hold in every answer, whoever asked for what: counts, tokens, logprobs and finish reason agree.

Read in what SGLang's servers say of themselves (sglang/srt/managers/tokenizer_manager.py, sglang/srt/entrypoints).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CLIENT, SERVERS = "request accounting", "division of labour"  # names of the checks
GENERATE = "/generate"


def contradiction(path: str, request: Any, answer: Any) -> str | None:
    """The first thing in which an answer with status 200 contradicts itself or its request; None if there is none.

    request  the JSON that was sent, None if it is not known; answer: the JSON that came, of one of the paths that
             generate
    """
    if path == GENERATE:
        bodies, params = _spread(request, answer)
        found: Iterator[str] = (
            each for body, own, one in zip(bodies, params, _list(answer)) for each in _of_generate(body, own, one)
        )
    else:
        found = _of_openai(request if isinstance(request, Mapping) else {}, answer)
    return next(found, None)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _spread(request: Any, answer: Any) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """(body, sampling parameters) of each answer; bodies of a batch tell no prompt of its own."""
    count = len(_list(answer))
    body = request if isinstance(request, Mapping) else {}
    given = body.get("sampling_params") or {}
    params = given if isinstance(given, list) and len(given) == count else [given] * count
    alone = body if not isinstance(answer, list) else {}
    return [alone] * count, [each if isinstance(each, Mapping) else {} for each in params]


def _of_generate(body: Mapping[str, Any], params: Mapping[str, Any], answer: Mapping[str, Any]) -> Iterator[str]:
    meta = answer["meta_info"]
    prompt, completion, cached = (meta.get(name) for name in ("prompt_tokens", "completion_tokens", "cached_tokens"))
    ids = answer.get("output_ids")
    yield from _counts(prompt, cached)
    given = body.get("input_ids")
    if isinstance(given, list) and prompt is not None and len(given) != prompt:
        yield f"prompt_tokens is {prompt}, {len(given)} were sent"
    if ids is not None and completion is not None and len(ids) != completion:
        yield f"completion_tokens is {completion}, output_ids has {len(ids)}"
    logprobs = meta.get("output_token_logprobs") or ()
    if (
        (logprobs or body.get("return_logprob") is True)
        and ids is not None
        and [entry[1] for entry in logprobs] != list(ids)
    ):
        yield f"output_token_logprobs is of {len(logprobs)} other tokens than the {len(ids)} of output_ids"
    reason = meta.get("finish_reason") or {}
    yield from _ending(reason.get("type"), completion, params.get("max_new_tokens"))
    matched = reason.get("matched")
    if reason.get("type") == "stop" and ids and isinstance(matched, int):
        if matched in ids[:-1] and not params.get("ignore_eos"):
            yield f"output_ids goes on after token {matched}, which ended the answer"
        if ids[-1] != matched:
            yield f"the last of output_ids is {ids[-1]}, the answer was ended by {matched}"
    yield from _after_a_stop(answer.get("text"), params.get("stop"), params.get("no_stop_trim"))


def _counts(prompt: int | None, cached: int | None) -> Iterator[str]:
    if prompt is not None and cached is not None and cached > prompt:
        yield f"cached_tokens is {cached}, the prompt has {prompt}"


def _ending(reason: str | None, completion: int | None, most: Any) -> Iterator[str]:
    """`most`: the largest number of tokens that was asked for, None where it was left to the server."""
    if not isinstance(most, int) or completion is None:
        return
    if completion > most:
        yield f"{completion} tokens came, at most {most} were asked for"
    if reason == "length" and completion < most:
        yield f"finish reason length after {completion} of {most} tokens"


def _after_a_stop(text: Any, stops: Any, kept: Any) -> Iterator[str]:
    if not isinstance(text, str) or kept:
        return
    for stop in _list(stops) if stops else ():
        if isinstance(stop, str) and stop and stop in text:
            yield f"the text goes on after the stop {stop!r}"


def _of_openai(body: Mapping[str, Any], answer: Mapping[str, Any]) -> Iterator[str]:
    choices, usage = answer["choices"], answer.get("usage")
    if not isinstance(usage, Mapping):
        return
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    details = usage.get("prompt_tokens_details") or {}
    yield from _counts(prompt, details.get("cached_tokens"))
    if prompt is not None and completion is not None and usage.get("total_tokens") not in (None, prompt + completion):
        yield f"total_tokens is {usage['total_tokens']}, the sum of the others is {prompt + completion}"
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    yield from _sums(choices, completion, most if isinstance(most, int) else None)
    if len(choices) == 1:
        tokens = (choices[0].get("logprobs") or {}).get("token_logprobs")
        if tokens is not None and completion is not None and len(tokens) != completion and not body.get("echo"):
            yield f"completion_tokens is {completion}, there are {len(tokens)} logprobs"
    for choice in choices:
        said = choice.get("text") if "text" in choice else (choice.get("message") or {}).get("content")
        yield from _after_a_stop(said, body.get("stop"), body.get("no_stop_trim"))


def _sums(choices: Sequence[Mapping[str, Any]], completion: int | None, most: int | None) -> Iterator[str]:
    """Over the samples of a request together."""
    if completion is None or most is None:
        return
    full = sum(choice.get("finish_reason") == "length" for choice in choices)
    if completion > most * len(choices):
        yield f"{completion} tokens came in {len(choices)} choices, at most {most} each were asked for"
    if completion < most * full:
        yield f"{full} choices end by length at {most} tokens each, completion_tokens is {completion}"
    if full == len(choices) and completion != most * full:
        yield f"all choices end by length at {most} tokens, completion_tokens is {completion}"
