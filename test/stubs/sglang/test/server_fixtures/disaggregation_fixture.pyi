"""SGLang's PD fixture as mypy sees it: the names on which pdkit.deployment stands. SGLang has no types of its own."""

import subprocess
import unittest
from collections.abc import Callable, Sequence
from typing import Any

class PDDisaggregationServerBase(unittest.TestCase):
    base_host: str
    base_url: str
    lb_port: str
    transfer_backend: list[str]
    rdma_devices: list[str]
    extra_prefill_args: Sequence[str]
    extra_decode_args: Sequence[str]
    @classmethod
    def start_prefill(cls) -> None: ...
    @classmethod
    def start_decode(cls) -> None: ...
    @classmethod
    def launch_lb(cls) -> None: ...
    @classmethod
    def rdma_devices_for(cls, gpu_indices: Sequence[int]) -> list[str]: ...
    @classmethod
    def wait_server_ready(cls, url: str, timeout: float = ..., process: subprocess.Popen[str] | None = ...) -> None: ...
    # unittest's own, which it does not document
    def _callSetUp(self) -> None: ...
    def _callTestMethod(self, method: Callable[[], None]) -> None: ...
    def _callTearDown(self) -> None: ...
    def _callCleanup(self, function: Callable[..., object], /, *args: Any, **kwargs: Any) -> None: ...
