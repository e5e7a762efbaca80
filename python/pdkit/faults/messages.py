"""What a faulty load balancer does to the JSON of requests and answers."""

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

PARTNER_TIMEOUT_S = 0.3
LOST = {
    "temperature-lost": ("temperature",),
    "seed-lost": ("sampling_seed", "seed"),
    "top-p-lost": ("top_p",),
    "stop-lost": ("stop",),
    "sampling-lost": ("temperature", "top_p", "top_k", "stop", "sampling_seed", "seed", "max_new_tokens", "max_tokens"),
}


class Exchange:
    """Two requests that are on their way at the same time get what the other one brought; one alone keeps its own."""

    def __init__(self) -> None:
        self._waiting: tuple[Any, asyncio.Future[Any]] | None = None

    async def swap(self, own: Any) -> Any:
        if self._waiting is not None:
            other, future = self._waiting
            self._waiting = None
            future.set_result(own)
            return other
        future = asyncio.get_running_loop().create_future()
        self._waiting = own, future
        done, _ = await asyncio.wait({future}, timeout=PARTNER_TIMEOUT_S)
        if done:
            return future.result()
        self._waiting = None
        return own


def without(body: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A request body in which the sampling parameters `names` are not set."""
    body = {name: value for name, value in body.items() if name not in names}
    params = body.get("sampling_params")
    if isinstance(params, list):
        body["sampling_params"] = [{name: each[name] for name in each if name not in names} for each in params]
    elif params:
        body["sampling_params"] = {name: params[name] for name in params if name not in names}
    return body


def first_token_repeated(result: Any, first_text: Callable[[str], str]) -> Any:
    """An answer of /generate, or of /v1/completions, that begins with its first token twice."""
    if isinstance(result, list):
        return [first_token_repeated(each, first_text) for each in result]
    result = dict(result)
    if result.get("text"):
        result["text"] = first_text(result["text"]) + result["text"]
    if result.get("output_ids"):
        result["output_ids"] = result["output_ids"][:1] + result["output_ids"]
    if logprobs := result.get("meta_info", {}).get("output_token_logprobs"):
        result["meta_info"] = result["meta_info"] | {"output_token_logprobs": logprobs[:1] + logprobs}
    if "choices" in result:
        result["choices"] = [
            choice | {"text": first_text(choice["text"]) + choice["text"]} if choice.get("text") else choice
            for choice in result["choices"]
        ]
    return result


BESIDE = {
    "logprobs": ("return_logprob", "logprobs"),
    "seed": ("sampling_seed", "seed"),
    "stop": ("stop", "stop_token_ids"),
    "top-k": ("top_k",),
}


def asks_for(body: Mapping[str, Any], parameter: str) -> bool:
    """Whether a request sets one of the parameters that `parameter` stands for in BESIDE."""
    params: Any = body.get("sampling_params") or {}
    params = params[0] if isinstance(params, list) and params else params
    return any(name in body or name in params for name in BESIDE[parameter] if {**body, **params}.get(name))


def of_each(result: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """`change` of an answer of /generate or of OpenAI's, or of each of a batch; errors stay as they are."""
    if isinstance(result, list):
        return [of_each(each, change) for each in result]
    return change(json.loads(json.dumps(result))) if "meta_info" in result or "choices" in result else result


def _usage_one_more(answer: dict[str, Any]) -> dict[str, Any]:
    counts = answer.get("meta_info") or answer["usage"]
    counts["completion_tokens"] += 1
    return answer


def _cached_beyond_prompt(answer: dict[str, Any]) -> dict[str, Any]:
    if "meta_info" in answer:
        answer["meta_info"]["cached_tokens"] = answer["meta_info"]["prompt_tokens"] + 1
    else:
        answer["usage"]["prompt_tokens_details"] = {"cached_tokens": answer["usage"]["prompt_tokens"] + 1}
    return answer


def _reason_exchanged(answer: dict[str, Any]) -> dict[str, Any]:
    def other(reason: str) -> str:
        return {"length": "stop", "stop": "length"}.get(reason, reason)

    if "meta_info" in answer:
        reason = answer["meta_info"]["finish_reason"]
        answer["meta_info"]["finish_reason"] = reason and {**reason, "type": other(reason["type"])}
    for choice in answer.get("choices", ()):
        choice["finish_reason"] = other(choice["finish_reason"])
    return answer


def _token_after_the_end(answer: dict[str, Any]) -> dict[str, Any]:
    if answer.get("output_ids"):
        answer["output_ids"].append(answer["output_ids"][-1])
    for choice in answer.get("choices", ()):
        if choice.get("text"):
            choice["text"] += choice["text"][-1]
    return answer


def _logprobs_one_less(answer: dict[str, Any]) -> dict[str, Any]:
    for row in [answer.get("meta_info", {}), *(choice.get("logprobs") or {} for choice in answer.get("choices", ()))]:
        for name in ("output_token_logprobs", "token_logprobs"):
            if row.get(name):
                row[name].pop()
    return answer


CONTRADICTIONS: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "usage-one-more": _usage_one_more,
    "cached-beyond-prompt": _cached_beyond_prompt,
    "reason-exchanged": _reason_exchanged,
    "token-after-the-end": _token_after_the_end,
    "logprobs-one-less": _logprobs_one_less,
}
"""What contradicts itself in an answer, by name."""
