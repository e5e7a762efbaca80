"""What the checkpoint's logprobs should be: transformers' arithmetic in float32, and how far fp8 may take them from it.

The weights are the same numbers in both (fp8 times a power of two). What differs is where SGLang rounds on the way:
inputs of fp8 linear layers to e4m3 (2^-4 relative) with a scale for each 128; compressed and window KV to e4m3 with a
power-of-two scale for each 64 of the 448 dimensions without position, to bfloat16 (2^-9) for the others; norms,
attention outputs and residual streams to bfloat16. Here the reference is computed once exactly and once with these
roundings; the distance between the two is what rounding does to this model and these prompts. Another order of
summation, SGLang's, draws other rounding errors of the same size: the distance of SGLang from the exact reference must
stay within :data:`MARGIN` times that of the rounded reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pdkit.checks.judgement import Judgement
from pdkit.models.cuda.checkpoint import load
from pdkit.models.cuda.fp8 import round_groups
from pdkit.models.cuda.model import KernelNano

MARGIN = 2.0
WINDOW = 128
NOPE = 448
_FP8_LINEAR = ("q_a_proj", "q_b_proj", "o_a_proj", "o_b_proj", "self_attn.kv_proj", "shared_experts.gate_proj",
               "shared_experts.up_proj", "shared_experts.down_proj")  # fmt: skip


def _bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().to(x.dtype)


def _kv(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([round_groups(x[..., :NOPE], 64, power_of_two=True), _bfloat16(x[..., NOPE:])], dim=-1)


def _output(rounding: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda _module, _inputs, output: rounding(output)


def _first_input(rounding: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda _module, inputs: (rounding(inputs[0]), *inputs[1:])


@contextmanager
def fp8_rounding(model: KernelNano) -> Iterator[None]:
    """Within it `model.main` rounds where SGLang's fp8 path does, but for the inner activations of routed experts."""
    hooks = []
    for name, module in model.main.named_modules():
        if name.endswith(_FP8_LINEAR):
            hooks.append(module.register_forward_pre_hook(_first_input(round_groups)))
        elif name.endswith("mlp.experts"):
            hooks.append(module.register_forward_pre_hook(_first_input(round_groups)))
        elif name.endswith(("self_attn.kv_norm", "compressor.kv_norm")):
            hooks.append(module.register_forward_hook(_output(_kv)))
        elif name.endswith("indexer.kv_norm"):
            hooks.append(module.register_forward_hook(_output(round_groups)))
        elif name.endswith(("layernorm", "q_a_norm", "q_b_norm", "model.norm")) or name.endswith("self_attn.o_a_proj"):
            hooks.append(module.register_forward_hook(_output(_bfloat16)))
        elif type(module).__name__.endswith("DecoderLayer"):
            hooks.append(module.register_forward_hook(_output(_bfloat16)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def logprobs(model: KernelNano, ids: Sequence[int]) -> list[float]:
    """log P of each token but the first, given those before it, in nats."""
    length = -(-len(ids) // WINDOW) * WINDOW
    padded = torch.tensor([[*ids, *[0] * (length - len(ids))]], device=model.device)
    logits, _ = model(padded)
    rows = logits[0, : len(ids) - 1].float().log_softmax(-1)
    return rows.gather(1, padded[0, 1 : len(ids), None]).squeeze(1).tolist()


def rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


@dataclass(frozen=True)
class LogprobTruth(Judgement):
    """Derives whether served logprobs are those of the checkpoint, reports and asserts it; all in nats, by position.

    exact    the reference; rounded: the same with fp8's roundings; served: what the server says
    """

    exact: tuple[float, ...]
    rounded: tuple[float, ...]
    served: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.exact) == len(self.rounded) == len(self.served) > 0, "one logprob a position each"

    @property
    def expected(self) -> float:
        return rms([ours - theirs for ours, theirs in zip(self.rounded, self.exact)])

    @property
    def found(self) -> float:
        return rms([ours - theirs for ours, theirs in zip(self.served, self.exact)])

    @property
    def passed(self) -> bool:
        return self.found <= MARGIN * self.expected

    def report(self) -> str:
        largest = max(abs(ours - theirs) for ours, theirs in zip(self.served, self.exact))
        return (
            f"logprobs against transformers: {'PASS' if self.passed else 'FAIL'}, {len(self.exact)} positions: served "
            f"RMS {self.found:.4f} from the float32 reference (largest {largest:.3f}), fp8 rounding alone "
            f"{self.expected:.4f}; may be {MARGIN:g} x that = {MARGIN * self.expected:.4f}; ratio "
            f"{self.found / self.expected if self.expected else math.inf:.3f}"
        )


def expected(path: str | Path, prompts: Sequence[Sequence[int]]) -> tuple[list[list[float]], list[list[float]]]:
    """(exact, rounded) logprobs of each prompt, by the checkpoint at `path`. Raises pdkit.models.cpu.model.ModelError.

    On the GPU, where there is one: beside servers that poll on every core a CPU takes minutes.
    """
    model = load(path).to("cuda" if torch.cuda.is_available() else "cpu")
    exact = [logprobs(model, ids) for ids in prompts]
    with fp8_rounding(model):
        return exact, [logprobs(model, ids) for ids in prompts]
