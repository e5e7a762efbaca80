"""The nano's tokenizer as a checkpoint of DeepSeek-V4 has it: its special tokens have DeepSeek's names.

SGLang 0.5.23 makes chats of a DeepseekV4ForCausalLM itself, by these names, whatever template the checkpoint has
(`entrypoints/openai/serving_deepseek_recipe.py`); without them its server ends when it starts.
"""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pdkit.models.tokenizer import nano_tokenizer

NAMES = {
    "<s>": "<｜begin▁of▁sentence｜>",
    "</s>": "<｜end▁of▁sentence｜>",
    "<|user|>": "<｜User｜>",
    "<|assistant|>": "<｜Assistant｜>",
}
THINKING = "<think>", "</think>"  # new ids, which no training has seen


def kernel_tokenizer() -> PreTrainedTokenizerFast:
    """The same ids for the same text as `nano_tokenizer()`."""
    nano = nano_tokenizer()
    data = json.loads(nano.backend_tokenizer.to_str())
    ids = data["model"]["vocab"]
    for token in data["added_tokens"]:
        old = token["content"]
        token["content"] = NAMES.get(old, old)
        ids[token["content"]] = ids.pop(old)
    first = len(ids)
    data["added_tokens"] += [
        {**data["added_tokens"][0], "id": first + at, "content": name} for at, name in enumerate(THINKING)
    ]
    template = nano.chat_template
    for old, new in NAMES.items():
        template = template.replace(old, new)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        bos_token=NAMES["<s>"],
        eos_token=NAMES["</s>"],
        pad_token=nano.pad_token,
        extra_special_tokens=[NAMES["<|user|>"], NAMES["<|assistant|>"], *THINKING],
        model_max_length=nano.model_max_length,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
