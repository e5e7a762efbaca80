"""Whether a fault changes anything: the same requests with and without it, in this process, compared bit for bit.

Decode steps are forced along the tokens of the sound run, so the first difference of any logit is the one that a free
run would show, and no difference here means none there.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pdkit.engine import state
from pdkit.engine.model_runner import ROWS, ModelRunner, gather_rows
from pdkit.engine.transfer import DecodeReceiver, KVTransfer, TransferError
from pdkit.faults.fault import Fault, Injection, Where

CONTEXT = 128
LEAST_STEPS = 12


@dataclass(frozen=True)
class Effect:
    """What one fault does to one prompt.

    status        why the request fails, or None
    reported      True if first token or its logprob arrive changed
    logits        the first decode step at which any logit differs, or None
    token         the first decode step at which the likeliest token differs, or None
    """

    length: int
    status: str | None = None
    reported: bool = False
    logits: int | None = None
    token: int | None = None

    @property
    def changes(self) -> bool:
        return bool(self.status or self.reported) or self.logits is not None


@dataclass(frozen=True)
class Sound:
    """A prompt as served without a fault: its transfer, the tokens of each decode step and their logits [steps, V]."""

    kv_transfer: KVTransfer
    tokens: list[int]
    logits: torch.Tensor


def prompt_family(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random prompts; those longer than CONTEXT + 8 tokens begin with the same CONTEXT tokens."""
    draw = torch.Generator().manual_seed(seed)
    beginning = torch.randint(3, vocab_size, (CONTEXT,), generator=draw).tolist()
    prompts = []
    for length in lengths:
        ids = torch.randint(3, vocab_size, (length,), generator=draw).tolist()
        prompts.append(beginning + ids[CONTEXT:] if length > CONTEXT + 8 else ids)
    return prompts


def steps_for(length: int) -> int:
    """Decode steps after a prompt of `length`: past the next entry of each compressor where that is near."""
    past_boundary = -length % CONTEXT + 4
    return past_boundary if LEAST_STEPS < past_boundary <= 40 else LEAST_STEPS


def sound_runs(runner: ModelRunner, prompts: Sequence[Sequence[int]]) -> list[Sound]:
    """Serve each prompt greedily, alone and without a fault."""
    runs = []
    for room, ids in enumerate(prompts):
        cache = state.new_cache(runner.config)
        while cache.get_seq_length() < len(ids):
            logits = runner.prefill_step(ids, cache, len(ids) - 1)
        tensors, counts = state.tensors_of(cache)
        first = int(logits[-1].argmax())
        logprob = logits[-1].log_softmax(-1)[first].item()
        kv_transfer = KVTransfer(room, len(ids), first, 0, counts, tensors, logprob)
        steps = _decode(runner, [kv_transfer], [first], steps_for(len(ids)))
        runs.append(Sound(kv_transfer, [first, *steps[0].argmax(-1).tolist()], steps[0]))
    return runs


def effects(runner: ModelRunner, faults: Sequence[Fault], runs: Sequence[Sound]) -> dict[str, list[Effect]]:
    """{fault: [effect on each run]}; the runs are served in order, so later ones find what earlier ones left."""
    injections = [Injection(fault) for fault in faults]
    found: dict[str, list[Effect]] = {fault.name: [] for fault in faults}
    for run in runs:
        silent: list[tuple[Fault, KVTransfer]] = []
        for injection in injections:
            effect, kv_transfer = _transferred(runner.config, injection, run.kv_transfer)
            found[injection.fault.name].append(effect)
            if kv_transfer is not None and not _same_state(kv_transfer, run.kv_transfer):
                silent.append((injection.fault, kv_transfer))
        for batch in _batches(silent):
            results = _decode(runner, [kv_transfer for _, kv_transfer in batch], run.tokens, len(run.logits))
            for (fault, _), logits in zip(batch, results, strict=True):
                found[fault.name][-1] = _compare(found[fault.name][-1], logits, run.logits)
    return found


def _transferred(config: Any, injection: Injection, kv_transfer: KVTransfer) -> tuple[Effect, KVTransfer | None]:
    """(effect so far, what decode goes on from or None): the way of a KV transfer through transfer and checks."""
    fault, length = injection.fault, kv_transfer.prompt_tokens
    try:
        if fault.where is Where.WIRE:
            data = kv_transfer.pack()
            arrived = fault.wire(data) if injection.is_met() and fault.wire else data
            DecodeReceiver.verify(arrived, hashlib.sha256(data).hexdigest(), kv_transfer.room)
            return Effect(length), kv_transfer
        changed = injection.apply(kv_transfer)
        if changed is None:
            raise TransferError("never sent")
        if changed.prompt_tokens != length:
            raise TransferError("a KV transfer of another prompt")
        if fault.where is not Where.RESTORE:
            state.check(config, length, changed.tensors, changed.counts)
    except (TransferError, state.StateError) as error:
        return Effect(length, status=str(error)), None
    reported = (changed.first_token, changed.first_logprob) != (kv_transfer.first_token, kv_transfer.first_logprob)
    return Effect(length, reported=reported), changed


def _same_state(one: KVTransfer, other: KVTransfer) -> bool:
    return one.counts == other.counts and all(
        torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items()
    )


def _batches(silent: list[tuple[Fault, KVTransfer]]) -> list[list[tuple[Fault, KVTransfer]]]:
    """Rows of a batch share their counts."""
    alone = [[item] for item in silent if item[0].where is Where.RESTORE]
    rows = [item for item in silent if item[0].where is not Where.RESTORE]
    return alone + [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]


def _decode(runner: ModelRunner, kv_transfers: Sequence[KVTransfer], tokens: Any, steps: int) -> Any:
    """Logits [rows, steps, V] of decode steps; each is fed the next of `tokens`, or its own choice where they end."""
    cache = gather_rows([(state.restore(runner.config, each.tensors, each.counts), [0]) for each in kv_transfers])
    tokens, collected = list(tokens), []
    for step in range(steps):
        try:
            logits = runner.decode_step([tokens[step]] * ROWS, cache)
        except (RuntimeError, IndexError):
            collected.append(torch.full((ROWS, runner.config.vocab_size), torch.nan))
            break
        collected.append(logits)
        if step + 1 == len(tokens):
            tokens.append(int(logits[0].argmax()))
    return torch.stack(collected, dim=1)[: len(kv_transfers)]


def _compare(effect: Effect, logits: torch.Tensor, sound: torch.Tensor) -> Effect:
    """A step that could not be computed counts as one with other logits."""
    steps = min(len(logits), len(sound))
    other = (logits[:steps] != sound[:steps]).any(dim=-1)
    tokens = logits[:steps].argmax(-1) != sound[:steps].argmax(-1)
    first = [int(differs.int().argmax()) if differs.any() else None for differs in (other, tokens)]
    return replace(effect, logits=first[0], token=first[1])
