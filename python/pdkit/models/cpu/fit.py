"""Trains the nano DeepSeek-V4 on generated problems, and scores what was written, read back: `pdkit model train`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from transformers import DeepseekV4ForCausalLM, PreTrainedTokenizerBase

from pdkit.core.errors import NotReady
from pdkit.core.paths import ASSETS
from pdkit.models.cpu.evaluation import SHOTS, Row, prompt, rows_of, score, validation, write_record
from pdkit.models.cpu.model import WEIGHTS, load_config, load_model, save_model
from pdkit.models.cpu.training import Batches, new_model, recipe, set_index_topk, train
from pdkit.models.problems import EVALUATION_ROWS, Problem, evaluation_set
from pdkit.models.tokenizer import EOS, nano_tokenizer

REPORT_EVERY = 50
VALIDATION_PROBLEMS = 32
RUN_EVAL_ROWS = 200
MANY_SHOTS = 11


def solved(model: DeepseekV4ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> float:
    """Share of rows that it answers."""
    return score(lambda ids: (model(ids.to(model.device), use_cache=False).logits,), tokenizer, rows).solved


def fit(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> DeepseekV4ForCausalLM:
    """Train a new model by the recipe, showing progress."""
    config = load_config(ASSETS / "nano-dsv4")
    config.index_topk = options.index_topk
    model = new_model(config, options.seed).to(options.device).train()
    problems, all_shots = validation(VALIDATION_PROBLEMS, options.seed)
    losses: list[float] = []
    for at in train(model, Batches(tokenizer, options.seed), recipe(options.index_topk, options.scale)):
        losses.append(at.loss)
        if at.step % REPORT_EVERY == 0 or at.step == at.steps:
            shots = all_shots if at.stage.length >= 512 else []
            set_index_topk(model, options.index_topk)
            found = solved(model.eval(), tokenizer, rows_of(problems, shots))
            model.train()
            print(
                f"step {at.step}/{at.steps}  {at.stage.name}  {at.tokens / 1e6:.2f} M tokens  "
                f"loss {sum(losses) / len(losses):.4f}  indexer {at.index_loss:.3f}  lr {at.lr:.1e}  "
                f"{at.rate:,.0f} tokens/s  held out, {len(shots)} shots: solved {found:.2f}",
                flush=True,
            )
            losses.clear()
    return model


def measure(model: DeepseekV4ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, dict[str, float]]:
    """Score on the committed rows: as `run_eval` asks (5 shots), with many shots, none, and in chat form."""
    problems = evaluation_set(EVALUATION_ROWS)
    shots, scored = problems[:SHOTS], problems[SHOTS : SHOTS + rows]
    few = scored[:RUN_EVAL_ROWS]

    def chat(text: str, problem: Problem) -> Row:
        turn = [{"role": "user", "content": text}]
        asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return asked, f" {problem.answer}{EOS}"

    kinds = {
        "5 shots": rows_of(scored, shots),
        f"{MANY_SHOTS} shots": rows_of(few, problems[-MANY_SHOTS:]),
        "0 shots": rows_of(few, []),
        "chat": [chat(each.question, each) for each in few],
        "chat, 5 shots": [chat(prompt(shots, each), each) for each in few],
    }
    return {kind: {"examples": len(of), "score": solved(model, tokenizer, of)} for kind, of in kinds.items()}


def run(options: argparse.Namespace) -> None:
    """Train, save, read back, score, record, by the options of `pdkit model train`. Raises NotReady."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise NotReady("this machine has no usable CUDA GPU; run with --device cpu")
    torch.set_num_threads(options.threads)
    tokenizer = nano_tokenizer()
    began = time.monotonic()
    model = fit(options, tokenizer)
    trained = time.monotonic() - began
    options.out.mkdir(parents=True, exist_ok=True)
    save_model(model, options.out)
    tokenizer.save_pretrained(options.out)
    scores = measure(load_model(options.out).to(options.device), tokenizer, options.score_rows)
    stages = recipe(options.index_topk, options.scale)
    write_record(
        options.out,
        options.device,
        seed=options.seed,
        index_topk=options.index_topk,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        stages={stage.name: {"steps": stage.steps, "tokens": stage.tokens} for stage in stages},
        training_seconds=round(trained),
        scores=scores,
    )
    for name, result in scores.items():
        print(f"score, {name}: {result['score']:.4f} of {result['examples']:.0f}")
    size = (options.out / WEIGHTS).stat().st_size / 1e6
    print(f"wrote {options.out} ({size:.1f} MB) after {trained:.0f} s of training", flush=True)
