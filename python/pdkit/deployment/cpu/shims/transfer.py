"""The transfer backends themselves are real; they are only told that the KV pools are host memory."""

from __future__ import annotations

import functools
from typing import Any

from pdkit.deployment.cpu.registry import remakes


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


for _name in ("register_memory", "get_reg_descs", "get_xfer_descs", "prep_xfer_dlist"):

    @remakes(f"nixl._api:nixl_agent.{_name}", family="nixl", wraps=True)
    def _host_memory(method: Any) -> Any:
        """memory type: SGLang calls the KV pool's memory VRAM whatever the device, and UCX refuses"""
        return as_host_memory(method)
