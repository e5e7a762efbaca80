"""What a server tells of itself."""

from collections.abc import Mapping
from typing import Any

import requests


class ServerInfoError(RuntimeError):
    """A server does not tell; one line says which, and why."""


def read_server_info(url: str, timeout: float = 30) -> Mapping[str, Any]:
    """What the server at `url` answers to `/server_info` within `timeout` seconds. Raises ServerInfoError."""
    try:
        answer = requests.get(f"{url}/server_info", timeout=timeout)
        answer.raise_for_status()
        return answer.json()
    except (requests.RequestException, ValueError) as error:
        raise ServerInfoError(f"{url} does not tell its /server_info: {error}") from None


def data_parallel_ranks(info: Mapping[str, Any]) -> int:
    """How many ranks share the requests of a server that reports `info`; with DP attention 0.5.23 has a name for them."""
    return info.get("dp_size", 1) * (info.get("attn_dp_size") or 1)
