"""Trains the nano DeepSeek-V4 on generated problems, and scores it: `pdkit model train`.

The scores are measured on what was written, read back: greedily and through the cache, as a server decodes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import DeepseekV4ForCausalLM, PreTrainedTokenizerBase

from pdkit.core.errors import NotReady
from pdkit.core.paths import ASSETS
from pdkit.models.cpu.evaluation import accuracy, machine, prompt
from pdkit.models.cpu.model import WEIGHTS, load_config, load_model, save_model
from pdkit.models.cpu.training import Batches, new_model, recipe, set_index_topk, train
from pdkit.models.problems import EVALUATION_ROWS, Problem, evaluation_set
from pdkit.models.tokenizer import nano_tokenizer

REPORT_EVERY = 50
SHOTS = 5
RUN_EVAL_ROWS = 200
MANY_SHOTS = 11


class Validation:
    """A quick accuracy while training: held-out problems of one prompt length, with few shots or none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, count: int = 32):
        drawn = evaluation_set(count * 20, seed=f"validation-{seed}")
        self._tokenizer = tokenizer
        self._shots = drawn[:SHOTS]
        by_length: dict[int, list[Problem]] = {}
        for problem in drawn[SHOTS:]:
            by_length.setdefault(len(tokenizer(problem.question).input_ids), []).append(problem)
        self._problems = max(by_length.values(), key=len)[:count]

    def measure(self, model: DeepseekV4ForCausalLM, length: int, index_topk: int) -> tuple[int, float]:
        """Shots that fit into training `length`, and the accuracy with them."""
        shots = self._shots if length >= 512 else []
        set_index_topk(model, index_topk)
        model.eval()
        score = accuracy(model, self._tokenizer, [prompt(shots, each) for each in self._problems], self._problems)
        model.train()
        return len(shots), score


def fit(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, console: Console) -> DeepseekV4ForCausalLM:
    """Train a new model by the recipe, showing progress."""
    config = load_config(ASSETS / "nano-dsv4")
    config.index_topk = options.index_topk
    model = new_model(config, options.seed).to(options.device).train()
    validation = Validation(tokenizer, options.seed)
    stages = recipe(options.index_topk, options.scale)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TimeRemainingColumn(),
    )
    losses: list[float] = []
    with Progress(*columns, console=console) as display:
        bar = display.add_task("start", total=sum(stage.steps for stage in stages), now="")
        for at in train(model, Batches(tokenizer, options.seed), stages):
            losses.append(at.loss)
            now = f"loss {at.loss:.3f}  lr {at.lr:.1e}  {at.rate:,.0f} tokens/s"
            display.update(bar, completed=at.step, description=at.stage.name, now=now)
            if at.step % REPORT_EVERY == 0 or at.step == at.steps:
                shots, score = validation.measure(model, at.stage.length, options.index_topk)
                console.print(
                    f"step {at.step}/{at.steps}  {at.stage.name}  {at.tokens / 1e6:.2f} M tokens  "
                    f"loss {sum(losses) / len(losses):.4f}  indexer {at.index_loss:.3f}  lr {at.lr:.1e}  "
                    f"{at.rate:,.0f} tokens/s  held-out accuracy, {shots} shots: {score:.2f}",
                    highlight=False,
                    soft_wrap=True,
                )
                losses.clear()
    return model


def measure(model: DeepseekV4ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, dict[str, float]]:
    """Accuracy on the committed rows: as `run_eval` asks (5 shots), with many shots, none, and in chat form."""
    problems = evaluation_set(EVALUATION_ROWS)
    shots, scored = problems[:SHOTS], problems[SHOTS : SHOTS + rows]
    spare = problems[-MANY_SHOTS:]
    few = scored[:RUN_EVAL_ROWS]

    def entry(prompts: list[str], answers: Sequence[Problem]) -> dict[str, float]:
        return {"examples": len(answers), "score": accuracy(model, tokenizer, prompts, answers)}

    def chat(text: str) -> str:
        turn = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    return {
        "5 shots": entry([prompt(shots, each) for each in scored], scored),
        f"{MANY_SHOTS} shots": entry([prompt(spare, each) for each in few], few),
        "0 shots": entry([prompt([], each) for each in few], few),
        "chat": entry([chat(each.question) for each in few], few),
        "chat, 5 shots": entry([chat(prompt(shots, each)) for each in few], few),
    }


def run(options: argparse.Namespace) -> None:
    """Train, save, read back, score, record, by the options of `pdkit model train`. Raises NotReady."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise NotReady("this machine has no usable CUDA GPU; run with --device cpu")
    torch.set_num_threads(options.threads)
    console = Console()
    tokenizer = nano_tokenizer()
    began = time.monotonic()
    model = fit(options, tokenizer, console)
    trained = time.monotonic() - began
    options.out.mkdir(parents=True, exist_ok=True)
    save_model(model, options.out)
    tokenizer.save_pretrained(options.out)
    scores = measure(load_model(options.out).to(options.device), tokenizer, options.score_rows)
    stages = recipe(options.index_topk, options.scale)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": options.seed,
        "index_topk": options.index_topk,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "stages": {stage.name: {"steps": stage.steps, "tokens": stage.tokens} for stage in stages},
        "training_seconds": round(trained),
        "machine": machine(options.device),
        "scores": scores,
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    for name, result in scores.items():
        console.print(f"score, {name}: {result['score']:.4f} of {result['examples']:.0f}", highlight=False)
    size = (options.out / WEIGHTS).stat().st_size / 1e6
    console.print(f"wrote {options.out} ({size:.1f} MB) after {trained:.0f} s of training", highlight=False)
