"""Trains the Llama that the target `sglang-cpu` serves: `python3 -m pdkit.deployment.cpu.train_llama OUT [--tokens N]`.

A quarter of an hour on one CPU core. The data are the nano models' (`pdkit.models.cpu`); the weights are rounded to bfloat16,
served in float32, and scored as they are served. Writes the model and `training.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pdkit.core.paths import ASSETS
from pdkit.models.cpu.evaluation import rows_of, score, validation, write_record
from pdkit.models.cpu.training import Batches, cosine, learn, optimizer_of, weighted_loss
from pdkit.models.cuda.training import TimedStage
from pdkit.models.tokenizer import nano_tokenizer

PEAK_LR = 3e-3
WARMUP_STEPS = 100
VALIDATION_PROBLEMS = 400
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
            lr = PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * cosine(seen / total)
            ids, weights = batches.draw(stage.batch, stage.length)
            loss = weighted_loss(model(ids).logits, ids, weights)
            learn(model, optimizer, loss, lr)
            seen, step = seen + ids.numel(), step + 1
            yield seen, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=6_000_000, help="how many to train on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer = nano_tokenizer()
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(ASSETS / "nano-llama")).float()
    began = time.process_time()
    for step, (seen, loss) in enumerate(train(model, Batches(tokenizer, options.seed), options.tokens), 1):
        if step % 50 == 0:
            rate = seen / (time.process_time() - began)
            print(f"{seen} tokens, {rate:.0f} a second of CPU, loss {loss:.4f}", flush=True)
    seconds = time.process_time() - began
    model = model.bfloat16().float().eval()
    rows = rows_of(*validation(VALIDATION_PROBLEMS, options.seed))
    found = score(lambda ids: (model(ids).logits,), tokenizer, rows)
    options.out.mkdir(parents=True)
    tokenizer.save_pretrained(options.out)
    model.bfloat16().save_pretrained(options.out)
    write_record(
        options.out,
        "cpu",
        seed=options.seed,
        parameters=sum(each.numel() for each in model.parameters()),
        tokens=options.tokens,
        stages=[asdict(stage) for stage in STAGES],
        cpu_seconds=round(seconds),
        scores={f"validation, 5 shots, {found.problems} problems": found.solved},
        sha256=hashlib.sha256((options.out / "model.safetensors").read_bytes()).hexdigest(),
    )
    print(f"solved {found.solved}")


if __name__ == "__main__":
    main()
