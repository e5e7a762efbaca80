"""Training the nano DeepSeek-V4: batches, the indexer's loss, stages and the loop.

The answer tokens of generated problems are learnt by next-token prediction, first on
short sequences, then on few-shot ones up to 1024 tokens. The attention of 4x layers is
dense at first (every compressed entry is selected) while the indexer, which gets no
gradient from the language loss because top-k selection has none, learns to rank entries
by the mass that attention puts on them; this is the warm-up of DeepSeek-V3.2's sparse
attention (DeepSeek-AI 2025, section 2.1, eqs. 3-4). The last stages then train with the
small top-k that the model is served with.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, PreTrainedTokenizerBase

from pdkit.models.cpu.experts import NAME as DENSE_EXPERTS
from pdkit.models.cpu.model import hash_routes
from pdkit.models.cpu.windowed_attention import residual_streams
from pdkit.models.problems import few_shot, stream
from pdkit.models.tokenizer import ASSISTANT, EOS, USER

PEAK_LR = 3e-3
WARMUP = 0.02
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
QUESTION_WEIGHT = 0.1
CHAT_SHARE = 0.125
INDEXER_WEIGHT = 0.3

ALL_ENTRIES = 1 << 20
_NO_SCORE = -1e9


@dataclass(frozen=True)
class Stage:
    """`steps` batches of `batch` sequences of `length` tokens, selecting `index_topk` compressed entries."""

    name: str
    length: int
    batch: int
    steps: int
    index_topk: int

    @property
    def tokens(self) -> int:
        """Tokens seen in the stage."""
        return self.length * self.batch * self.steps


def recipe(index_topk: int, scale: float = 1.0) -> tuple[Stage, ...]:
    """The stages that train the committed model, each `scale` times as long (but a step at least)."""
    stages = (
        Stage("single examples", length=128, batch=64, steps=400, index_topk=ALL_ENTRIES),
        Stage("few-shot", length=512, batch=16, steps=200, index_topk=ALL_ENTRIES),
        Stage("sparse, long", length=1024, batch=8, steps=250, index_topk=index_topk),
    )
    return tuple(replace(stage, steps=max(1, round(stage.steps * scale))) for stage in stages)


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step; losses are means in nats, `rate` is tokens a second."""

    stage: Stage
    step: int
    steps: int
    tokens: int
    loss: float
    index_loss: float
    lr: float
    rate: float


class Batches:
    """Token ids and loss weights, each ``[batch, length]``, of endless generated sequences.

    A sequence is few-shot text, or (one in eight) a chat whose last turns hold few-shot or
    bare questions. Questions weigh little: their words are drawn at random.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int):
        self._tokenizer = tokenizer
        self._problems = stream(seed)
        self._rng = random.Random(f"batches-{seed}")

    def draw(self, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one batch."""
        ids, weights = zip(*(self._sequence(length) for _ in range(batch)), strict=True)
        return torch.tensor(ids), torch.tensor(weights)

    def _sequence(self, length: int) -> tuple[list[int], list[float]]:
        pieces = self._chat_turns if self._rng.random() < CHAT_SHARE else self._shots
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in pieces():
            tokens = self._tokenizer(text).input_ids
            ids += tokens
            weights += [weight] * len(tokens)
            if len(ids) >= length:
                return ids[:length], weights[:length]
        raise AssertionError("the stream of problems ended")

    def _shots(self) -> Iterator[tuple[str, float]]:
        for problem in self._problems:
            yield f"Question: {problem.question}\nAnswer:", QUESTION_WEIGHT
            yield f" {problem.answer}\n\n", 1.0

    def _chat_turns(self) -> Iterator[tuple[str, float]]:
        for problem in self._problems:
            if self._rng.random() < 0.5:
                yield f"{USER}{problem.question}", QUESTION_WEIGHT
            else:
                shots = [next(self._problems) for _ in range(self._rng.randint(0, 6))]
                yield f"{USER}{few_shot(shots)}Question: {problem.question}\nAnswer:", QUESTION_WEIGHT
            yield ASSISTANT, 0.0
            yield f" {problem.answer}{EOS}", 1.0


class IndexerRecords:
    """The indexer's scores and the mass that attention puts on the entries, kept while `recording()`."""

    def __init__(self, model: DeepseekV4ForCausalLM):
        self._recording = False
        self._scores: list[torch.Tensor] = []
        self._mass: list[torch.Tensor] = []
        for attention in _sparse_attentions(model):
            indexer = attention.compressor.indexer
            indexer.register_forward_pre_hook(self._detach)
            indexer.scorer.register_forward_hook(self._keep_scores)
            attention.register_forward_hook(self._keep_mass)

    @staticmethod
    def _detach(_module, arguments):
        return tuple(each.detach() if isinstance(each, torch.Tensor) else each for each in arguments)

    def _keep_scores(self, _module, _arguments, scores):
        if self._recording:
            self._scores.append(scores)

    def _keep_mass(self, _module, _arguments, outputs):
        if self._recording:
            self._mass.append(outputs[1].detach().sum(1))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what forward passes within show, until the end."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
            self._scores.clear()
            self._mass.clear()

    def loss(self) -> torch.Tensor:
        """The mean over sparse layers of :func:`alignment`, in nats."""
        pairs = zip(self._scores, self._mass, strict=True)
        return torch.stack([alignment(*pair) for pair in pairs]).mean()


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, ahead: int = 1) -> torch.Tensor:
    """Mean cross-entropy, in nats, of the token `ahead` places on, each token by its weight; ``[B, S, V]``, ``[B, S]``."""
    each = F.cross_entropy(logits[:, :-ahead].float().flatten(0, 1), ids[:, ahead:].flatten(), reduction="none")
    shares = weights[:, ahead:].flatten()
    return (each * shares).sum() / shares.sum().clamp_min(1e-6)


def losses(
    model: DeepseekV4ForCausalLM, records: IndexerRecords, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Language loss and the indexer's (mean over sparse layers), in nats, of a forward pass without cache."""
    core = model.model
    with records.recording():
        streams, _ = residual_streams(model, ids)
        index_loss = records.loss()
    return weighted_loss(model.lm_head(core.norm(core.hc_head(streams))), ids, weights), index_loss


def learn(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    """One step of an optimiser of `optimizer_of`, gradients clipped."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def alignment(scores: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the indexer's softmax against attention `mass`, both ``[B, S, T]``.

    Only entries that attention saw take part; a query counts as much as it uses them. In nats;
    least where the softmax of `scores` equals a query's share of mass.
    """
    log_shares = scores.masked_fill(mass <= 0, _NO_SCORE).log_softmax(-1)
    return -(mass * log_shares).sum() / mass.sum().clamp_min(1e-6)


def _sparse_attentions(model: DeepseekV4ForCausalLM) -> list[torch.nn.Module]:
    return [
        layer.self_attn for layer in model.model.layers if layer.self_attn.layer_type == "compressed_sparse_attention"
    ]


def set_index_topk(model: DeepseekV4ForCausalLM, index_topk: int) -> None:
    """Let every indexer of `model` select `index_topk` entries from now on."""
    for attention in _sparse_attentions(model):
        attention.compressor.indexer.index_topk = index_topk


def new_model(config: DeepseekV4Config, seed: int | None) -> DeepseekV4ForCausalLM:
    """An untrained model in float32, from `seed` or torch's random state; the hash layers' routes are drawn from `seed`."""
    if seed is not None:
        torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM._from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation=DENSE_EXPERTS
    )
    rng = np.random.default_rng(seed)
    for layer in model.model.layers:
        if layer.mlp.is_hash:
            routes = layer.mlp.gate.tid2eid
            routes.copy_(torch.from_numpy(hash_routes(rng, *routes.shape, config.n_routed_experts)))
    return model


def train(model: DeepseekV4ForCausalLM, batches: Batches, stages: tuple[Stage, ...]) -> Iterator[Progress]:
    """Train `model` in place, stage by stage, yielding after every step.

    AdamW; the learning rate warms up linearly, then falls to zero along a cosine over all
    tokens. Between steps the caller may evaluate the model, in eval mode or not.
    """
    records, optimizer = IndexerRecords(model), optimizer_of(model)
    total = sum(stage.tokens for stage in stages)
    steps = sum(stage.steps for stage in stages)
    seen = step = 0
    for stage in stages:
        for _ in range(stage.steps):
            began = time.perf_counter()
            lr = PEAK_LR * _schedule(seen / total)
            set_index_topk(model, stage.index_topk)
            ids, weights = (each.to(model.device) for each in batches.draw(stage.batch, stage.length))
            loss, index_loss = losses(model, records, ids, weights)
            learn(model, optimizer, loss + INDEXER_WEIGHT * index_loss, lr)
            seen += ids.numel()
            step += 1
            yield Progress(
                stage=stage,
                step=step,
                steps=steps,
                tokens=seen,
                loss=loss.item(),
                index_loss=index_loss.item(),
                lr=lr,
                rate=ids.numel() / (time.perf_counter() - began),
            )


def _schedule(done: float) -> float:
    if done < WARMUP:
        return (done + 1e-3) / (WARMUP + 1e-3)
    return cosine((done - WARMUP) / (1 - WARMUP))


def cosine(done: float) -> float:
    """From 1 to 0 along half a cosine, as `done` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def optimizer_of(model: torch.nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW, which lets matrices decay, and vectors not.

    The learning rate of a matrix whose fan-in is above 512 is `scale`, 128 / fan-in, times that of `learn` (Yang et al.
    2022).
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        matrix = parameter.dim() >= 2
        scale = 128 / parameter.shape[-1] if matrix and parameter.shape[-1] > 512 else 1.0
        groups.setdefault((scale, WEIGHT_DECAY if matrix else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": each, "weight_decay": decay, "scale": scale} for (scale, decay), each in groups.items()],
        betas=(0.9, 0.95),
        fused=fused,
    )
