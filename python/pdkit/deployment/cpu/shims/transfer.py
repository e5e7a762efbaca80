"""The transfer backends themselves are real; they are only told that the KV pools are host memory, and to leave a core."""

from __future__ import annotations

import functools
from typing import Any

from pdkit.deployment.cpu.registry import remakes

PAUSE_US = 100


@remakes("sglang.srt.disaggregation.mooncake.conn:MooncakeKVSender.supports_host_tensor_indices", family="any")
def host_indices(_: Any) -> bool:
    """page indices would be built in pinned memory behind a CUDA event"""
    return False


def as_host_memory(method: Any) -> Any:
    """`method` of NIXL's agent, which reads "DRAM" where SGLang says "VRAM"."""

    def host(value: Any) -> Any:
        return "DRAM" if isinstance(value, str) and value == "VRAM" else value

    @functools.wraps(method)
    def wrapper(self: Any, *arguments: Any, **options: Any) -> Any:
        return method(self, *map(host, arguments), **{name: host(value) for name, value in options.items()})

    return wrapper


def with_pauses(config: Any) -> Any:
    """NIXL's configuration of an agent, whose progress thread looks for work again after PAUSE_US at the earliest."""

    class WithPauses(config):
        @property
        def pthrDelay(self) -> int:
            return int(config.pthrDelay.__get__(self))

        @pthrDelay.setter
        def pthrDelay(self, delay: int) -> None:
            config.pthrDelay.__set__(self, max(delay, PAUSE_US))

    return WithPauses


@remakes("nixl._api:nixlBind.nixlAgentConfig", family="nixl", wraps=True)
def _with_pauses(config: Any) -> Any:
    """NIXL's progress thread: it looks for work without a pause, on a core of its own for each server"""
    return with_pauses(config)


for _name in ("register_memory", "get_reg_descs", "get_xfer_descs", "prep_xfer_dlist"):

    @remakes(f"nixl._api:nixl_agent.{_name}", family="nixl", wraps=True)
    def _host_memory(method: Any) -> Any:
        """memory type: SGLang calls the KV pool's memory VRAM whatever the device, and UCX refuses"""
        return as_host_memory(method)
