"""What SGLang takes for granted of a GPU beside kernels: events, a platform, dtypes, a tokenizer's special tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdkit.deployment.cpu.registry import remakes, replaces


@replaces("torch.cuda:Event", family="any")
class Event:
    """no streams here: what was recorded has happened; prefill asks before it sends a cached prefix early"""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    wait = synchronize = record

    def query(self) -> bool:
        return True


@replaces("torch.cuda:synchronize", family="any")
def synchronize(device: Any = None) -> None:
    """called when a draft model gets its embeddings"""


@remakes("sglang.srt.models.deepseek_v4:get_rope_wrapper")
def rope_wrapper(_: Any) -> Any:
    """made for NPUs, and never called elsewhere"""
    return lambda *arguments, **options: None


@remakes("sglang.srt.mem_cache.kv_cache_configurator:current_platform", wraps=True)
def platform(original: Any) -> Any:
    """an fp8 pool is refused on CPU, but the pools of DeepSeek-V4 are bytes"""

    class Platform:
        def __getattr__(self, name: str) -> Any:
            return getattr(original, name)

        def is_cpu(self) -> bool:
            return False

    return Platform()


@remakes("sglang.srt.model_executor.model_runner:adjust_config_with_unaligned_cpu_tp")
def head_counts(_: Any) -> Any:
    """on CPU two KV heads of DeepSeek-V4 would be made of one"""
    return lambda config, *arguments: config


@remakes("sglang.srt.model_executor.model_runner:ModelRunner.load_model", wraps=True)
def load_model(original: Any) -> Any:
    """with --dtype float32, parameters that SGLang makes in bfloat16 whatever the dtype"""

    def load_and_widen(self: Any, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        if self.model_config.dtype == torch.float32:
            for parameter in self.model.parameters():
                if parameter.dtype == torch.bfloat16:
                    parameter.data = parameter.data.float()
        return result

    return load_and_widen


@remakes("sglang.srt.distributed.parallel_state:inplace_all_reduce", family="any")
def all_reduce(_: Any) -> Any:
    """the custom operator is registered for CUDA only"""

    def inplace_all_reduce(tensor: Tensor, group_name: str) -> None:
        from sglang.srt.distributed import parallel_state

        parallel_state._groups[group_name]()._all_reduce_in_place(tensor)

    return inplace_all_reduce


@remakes("sglang.srt.entrypoints.openai.chat_encoding_adapters:_BUILDERS", wraps=True)
def chat_encoders(builders: dict[str, Any]) -> dict[str, Any]:
    """the small tokenizer lacks DeepSeek's special tokens, which its chat encoder asks for at start-up"""
    return {**builders, "dsv4": {"builtin": lambda context: None}}
