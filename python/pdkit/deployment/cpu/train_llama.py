"""Trains the Llama that the target `sglang-cpu` serves: `python3 -m pdkit.deployment.cpu.train_llama OUT [--tokens N]`.

A quarter of an hour on one CPU core. The data are the nano models' (`pdkit.models.cpu`); the weights are rounded to bfloat16,
served in float32, and scored as they are served. Writes the model and `training.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pdkit.deployment.cpu.checkpoints import new_llama, save_llama
from pdkit.models.cpu.evaluation import machine, prompt
from pdkit.models.cpu.training import Batches, cosine, learn, optimizer_of, weighted_loss
from pdkit.models.cuda.training import TimedStage
from pdkit.models.problems import evaluation_set
from pdkit.models.tokenizer import nano_tokenizer

PEAK_LR = 3e-3
WARMUP_STEPS = 100
SHOTS = 5


STAGES = (
    TimedStage("single examples", 0.5, length=128, batch=32),
    TimedStage("few-shot", 0.3, length=512, batch=8),
    TimedStage("long", 0.2, length=1024, batch=4),
)


def train(model: Any, batches: Batches, total: int) -> Iterator[tuple[int, float]]:
    """Train `model` in place on `total` tokens; yields tokens seen and loss (nats a token) after each step."""
    optimizer = optimizer_of(model, fused=False)
    seen = step = 0
    done = 0.0
    for stage in STAGES:
        done += stage.share
        while seen < done * total:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * cosine(seen / total)
            ids, weights = batches.draw(stage.batch, stage.length)
            loss = weighted_loss(model(ids).logits, ids, weights)
            learn(model, optimizer, loss)
            seen, step = seen + ids.numel(), step + 1
            yield seen, loss.item()


@torch.no_grad()
def solved(model: Any, count: int, seed: str) -> float:
    """Share of problems whose every answer token is the most likely one; at most the score of greedy decoding."""
    tokenizer = nano_tokenizer()
    drawn = evaluation_set(count + SHOTS, seed=seed)
    good = 0
    for problem in drawn[SHOTS:]:
        question = tokenizer(prompt(drawn[:SHOTS], problem)).input_ids
        answer = tokenizer(f" {problem.answer}\n\n").input_ids
        best = model(torch.tensor([question + answer])).logits[0].argmax(-1).tolist()
        good += best[len(question) - 1 : len(question) + len(answer) - 1] == answer
    return good / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=6_000_000, help="how many to train on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = new_llama(initializer_range=0.05)
    began = time.process_time()
    for step, (seen, loss) in enumerate(train(model, Batches(nano_tokenizer(), options.seed), options.tokens), 1):
        if step % 50 == 0:
            print(
                f"{seen} tokens, {seen / (time.process_time() - began):.0f} a second of CPU, loss {loss:.4f}",
                flush=True,
            )
    seconds = time.process_time() - began
    model = model.bfloat16().float().eval()
    record = {
        "command": shlex.join(["python3", "-m", "pdkit.deployment.cpu.train_llama", *sys.argv[1:]]),
        "seed": options.seed,
        "parameters": sum(each.numel() for each in model.parameters()),
        "tokens": options.tokens,
        "stages": [asdict(stage) for stage in STAGES],
        "cpu_seconds": round(seconds),
        "machine": {**machine("cpu"), "threads": 1},
        "scores": {"validation, 5 shots, 400 problems": solved(model, 400, "validation-0")},
    }
    save_llama(model, options.out)
    record["sha256"] = hashlib.sha256((options.out / "model.safetensors").read_bytes()).hexdigest()
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record["scores"]))


if __name__ == "__main__":
    main()
