"""What a faulty load balancer does to the JSON of requests and answers."""

import asyncio

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

    def __init__(self):
        self._waiting = None

    async def swap(self, own):
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


def without(body, names):
    """A request body in which the sampling parameters `names` are not set."""
    body = {name: value for name, value in body.items() if name not in names}
    params = body.get("sampling_params")
    if isinstance(params, list):
        body["sampling_params"] = [{name: each[name] for name in each if name not in names} for each in params]
    elif params:
        body["sampling_params"] = {name: params[name] for name in params if name not in names}
    return body


def first_token_repeated(result, first_text):
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
