"""Trains the kernel-sized model, showing progress, and keeps with the checkpoint what was done and what it scores."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from pdkit.core.errors import NotReady
from pdkit.models.cpu.evaluation import SHOTS, Row, Score, rows_of, score, validation, write_record
from pdkit.models.cuda import checkpoint, store
from pdkit.models.cuda.config import FEW_HEADS, fields
from pdkit.models.cuda.model import KernelNano, rescale
from pdkit.models.cuda.training import BatchQueue, tokenizer, train
from pdkit.models.problems import EVALUATION_ROWS, evaluation_set

REPORT_EVERY = 10.0
VALIDATION_PROBLEMS = 48


def run(options: argparse.Namespace) -> None:
    """Train, save, read back, score, record, by the options of `pdkit model kernel-train`. Raises NotReady."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise NotReady(
            "this machine has no usable CUDA GPU; --device cpu trains for hours; scripts/run.sh needs neither GPU nor "
            "training"
        )
    torch.set_float32_matmul_precision("high")
    (options.out / store.RECORD).unlink(missing_ok=True)
    began = time.monotonic()
    model, steps, tokens = fit(options)
    took = time.monotonic() - began
    checkpoint.save(model, options.out)
    evaluation = evaluation_set(EVALUATION_ROWS)
    shots, rows = evaluation[:SHOTS], evaluation[SHOTS : SHOTS + options.score_rows]
    found = scored(checkpoint.load(options.out).to(options.device), rows_of(rows, shots))
    digest = store.digest(options.out)
    write_record(
        options.out,
        options.device,
        sha256=digest,
        seed=options.seed,
        steps=steps,
        tokens=tokens,
        training_seconds=round(took),
        **{"evaluation rows": found.problems, "solved": found.solved, "drafts right": found.drafted},
    )
    print(
        f"read back, {found.problems} evaluation rows, {SHOTS} shots: solved {found.solved:.4f}, "
        f"drafts right {found.drafted:.4f}\n"
        f"wrote {options.out} (hash {digest}) after {took:.0f} s, {steps} steps",
        flush=True,
    )


def scored(model: KernelNano, rows: Sequence[Row]) -> Score:
    """What the model and its MTP layer answer."""
    return score(lambda ids: model(ids.to(model.device)), tokenizer(), rows)


def fit(options: argparse.Namespace) -> tuple[KernelNano, int, int]:
    """Train a new model, showing progress: (model, steps, tokens)."""
    model = KernelNano(FEW_HEADS if options.few_heads else fields(options.hidden_size), options.seed)
    rescale(model)
    model.to(options.device).train()
    rows = rows_of(*validation(VALIDATION_PROBLEMS, options.seed))
    batches = BatchQueue(options.seed, options.workers)
    reported = saved = 0.0
    try:
        for at in train(model, batches, options.seconds):
            if at.seconds - reported >= REPORT_EVERY or at.step == 1:
                reported = at.seconds
                found = scored(model, rows)
                print(
                    f"{at.seconds:6.1f} s  step {at.step:5}  {at.stage.name:<15}  loss {at.loss:.4f}  "
                    f"mtp {at.mtp_loss:.4f}  indexer {at.index_loss:.3f}  lr {at.lr:.1e}  {at.rate:7,.0f} tokens/s  "
                    f"held out, {SHOTS} shots: solved {found.solved:.2f}, drafts right {found.drafted:.2f}",
                    flush=True,
                )
            if at.seconds - saved >= options.save_every:
                saved = at.seconds
                checkpoint.save(model, options.out)
    finally:
        batches.close()
    return model, at.step, at.tokens
