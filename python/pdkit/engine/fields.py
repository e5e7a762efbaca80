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
ZERO = (0,)
EMPTY_TEXT = (None, "")
EMPTY_LIST: tuple[Any, ...] = (None, [])
EMPTY_MAP: tuple[Any, ...] = (None, {})
UNSET_OR_ZERO = (None, 0)
UNSET_OR_ONE = (None, 1)


def _all(neutral: tuple[Any, ...], *names: str) -> dict[str, tuple[Any, ...]]:
    """Fields with the same neutral values."""
    return dict.fromkeys(names, neutral)


# `sampling_params` of /generate (SGLang's SamplingParams). null is the default of each.
SAMPLING = Fields(
    {"stop_regex": EMPTY_LIST, "spaces_between_special_tokens": (None, True)}
    | _all(UNSET_OR_ZERO, "min_p", "frequency_penalty", "presence_penalty", "min_new_tokens")
    | _all(UNSET_OR_ONE, "repetition_penalty", "beam_width", "stream_interval")
    | _all(EMPTY_TEXT, "json_schema", "regex", "ebnf", "structural_tag")
    | _all(EMPTY_MAP, "logit_bias", "custom_params", "watermark")
)

# What asks for more than text, or belongs to a part of SGLang that this engine does not have. By endpoint, because
# SGLang's models differ in which of these may be null.
_MEDIA = (
    _all(UNSET, "max_dynamic_patch", "min_dynamic_patch", "images_config", "video_config")
    | {"use_audio_in_video": OFF, "mm_processor_kwargs": EMPTY_MAP}
)  # fmt: skip
_GENERATE_MEDIA = (
    _MEDIA
    | _all(EMPTY_LIST, "image_data", "video_data", "audio_data", "modalities")
    | _all(UNSET, "input_embeds", "mm_hashes", "mm_content_hashes", "image_max_dynamic_patch", "video_max_dynamic_patch",
           "need_wait_for_mm_inputs", "num_items_assigned", "encoder_urls")
)  # fmt: skip
_ANY_ENDPOINT = (
    {"routed_experts_start_len": ZERO, "lora_path": (None, "", []), "cache_salt": EMPTY_TEXT}
    | _all(OFF, "return_hidden_states", "return_routed_experts")
    | _all(UNSET_OR_ZERO, "routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank")
    | _all(EMPTY_MAP, "session_params", "watermark")
    | {"custom_logit_processor": UNSET}
)  # fmt: skip

GENERATE = Fields(
    _GENERATE_MEDIA
    | _ANY_ENDPOINT
    | {"token_ids_logprob": EMPTY_LIST, "return_sampling_mask": (None, False), "kv_hints": EMPTY_MAP}
    | _all(OFF, "return_flat_raw_top_logprobs", "return_flat_raw_output_top_logprobs", "return_flat_raw_top_logprobs_b64",
           "return_indexer_topk", "return_bytes", "return_entropy", "return_prompt_token_ids", "background",
           "require_reasoning")
    | _all(UNSET, "sampling_logprobs_mode", "lora_id", "positional_embed_overrides", "http_worker_ipc",
           "max_thinking_tokens", "multi_item_delimiter_indices", "token_indices_to_pool"),
    media=frozenset(_GENERATE_MEDIA),
)  # fmt: skip

_OPENAI = (
    _ANY_ENDPOINT
    | {"stop_regex": EMPTY_LIST, "response_format": (None, {"type": "text"})}
    | _all(ZERO, "frequency_penalty", "presence_penalty", "min_tokens")
    | _all(EMPTY_MAP, "logit_bias", "custom_params")
    | _all(EMPTY_TEXT, "regex", "ebnf")
    | _all(OFF, "return_cached_tokens_details", "return_spec_tokens_details", "return_token_ids")
)
_COMPLETION_MEDIA = {name: _MEDIA[name] for name in ("images_config", "mm_processor_kwargs")}

COMPLETION = Fields(
    _OPENAI | _COMPLETION_MEDIA | {"min_p": ZERO, "repetition_penalty": (1,), "json_schema": EMPTY_TEXT},
    media=frozenset(_COMPLETION_MEDIA),
)

CHAT = Fields(
    _OPENAI
    | _MEDIA
    | {"min_p": UNSET_OR_ZERO, "repetition_penalty": UNSET_OR_ONE, "tools": EMPTY_LIST}
    | {"tool_choice": (None, "auto", "none"), "chat_template_kwargs": EMPTY_MAP}
    | {"reasoning": EMPTY_MAP}  # not a field of SGLang's model, but read by it
    | _all(OFF, "return_prompt_token_ids", "return_input_ids_in_sglext", "return_output_ids_in_sglext",
           "return_sampling_mask", "return_flat_raw_output_top_logprobs", "continue_final_message")
    | _all(UNSET, "sampling_logprobs_mode", "reasoning_effort", "thinking", "task", "input_ids"),
    media=frozenset(_MEDIA),
)  # fmt: skip

# A message of a chat.
MESSAGE = Fields(
    {"phase": UNSET, "reasoning_content": EMPTY_TEXT, "prefix": (None, False)} | _all(EMPTY_LIST, "tool_calls", "tools")
)
STREAM_OPTIONS = Fields({"continuous_usage_stats": (None, False)})


class Body(BaseModel):
    """A request's JSON object. Its own fields are served; `others` says what the rest of SGLang's model is here.

    Fields that SGLang does not know are ignored, as it ignores them.
    """

    model_config = ConfigDict(extra="allow")
    others: ClassVar[Fields] = Fields()

    def refuse_unsupported(self, prefix: str = "") -> None:
        """Raises BadRequest for a field that this engine would have to ignore."""
        self.others.refuse(self.model_extra or {}, prefix)
