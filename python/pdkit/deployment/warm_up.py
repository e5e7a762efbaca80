"""Before an eval is timed on GPUs: rounds of requests until no round is slowed by kernels that are being compiled.

From a cold start SGLang compiles kernels for minutes, and goes on when requests of new sizes arrive: an eval that
meets this measures the compiler, and may run into its time limit.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import requests

# Of two passes the shorter takes more than this share of the longer: nothing of weight was compiled.
SETTLED = 0.7
MOST_PASSES = 5
QUESTION = "Question: What is {} + {}?\nAnswer:"


def until_settled(one_pass: Callable[[], float]) -> list[float]:
    """The seconds of each pass, until two in a row took about as long; at most MOST_PASSES."""
    seconds = [one_pass()]
    while len(seconds) < MOST_PASSES and (len(seconds) < 2 or min(seconds[-2:]) < SETTLED * max(seconds[-2:])):
        seconds.append(one_pass())
    return seconds


def batches(threads: int) -> list[list[str]]:
    """Prompts of a pass, those of a batch to be sent at once: 1, 2, 4, ... `threads`, of one to 40 questions each."""
    sizes = [2**power for power in range(threads.bit_length()) if 2**power < threads] + [threads]
    questions = [QUESTION.format(number, 2 * number) for number in range(1, 41)]
    return [["\n".join(questions[: 1 + (7 * number + size) % 40]) for number in range(size)] for size in sizes]


def key_header() -> dict[str, str]:
    """What an eval's client sends: the key of the environment."""
    return {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY')}"}


def send(url: str, model: str | None, prompts: Sequence[Sequence[str]], timeout: float) -> float:
    """The seconds of one pass. Raises requests.RequestException."""
    begin = time.monotonic()
    headers = key_header()

    def ask(prompt: str) -> None:
        body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0}
        requests.post(f"{url}/v1/completions", json=body, headers=headers, timeout=timeout).raise_for_status()

    with ThreadPoolExecutor(max(map(len, prompts))) as pool:
        for batch in prompts:
            list(pool.map(ask, batch))
    return time.monotonic() - begin
