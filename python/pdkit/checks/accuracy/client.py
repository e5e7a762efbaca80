"""A light client that scores GSM8K as SGLang's `run_eval` does with its completion API, and needs HTTP only."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from pdkit.checks.http import RequestFailed, post_or_fail, session_of
from pdkit.core.gsm8k import prompts_of, read_dataset

STOP = ("Question", "Assistant:", "<|separator|>")
GIVES_UP_AFTER = 5
_NUMBER = re.compile(r"-?\d+(?:\.\d*)?")


def last_number(text: str) -> float | None:
    """The last number in `text`, whose commas are not read; None without one."""
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def run(args: SimpleNamespace) -> dict[str, Any]:
    """Scores rows as `run_eval(args)` would; see `gsm8k_args`. A question is asked once, never again.

    Returns score (share of right answers), outcomes (which ones), output_throughput (tokens per second). Raises
    RequestFailed where a question got no answer: what was not answered is not scored as wrong.
    """
    data = read_dataset(args.gsm8k_data_path, args.num_shots)
    prompts = prompts_of(data, args.num_examples)
    gold = [last_number(json.loads(line)["answer"]) for line in data.rows[: args.num_examples]]
    failures: list[RequestFailed] = []
    enough = threading.Event()
    body = {"model": args.model, "temperature": 0, "top_p": 1.0, "max_tokens": args.max_tokens, "stop": list(STOP)}

    def ask(prompt: str) -> tuple[str, int] | None:
        if enough.is_set():
            return None
        try:
            answer = post_or_fail(args.base_url, "/v1/completions", body | {"prompt": prompt}, args.timeout, session)
            content = answer.json()
            return content["choices"][0]["text"] or "", content["usage"]["completion_tokens"]
        except RequestFailed as failure:
            failures.append(failure)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            failures.append(RequestFailed(f"not an answer of /v1/completions ({error!r})"))
        if len(failures) >= GIVES_UP_AFTER:
            enough.set()
        return None

    began = time.monotonic()
    with session_of(args.num_threads) as session, ThreadPoolExecutor(args.num_threads) as pool:
        answers = list(pool.map(ask, prompts))
    if failures:
        raise RequestFailed(f"{len(failures)} of {len(prompts)} questions got no answer, the first: {failures[0]}")
    found = [answer for answer in answers if answer is not None]
    outcomes = tuple(last_number(text) == right for (text, _), right in zip(found, gold, strict=True))
    tokens = sum(count for _, count in found)
    seconds = time.monotonic() - began
    return {"score": sum(outcomes) / len(outcomes), "outcomes": outcomes, "output_throughput": tokens / seconds}
