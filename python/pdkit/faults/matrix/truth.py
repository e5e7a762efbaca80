"""Whether a fault changes anything, for each fault of the library.

Faults of the transfer are tried in this process on two models and many lengths. What a load balancer or a server does
is not: there the fault says itself why it changes nothing, and its run in the matrix must bear that out, answer by answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pdkit.faults.library import LIBRARY

LENGTHS = (1, 3, 5, 33, 96, 127, 129, 142, 255, 257, 301, 391)
PROMPTS_PER_FAULT = 3


@dataclass(frozen=True)
class TriedModel:
    """A model that faults are tried on: what `pdkit.models.cpu.model.load_model` is told."""

    name: str
    path: Path
    load_format: Literal["auto", "dummy"]
    seed: int


@dataclass(frozen=True)
class Truth:
    """Whether `fault` changes any logit, token or status; `evidence` says how that is known."""

    fault: str
    changes: bool
    evidence: str


def by_construction(name: str) -> Truth:
    fault = LIBRARY[name]
    return Truth(name, not fault.harmless, fault.harmless or f"by construction: {fault.what}")


def of_transfer(names: Sequence[str], models: Sequence[TriedModel], progress: Callable[[str], None]) -> list[Truth]:
    import torch

    from pdkit.engine.model_runner import ModelRunner
    from pdkit.faults import ground_truth
    from pdkit.models.cpu.model import load_model

    torch.set_num_threads(1)
    faults = [replace(LIBRARY[name], every=min(LIBRARY[name].every, PROMPTS_PER_FAULT), after=0) for name in names]
    effects: dict[str, dict[str, list[Any]]] = {name: {} for name in names}
    for model in models:
        progress(f"ground truth of {len(names)} faults on the {model.name} model")
        runner = ModelRunner(load_model(model.path, load_format=model.load_format, seed=model.seed))
        prompts = ground_truth.prompt_family(LENGTHS, runner.config.vocab_size)
        found = ground_truth.effects(runner, faults, ground_truth.sound_runs(runner, prompts))
        for name, each in found.items():
            effects[name][model.name] = each
    return [_truth(name, effects[name]) for name in names]


def _truth(name: str, by_model: Any) -> Any:
    changes = any(effect.changes for effects in by_model.values() for effect in effects)
    parts = []
    for label, effects in by_model.items():
        counts = {
            "status": sum(effect.status is not None for effect in effects),
            "first token or logprob": sum(effect.reported for effect in effects),
            "logits": sum(effect.logits is not None for effect in effects),
            "tokens": sum(effect.token is not None for effect in effects),
        }
        told = ", ".join(f"{what} of {count}" for what, count in counts.items() if count) or "nothing"
        parts.append(f"{label}, {len(effects)} prompts: {told}")
    if not changes:
        parts.append(LIBRARY[name].harmless)
    return Truth(name, changes, "; ".join(parts))


def truths_of(
    names: Sequence[str], models: Sequence[TriedModel], progress: Callable[[str], None] = lambda text: None
) -> list[Truth]:
    kv_transfer = [name for name in names if LIBRARY[name].is_of_the_transfer]
    truths = [by_construction(name) for name in names if name not in kv_transfer]
    return truths + (of_transfer(kv_transfer, models, progress) if kv_transfer else [])
