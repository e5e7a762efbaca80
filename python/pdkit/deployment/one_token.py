"""Does a server still work? Each is asked for a token by itself, past the load balancer."""

import contextlib
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

PROBE_IDS = (11, 12, 13)
PROBE_TOKENS = 2  # the first is prefill's, the second decode's


def one_token(url: str, timeout: float) -> str | None:
    """What is wrong with a server that is asked for one token; None where it answers, or has no such endpoint."""
    try:
        status = requests.get(f"{url}/health_generate", timeout=timeout).status_code
    except requests.Timeout:
        return f"does not answer /health_generate within {timeout:g} s"
    except requests.RequestException as error:
        return f"does not answer /health_generate ({type(error).__name__})"
    return f"answers /health_generate with status {status}" if status >= 500 else None


def silent_half(urls: Mapping[str, str], host: str, port: int, timeout: float) -> tuple[str, str] | None:
    """(name, what is wrong) of the half of a pair that computes nothing although it is healthy; None if none is.

    urls     of "prefill" and "decode"
    host, port  of prefill's bootstrap server
    timeout  seconds for one request of a few tokens that nobody else waits for

    The same request goes to both, as a load balancer sends it. Only silence counts: an answer of any status is one.
    """
    before = _prefilled(urls["prefill"], timeout)
    answered = _answered(urls, host, port, timeout)
    if answered["decode"]:
        return None
    if answered["prefill"]:
        return "decode", f"answers no request within {timeout:g} s, though prefill does and its /health is 200"
    after = _prefilled(urls["prefill"], timeout)
    if before is not None and after is not None and after > before:
        return "decode", f"fetches nothing from prefill within {timeout:g} s, though its /health is 200"
    return "prefill", f"answers no request within {timeout:g} s, though its /health is 200, and decode waits for it"


def _answered(urls: Mapping[str, str], host: str, port: int, timeout: float) -> dict[str, bool]:
    sampling = {"temperature": 0, "max_new_tokens": PROBE_TOKENS, "ignore_eos": True}
    body = {
        "input_ids": list(PROBE_IDS),
        "sampling_params": sampling,
        "bootstrap_host": host,
        "bootstrap_port": port,
        "bootstrap_room": random.getrandbits(62),
    }

    def ask(url: str) -> bool:
        with contextlib.suppress(requests.RequestException):  # one that is gone is found in other ways
            try:
                requests.post(f"{url}/generate", json=body, timeout=timeout)
            except requests.Timeout:
                return False
        return True

    with ThreadPoolExecutor(len(urls)) as pool:
        return dict(zip(urls, pool.map(ask, urls.values())))


def _prefilled(url: str, timeout: float) -> int | None:
    """Tokens that a server has prefilled, as far as it counts them."""
    with contextlib.suppress(requests.RequestException, ValueError, KeyError, TypeError):
        info: Any = requests.get(f"{url}/server_info", timeout=timeout).json()
        return int(info["engine"]["prefill_tokens"])
    return None
