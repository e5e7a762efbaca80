"""Whether a fault changes anything, for each fault of the library.

Faults of the hand-over are tried in this process on two models and many lengths. What a load balancer does is not:
there the fault says itself why it changes nothing, and its run in the matrix must bear that out, answer by answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pdkit.faults import LIBRARY, Where

LENGTHS = (1, 3, 5, 33, 96, 127, 129, 142, 255, 257, 301, 391)
PROMPTS_PER_FAULT = 3


@dataclass(frozen=True)
class Truth:
    """What `fault` changes, of `prompts` tried; each number counts prompts. evidence: in words."""

    fault: str
    changes: bool
    evidence: str


def of_load_balancer(name: str) -> Truth:
    """By what it does."""
    fault = LIBRARY[name]
    return Truth(name, not fault.harmless, fault.harmless or f"by construction: {fault.what}")


def of_handover(names: Sequence[str], models: Sequence[tuple[str, Path, str, int]], progress: Callable[[str], None]):
    """{name: Truth} from runs in this process. models: (label, directory, load format, seed)."""
    import torch

    from pdkit.engine.model_runner import ModelRunner
    from pdkit.faults import ground_truth
    from pdkit.nano.model import load_model

    torch.set_num_threads(1)
    faults = [replace(LIBRARY[name], every=min(LIBRARY[name].every, PROMPTS_PER_FAULT)) for name in names]
    effects = {name: {} for name in names}
    for label, path, load_format, seed in models:
        progress(f"ground truth of {len(names)} faults on the {label} model")
        runner = ModelRunner(load_model(path, load_format=load_format, seed=seed))
        prompts = ground_truth.prompt_family(LENGTHS, runner.config.vocab_size)
        found = ground_truth.effects(runner, faults, ground_truth.sound_runs(runner, prompts))
        for name, each in found.items():
            effects[name][label] = each
    return [_truth(name, effects[name]) for name in names]


def _truth(name, by_model):
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


def truths_of(names: Sequence[str], models, progress: Callable[[str], None] = lambda text: None) -> list[Truth]:
    """The truth of each fault named."""
    balancer = [name for name in names if LIBRARY[name].where is Where.LB]
    handover = [name for name in names if LIBRARY[name].where is not Where.LB]
    truths = [of_load_balancer(name) for name in balancer]
    return truths + (of_handover(handover, models, progress) if handover else [])
