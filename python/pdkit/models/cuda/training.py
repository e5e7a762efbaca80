"""Training the kernel-sized model within a time limit: stages by the clock, main model and MTP layer together.

The recipe is the nano model's (`pdkit.models.cpu.training`), but for what its size asks: mixed precision, learning rates
that shrink with a matrix' fan-in, batches drawn by other processes, and a schedule over seconds instead of steps, so
that the learning rate has come down to zero when the time is over, whatever else the GPU does.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from pdkit.models.cpu.training import (
    INDEXER_WEIGHT,
    Batches,
    IndexerRecords,
    cosine,
    learn,
    optimizer_of,
    weighted_loss,
)
from pdkit.models.cuda.model import KernelNano
from pdkit.models.tokenizer import nano_tokenizer

PEAK_LR = 2e-3
WARMUP_STEPS = 50
AHEAD = 16  # batches
EARLY_SINKHORN = 4


@dataclass(frozen=True)
class TimedStage:
    """A `share` of the training, by the clock or by tokens, on batches of `batch` sequences of `length` tokens."""

    name: str
    share: float
    length: int
    batch: int
    sinkhorn: int | None = None


STAGES = (
    TimedStage("single examples", 0.40, length=128, batch=32, sinkhorn=EARLY_SINKHORN),
    TimedStage("few-shot", 0.30, length=512, batch=8, sinkhorn=EARLY_SINKHORN),
    TimedStage("long", 0.30, length=1024, batch=4),
)


@dataclass(frozen=True)
class TimedProgress:
    """Where training stands after a step; losses are means in nats, `rate` is tokens a second since the start."""

    stage: TimedStage
    step: int
    tokens: int
    seconds: float
    loss: float
    mtp_loss: float
    index_loss: float
    lr: float

    @property
    def rate(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The nano models' tokenizer, made once in a process."""
    return nano_tokenizer()


def _draw(seed: str, batch: int, length: int) -> list[list]:
    torch.set_num_threads(1)
    return [each.tolist() for each in Batches(tokenizer(), seed).draw(batch, length)]


class BatchQueue:
    """Batches drawn ahead by `workers` processes; which ones does not depend on how many there are."""

    def __init__(self, seed: int, workers: int):
        self._seed, self._drawn = seed, 0
        self._pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        self._waiting: deque = deque()
        self._shape: tuple[int, int] | None = None

    def draw(self, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and loss weights, each ``[batch, length]``."""
        if self._shape != (batch, length):
            self._waiting.clear()
            self._shape = batch, length
        while len(self._waiting) < AHEAD:
            self._waiting.append(self._pool.submit(_draw, f"{self._seed}-{self._drawn}", batch, length))
            self._drawn += 1
        ids, weights = self._waiting.popleft().result()
        return torch.tensor(ids), torch.tensor(weights)

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def losses(
    model: KernelNano, records: IndexerRecords, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted means of the next token's loss and of the MTP layer's, and the indexer's; in nats."""
    with records.recording():
        logits, drafts = model(ids, detach=True)
        index_loss = records.loss()
    return weighted_loss(logits, ids, weights), weighted_loss(drafts, ids, weights, ahead=2), index_loss


def set_sinkhorn(model: KernelNano, iterations: int | None) -> None:
    """Let the hyper-connections normalise this often; None: as often as the model is served with."""
    served = model.main.config.hc_sinkhorn_iters
    for module in model.modules():
        if hasattr(module, "hc_sinkhorn_iters"):
            module.hc_sinkhorn_iters = iterations or served


def train(model: KernelNano, batches: BatchQueue, seconds: float) -> Iterator[TimedProgress]:
    """Train `model` in place for `seconds`, yielding after every step; the caller's time counts, too."""
    records, optimizer = IndexerRecords(model.main), optimizer_of(model)
    kind = model.device.type
    began, step, tokens, end = time.monotonic(), 0, 0, 0.0
    for stage in STAGES:
        end += stage.share * seconds
        set_sinkhorn(model, stage.sinkhorn)
        while (elapsed := time.monotonic() - began) < end:
            lr = PEAK_LR * cosine(elapsed / seconds) * min(1.0, (step + 1) / WARMUP_STEPS)
            ids, weights = (each.to(model.device) for each in batches.draw(stage.batch, stage.length))
            with torch.autocast(kind, torch.bfloat16):
                loss, mtp_loss, index_loss = losses(model, records, ids, weights)
            learn(model, optimizer, loss + mtp_loss + INDEXER_WEIGHT * index_loss, lr)
            step += 1
            tokens += ids.numel()
            yield TimedProgress(
                stage, step, tokens, time.monotonic() - began, loss.item(), mtp_loss.item(), index_loss.item(), lr
            )
    set_sinkhorn(model, None)
