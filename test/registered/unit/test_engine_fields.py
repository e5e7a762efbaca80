"""The engine's fields against the request models of the installed SGLang: each in one class, and none accepted wrongly."""

import dataclasses
import json
import re
import unittest
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from pdkit.core.ci_register import register_cpu_ci
from pdkit.engine import fields
from pdkit.engine.api import GenerateBody
from pdkit.engine.fields import BadRequest
from pdkit.engine.openai_api import ROLES, ChatBody, CompletionBody, Message, StreamOptions
from pdkit.engine.request import SamplingParams
from pydantic import TypeAdapter, ValidationError
from sglang.api.v1 import api_types
from sglang.srt.entrypoints.api_contract import generate_contract_error
from sglang.srt.entrypoints.openai import protocol
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams as SGLangSamplingParams

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

msgspec = api_types.msgspec  # a requirement of SGLang's, not of this project
VOCABULARY = 520
NAMED = r"\Athe embedded engine does not support {}{}=.*; (the target sglang-cpu runs|no target has it)"
PROBES = (
    None, True, False, 0, 1, 2, -1, 0.5, 1e9, "", "a", "auto", "low", [], [None], [0], ["a"], [[0]], [True], {}, {"1": 1},
    {"1": "a"}, {"type": "text"}, {"type": "json_object"}, [{"type": "function", "function": {"name": "f"}}],
    [{"function": {"name": "f", "arguments": "{}"}}],
)  # fmt: skip
# SGLang 0.5.23 fails with status 500 where n is null: `None > 1` in GenerateReqInput._handle_parallel_sampling.
ACCEPTED_HERE_ALONE = {("sampling_params.n", "null")}

GENERATE_REQUEST = TypeAdapter(GenerateReqInput)
tokenizer = SimpleNamespace(encode=lambda text, **_: list(text.encode()))


def sglang_generates(body):
    """As `/generate` of SGLang looks at a body before it tokenizes it. Raises whatever makes it refuse."""
    if error := generate_contract_error(body):
        raise ValueError(error)
    request = GENERATE_REQUEST.validate_python(body)
    request.normalize_batch_and_arguments()
    if request.lora_path or request.max_thinking_tokens is not None:
        raise ValueError("refused without a flag at start")
    given = request.sampling_params
    for each in given if isinstance(given, list) else [given]:
        params = SGLangSamplingParams(**each)
        params.normalize(tokenizer)
        params.verify(VOCABULARY)


class Model:
    """One request model of SGLang's beside the engine's table and class. `body`: what a request needs at least."""

    def __init__(self, name, sglang, ours, table, body, sglang_takes, takes, prefix=""):
        self.name, self.sglang, self.served, self.table, self.body = name, sglang, ours, table, body
        self.sglang_takes, self.takes, self.prefix = sglang_takes, takes, prefix

    def verdict(self, take, given):
        """None if `given` is accepted, otherwise the error."""
        try:
            take(json.loads(json.dumps(self.body | given)))
        except Exception as error:
            return error
        return None


def completion(body):
    parsed = CompletionBody.model_validate(body)
    parsed.check("random")
    parsed.asks(parsed.prompts(), parsed.is_batch, parsed.max_tokens)


def chat(body):
    parsed = ChatBody.model_validate(body)
    parsed.check("random")
    messages = [message.plain(place) for place, message in enumerate(parsed.messages)]
    parsed.asks([str(messages)], False, parsed.max_completion_tokens or parsed.max_tokens)


def in_chat(take):
    return lambda message: take({"messages": [message]})


def default_of(field):
    """A pydantic, dataclass or msgspec field's default, or MISSING."""
    if hasattr(field, "is_required"):
        return MISSING if field.is_required() else field.get_default(call_default_factory=True)
    default = getattr(field, "default", dataclasses.MISSING)
    return MISSING if default in (dataclasses.MISSING, msgspec.NODEFAULT) else default


MISSING = object()
COMPLETION_FIELDS = protocol.CompletionRequest.model_fields
CHAT_FIELDS = protocol.ChatCompletionRequest.model_fields
MESSAGE_FIELDS = protocol.ChatCompletionMessageGenericParam.model_fields
WIRE = {field.name for field in msgspec.structs.fields(api_types.SamplingParams)}
SAY = {"role": "assistant", "content": "1"}
MODELS = (
    Model(
        "/generate", {field.name: field for field in dataclasses.fields(GenerateReqInput)}, GenerateBody.model_fields,
        fields.GENERATE, {"text": "1"}, sglang_generates, lambda body: GenerateBody.model_validate(body).asks(),
    ),
    Model(
        "sampling_params",
        {each.name: each for each in msgspec.structs.fields(SGLangSamplingParams) if each.name in WIRE},
        {field.name for field in dataclasses.fields(SamplingParams)}, fields.SAMPLING, {},
        lambda params: sglang_generates({"text": "1", "sampling_params": params}), SamplingParams.parse,
    ),
    Model(
        "/v1/completions", COMPLETION_FIELDS, CompletionBody.model_fields, fields.COMPLETION, {"prompt": "1"},
        protocol.CompletionRequest.model_validate, completion,
    ),
    Model(
        "/v1/chat/completions", CHAT_FIELDS, ChatBody.model_fields, fields.CHAT, {"messages": [SAY]},
        protocol.ChatCompletionRequest.model_validate, chat,
    ),
    Model(
        "message", MESSAGE_FIELDS, Message.model_fields, fields.MESSAGE, SAY,
        in_chat(protocol.ChatCompletionRequest.model_validate), in_chat(chat), "messages.0.",
    ),
    Model(
        "stream_options", protocol.StreamOptions.model_fields, StreamOptions.model_fields, fields.STREAM_OPTIONS, {},
        lambda options: protocol.CompletionRequest.model_validate({"prompt": "1", "stream_options": options}),
        lambda options: completion({"prompt": "1", "stream_options": options}), "stream_options.",
    ),
)  # fmt: skip
ALSO_NEUTRAL = {
    "min_p": (0,), "repetition_penalty": (1,), "beam_width": (1,), "stream_interval": (1,),
    "return_sampling_mask": (False,), "prefix": (False,), "continuous_usage_stats": (False,), "response_format": ({"type": "text"},), "tool_choice": ("none",),
    **dict.fromkeys(("routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank"), (0,)),
}  # fmt: skip
NOT_DECLARED = {"/v1/chat/completions": {"reasoning"}}  # read by normalize_reasoning_inputs


class TestEveryField(unittest.TestCase):
    def test_each_field_of_sglang_is_in_exactly_one_class(self):
        for model in MODELS:
            with self.subTest(model=model.name):
                classes = Counter([*model.served, *model.table.neutral])
                self.assertEqual([name for name, number in classes.items() if number > 1], [])
                self.assertEqual(set(model.sglang) - set(classes), set(), "neither served nor in pdkit.engine.fields")
                gone = set(classes) - set(model.sglang) - NOT_DECLARED.get(model.name, set())
                self.assertEqual(gone, set(), "SGLang does not have it")
                self.assertLessEqual(model.table.media, set(model.table.neutral))

    def test_what_sglang_refuses_is_refused(self):
        for model in MODELS:
            for name in model.sglang:
                for value in PROBES:
                    if (f"{model.name}.{name}", json.dumps(value)) in ACCEPTED_HERE_ALONE:
                        continue
                    refusal = model.verdict(model.sglang_takes, {name: value})
                    if refusal is not None:
                        with self.subTest(model=model.name, field=name, value=value):
                            self.assertIsNotNone(model.verdict(model.takes, {name: value}), refusal)

    def test_what_is_not_served_is_a_bad_request_that_names_the_field_and_a_target(self):
        for model in MODELS:
            for name, neutral in model.table.neutral.items():
                wanted = [value for value in PROBES if not any(value == each for each in neutral)]
                for value in wanted:
                    error = model.verdict(model.takes, {name: value})
                    with self.subTest(model=model.name, field=name, value=value):
                        self.assertIsInstance(error, BadRequest)
                        self.assertRegex(str(error), NAMED.format(model.prefix, name))
                        self.assertEqual(error.field, model.prefix + name)

    def test_sglangs_defaults_are_accepted(self):
        """And so are the other neutral values, null among them, where SGLang accepts them."""
        for model in MODELS:
            for name, field in model.sglang.items():
                for value in (default_of(field), *model.table.neutral.get(name, ())):
                    if value is MISSING or model.verdict(model.sglang_takes, {name: value}) is not None:
                        continue
                    with self.subTest(model=model.name, field=name, value=value):
                        self.assertIsNone(model.verdict(model.takes, {name: value}))

    def test_neutral_values_are_sglangs_own(self):
        """SGLang accepts each of them, and each is SGLang's default or empty, but for a few."""
        for model in MODELS:
            for name, values in model.table.neutral.items():
                default = default_of(model.sglang[name]) if name in model.sglang else None
                for value in values:
                    with self.subTest(model=model.name, field=name, value=value):
                        self.assertIsNone(model.verdict(model.sglang_takes, {name: value}))
                        self.assertIn(value, (default, None, "", [], {}, *ALSO_NEUTRAL.get(name, ())))

    def test_fields_that_sglang_does_not_know_are_ignored_but_among_sampling_parameters(self):
        for model in MODELS:
            given = {"no_such_field": {"a": 1}}
            refused = [model.verdict(take, given) is not None for take in (model.sglang_takes, model.takes)]
            with self.subTest(model=model.name):
                self.assertEqual(refused, [model.name == "sampling_params"] * 2)


class TestMore(unittest.TestCase):
    def test_roles(self):
        self.assertEqual(set(ROLES), {"user", *protocol._GENERIC_MESSAGE_ROLES})
        self.assertEqual(Message(role="SYSTEM", content="1").role, "system")
        for message in ({"role": "boss", "content": "1"}, {"role": "user"}, {"role": "user", "content": None}):
            for take in (protocol.ChatCompletionRequest.model_validate, chat):
                with self.assertRaises(ValidationError):
                    take({"messages": [message]})

    def test_a_lora_adapter_behind_a_colon(self):
        with self.assertRaisesRegex(BadRequest, "LoRA adapter, as in model='base:adapter'; the target sglang-cpu"):
            completion({"prompt": "1", "model": "base:adapter"})
        served = CompletionBody(prompt="1", model="s3://models/nano")
        served.check("s3://models/nano")

    def test_the_page_about_it_names_each_refused_field(self):
        page = (Path(__file__).parents[3] / "docs" / "embedded-engine.md").read_text()
        rows = [line.split("|")[2:4] for line in page.splitlines() if line.startswith("| ") and "`" in line]
        for media in (False, True):
            of_target = (names for names, where in rows if ("none" in where) == media)
            told = {name for names in of_target for name in re.findall(r"`(\w+)`", names)}
            refused = {name for model in MODELS for name in model.table.neutral if (name in model.table.media) == media}
            self.assertEqual(told, refused)

    def test_a_long_value_is_named_briefly(self):
        with self.assertRaises(BadRequest) as caught:
            SamplingParams.parse({"regex": "a" * 10_000})
        self.assertLess(len(str(caught.exception)), 200)


if __name__ == "__main__":
    unittest.main()
