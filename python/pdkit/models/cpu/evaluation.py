"""Scoring a model on the nano data without decoding, and the record of its training."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from pdkit.models.problems import Problem, evaluation_set, few_shot

SHOTS = 5
WINDOW = 128

Row = tuple[str, str]
"""A prompt, and the answer to it with all that ends it."""


@dataclass(frozen=True)
class Score:
    """Shares: of problems whose every answer token is the most likely one, and of drafts that are the token after."""

    problems: int
    solved: float
    drafted: float | None = None


@torch.no_grad()
def score(
    logits_of: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch: int = 8,
) -> Score:
    """What greedy decoding would give, without decoding: the data's answers follow from the question.

    If at each position of the right answer its next token is the most likely one, decoding writes that answer; `solved`
    is therefore at most the score of an eval. `drafted` is among positions of answers.

    logits_of: logits ``[B, S, V]`` of ids ``[B, S]``, `S` a multiple of WINDOW, and those of drafts where there are any
    """
    solved = drafts = right = 0
    for start in range(0, len(rows), batch):
        encoded = [[tokenizer(text).input_ids for text in row] for row in rows[start : start + batch]]
        length = -(-max(len(question) + len(answer) for question, answer in encoded) // WINDOW) * WINDOW
        joined = [question + answer for question, answer in encoded]
        padded = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids in joined])
        best, *drafted = (logits.argmax(-1).cpu() for logits in logits_of(padded))
        for row, (question, answer) in enumerate(encoded):
            wanted, first = torch.tensor(answer), len(question) - 1
            solved += torch.equal(best[row, first : first + len(answer)], wanted)
            for draft in drafted:
                right += (draft[row, first : first + len(answer) - 1] == wanted[1:]).sum().item()
                drafts += len(answer) - 1
    return Score(len(rows), solved / len(rows), right / drafts if drafts else None)


def prompt(shots: Sequence[Problem], problem: Problem) -> str:
    """The prompt of SGLang's GSM8K eval: the shots, then the question."""
    return f"{few_shot(shots)}Question: {problem.question}\nAnswer:"


def rows_of(problems: Sequence[Problem], shots: Sequence[Problem]) -> list[Row]:
    """The problems as SGLang's GSM8K eval asks them."""
    return [(prompt(shots, each), f" {each.answer}\n\n") for each in problems]


def validation(count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems that are neither trained on nor in the evaluation file, and shots for them."""
    drawn = evaluation_set(count + SHOTS, seed=f"validation-{seed}")
    return drawn[SHOTS:], drawn[:SHOTS]


def write_record(folder: Path, device: str, **facts: Any) -> None:
    """Keep with a checkpoint how it was made, on which machine, and what else is known."""
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cpu_cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    record = {"command": shlex.join(["python3", *sys.argv]), "machine": machine, **facts}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
