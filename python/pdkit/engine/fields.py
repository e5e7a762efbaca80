"""The fields of SGLang's requests that this engine refuses, unless their value is neutral: it asks for nothing.

One `Fields` for each of SGLang's request models. The fields that are served are those of the models in `api` and
`openai_api`, and of `request.SamplingParams`. `test_engine_fields.py` compares both with the installed SGLang: each of
its fields is in exactly one of them, and nothing that SGLang refuses is accepted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class BadRequest(ValueError):
    """A request that cannot be served as asked; answered with status 400. `field`: the one to blame, if it is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


# Where a refused field is served. `--on` takes these names.
SGLANG_CPU = "the target sglang-cpu runs SGLang itself, which has it"
NO_TARGET = "no target has it, since DeepSeek-V4 reads text only"


@dataclass(frozen=True)
class Fields:
    """neutral: {field that is not served: the values that ask for nothing}; media: those that no text model has."""

    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    media: frozenset[str] = frozenset()

    def refuse(self, given: Mapping[str, Any], prefix: str = "") -> None:
        """Raises BadRequest for the first field of `given` that this engine would have to ignore."""
        for name, value in given.items():
            if name in self.neutral and not any(_is(value, each) for each in self.neutral[name]):
                where = NO_TARGET if name in self.media else SGLANG_CPU
                raise BadRequest(
                    f"the embedded engine does not support {prefix}{name}={_short(value)}; {where}", prefix + name
                )


def _is(value: Any, neutral: Any) -> bool:
    """Equal, where true is not 1, and false not 0."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


UNSET = (None,)
OFF = (False,)
EMPTY_TEXT = (None, "")
EMPTY_LIST: tuple[Any, ...] = (None, [])
EMPTY_MAP: tuple[Any, ...] = (None, {})
ONE_RANK = (None, 0)

# `sampling_params` of /generate (SGLang's SamplingParams). null is the default of each.
SAMPLING = Fields(
    neutral={
        "stop_regex": EMPTY_LIST,
        "min_p": (None, 0),
        "frequency_penalty": (None, 0),
        "presence_penalty": (None, 0),
        "repetition_penalty": (None, 1),
        "min_new_tokens": (None, 0),
        "beam_width": (None, 1),
        "json_schema": EMPTY_TEXT,
        "regex": EMPTY_TEXT,
        "ebnf": EMPTY_TEXT,
        "structural_tag": EMPTY_TEXT,
        "spaces_between_special_tokens": (None, True),
        "stream_interval": (None, 1),
        "logit_bias": EMPTY_MAP,
        "custom_params": EMPTY_MAP,
        "watermark": EMPTY_MAP,
    },
)

# What asks for more than text, or belongs to a part of SGLang that this engine does not have. By endpoint, because
# SGLang's models differ in which of these may be null.
_MEDIA = {
    "max_dynamic_patch": UNSET,
    "min_dynamic_patch": UNSET,
    "use_audio_in_video": OFF,
    "images_config": UNSET,
    "video_config": UNSET,
    "mm_processor_kwargs": EMPTY_MAP,
}
_GENERATE_MEDIA = _MEDIA | {
    "input_embeds": UNSET,
    "image_data": EMPTY_LIST,
    "video_data": EMPTY_LIST,
    "audio_data": EMPTY_LIST,
    "mm_hashes": UNSET,
    "mm_content_hashes": UNSET,
    "modalities": EMPTY_LIST,
    "image_max_dynamic_patch": UNSET,
    "video_max_dynamic_patch": UNSET,
    "need_wait_for_mm_inputs": UNSET,
    "num_items_assigned": UNSET,
    "encoder_urls": UNSET,
}

GENERATE = Fields(
    neutral=_GENERATE_MEDIA | {
        "watermark": EMPTY_MAP,
        "token_ids_logprob": EMPTY_LIST,
        "return_sampling_mask": (None, False),
        "sampling_logprobs_mode": UNSET,
        "return_flat_raw_top_logprobs": OFF,
        "return_flat_raw_output_top_logprobs": OFF,
        "return_flat_raw_top_logprobs_b64": OFF,
        "return_hidden_states": OFF,
        "return_routed_experts": OFF,
        "routed_experts_start_len": (0,),
        "return_indexer_topk": OFF,
        "return_bytes": OFF,
        "return_entropy": OFF,
        "return_prompt_token_ids": OFF,
        "session_params": EMPTY_MAP,
        "lora_path": (None, "", []),
        "lora_id": UNSET,
        "custom_logit_processor": UNSET,
        "positional_embed_overrides": UNSET,
        "routed_dp_rank": ONE_RANK,
        "data_parallel_rank": ONE_RANK,
        "disagg_prefill_dp_rank": ONE_RANK,
        "http_worker_ipc": UNSET,
        "background": OFF,
        "require_reasoning": OFF,
        "max_thinking_tokens": UNSET,
        "multi_item_delimiter_indices": UNSET,
        "token_indices_to_pool": UNSET,
        "cache_salt": EMPTY_TEXT,
        "kv_hints": EMPTY_MAP,
    },
    media=frozenset(_GENERATE_MEDIA),
)  # fmt: skip

_OPENAI = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": EMPTY_MAP,
    "min_tokens": (0,),
    "regex": EMPTY_TEXT,
    "ebnf": EMPTY_TEXT,
    "stop_regex": EMPTY_LIST,
    "response_format": (None, {"type": "text"}),
    "return_hidden_states": OFF,
    "return_routed_experts": OFF,
    "routed_experts_start_len": (0,),
    "return_cached_tokens_details": OFF,
    "return_spec_tokens_details": OFF,
    "return_token_ids": OFF,
    "lora_path": (None, "", []),
    "session_params": EMPTY_MAP,
    "custom_params": EMPTY_MAP,
    "custom_logit_processor": UNSET,
    "watermark": EMPTY_MAP,
    "cache_salt": EMPTY_TEXT,
    "routed_dp_rank": ONE_RANK,
    "data_parallel_rank": ONE_RANK,
    "disagg_prefill_dp_rank": ONE_RANK,
}
_COMPLETION_MEDIA = {name: _MEDIA[name] for name in ("images_config", "mm_processor_kwargs")}

COMPLETION = Fields(
    neutral=_OPENAI | _COMPLETION_MEDIA | {
        "min_p": (0,),
        "repetition_penalty": (1,),
        "json_schema": EMPTY_TEXT,
    },
    media=frozenset(_COMPLETION_MEDIA),
)  # fmt: skip

CHAT = Fields(
    neutral=_OPENAI | _MEDIA | {
        "min_p": (None, 0),
        "repetition_penalty": (None, 1),
        "tools": EMPTY_LIST,
        "tool_choice": (None, "auto", "none"),
        "return_prompt_token_ids": OFF,
        "return_input_ids_in_sglext": OFF,
        "return_output_ids_in_sglext": OFF,
        "return_sampling_mask": OFF,
        "sampling_logprobs_mode": UNSET,
        "return_flat_raw_output_top_logprobs": OFF,
        "reasoning": EMPTY_MAP,  # not a field of SGLang's model, but read by it
        "reasoning_effort": UNSET,
        "thinking": UNSET,
        "task": UNSET,
        "continue_final_message": OFF,
        "chat_template_kwargs": EMPTY_MAP,
        "input_ids": UNSET,
    },
    media=frozenset(_MEDIA),
)  # fmt: skip

# A message of a chat.
MESSAGE = Fields(
    neutral={
        "phase": UNSET,
        "reasoning_content": EMPTY_TEXT,
        "tool_calls": EMPTY_LIST,
        "tools": EMPTY_LIST,
        "prefix": (None, False),
    },
)
STREAM_OPTIONS = Fields(neutral={"continuous_usage_stats": (None, False)})


class Body(BaseModel):
    """A request's JSON object. Its own fields are served; `others` says what the rest of SGLang's model is here.

    Fields that SGLang does not know are ignored, as it ignores them.
    """

    model_config = ConfigDict(extra="allow")
    others: ClassVar[Fields] = Fields()

    def refuse_unsupported(self, prefix: str = "") -> None:
        """Raises BadRequest for a field that this engine would have to ignore."""
        self.others.refuse(self.model_extra or {}, prefix)
