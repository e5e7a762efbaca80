"""Scoring a model on the nano data as SGLang's GSM8K eval does, but in process."""

from __future__ import annotations

import os
import platform
import re
from collections import defaultdict
from collections.abc import Sequence

import torch
import transformers
from transformers import DeepseekV4ForCausalLM, DynamicCache, PreTrainedTokenizerBase

from pdkit.models.problems import Problem, few_shot

STOP = "Question"
_NUMBER = re.compile(r"-?\d+\.?\d*")


def last_number(text: str) -> str | None:
    """The last number in `text`, which is what SGLang's GSM8K eval compares; None if there is none."""
    numbers = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1].rstrip(".") if numbers else None


@torch.inference_mode()
def complete(
    model: DeepseekV4ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 80,
    batch_size: int = 64,
) -> list[str]:
    """Greedy completions through the cache (prefill, then one token a step), cut at :data:`STOP` or eos.

    Prompts of equal token length share a batch: the compressors ignore padding.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    for index, ids in enumerate(encoded):
        by_length[len(ids)].append(index)
    texts = [""] * len(prompts)
    for members in by_length.values():
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            ids = torch.tensor([encoded[index] for index in batch], device=model.device)
            cache = DynamicCache(config=model.config)
            done = [False] * len(batch)
            generated: list[list[int]] = [[] for _ in batch]
            for _ in range(max_new_tokens):
                logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1].argmax(-1, keepdim=True)
                for row, token in enumerate(ids[:, 0].tolist()):
                    if not done[row]:
                        generated[row].append(token)
                        texts[batch[row]] = tokenizer.decode(generated[row])
                        done[row] = token == tokenizer.eos_token_id or STOP in texts[batch[row]]
                if all(done):
                    break
    return [text.split(STOP)[0] for text in texts]


def prompt(shots: Sequence[Problem], problem: Problem) -> str:
    """The prompt of SGLang's GSM8K eval: the shots, then the question."""
    return f"{few_shot(shots)}Question: {problem.question}\nAnswer:"


def accuracy(
    model: DeepseekV4ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    problems: Sequence[Problem],
) -> float:
    """Share of `problems` whose greedy completion of the prompt at the same index ends in the right number."""
    texts = complete(model, tokenizer, prompts)
    right = sum(last_number(text) == last_number(problem.answer) for text, problem in zip(texts, problems, strict=True))
    return right / len(problems)


def machine(device: str) -> dict[str, str | int]:
    """What the numbers were measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cpu_cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
