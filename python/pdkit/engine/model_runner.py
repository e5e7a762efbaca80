"""Forward passes whose results do not depend on who else is being served.

Prefill runs one sequence at a time in chunks that start at multiples of `chunk`, so a prompt served from a cached
prefix goes through the very same operations as a cold one. Decode runs sequences of equal length in batches padded to
a multiple of `ROWS`: CPU matrix kernels finish rows in fixed-size tiles, and without a ragged tile the bits of a row
do not depend on its neighbours (`test_engine_model_runner.py` holds that on the machine at hand). MKL promises as much in
its strict mode alone, which it reads from the environment when it first computes: without it, eight rows do not suffice
on an Intel CPU, nor do 16 on one without AVX-512 (`studies/row_invariance.py`).
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from pdkit.engine import state
from pdkit.engine.forward import Forward

ROWS = 8


class ModelRunner:
    """`model`: a DeepseekV4ForCausalLM in eval mode; `chunk`: tokens a prefill step, also the prefix cache's grain."""

    def __init__(self, model: Any, chunk: int = 128) -> None:
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        self.model, self.config, self.chunk = model, model.config, chunk
        self.forward = Forward(model)

    @torch.inference_mode()
    def prefill_step(self, ids: Sequence[int], cache: DynamicCache, keep_from: int) -> torch.Tensor:
        """Run the next chunk of `ids` (the whole prompt) on `cache`.

        Returns logits [m, V] of the positions of this chunk at or after `keep_from`.
        """
        start = cache.get_seq_length()
        end = min(len(ids), (start // self.chunk + 1) * self.chunk)
        keep = max(0, end - max(start, keep_from))
        hidden = self.forward(torch.tensor([ids[start:end]]), cache)[0]
        return self.model.lm_head(hidden[len(hidden) - keep :])

    @torch.inference_mode()
    def decode_step(self, tokens: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        """tokens: one id a row of `cache`, len(tokens) a multiple of ROWS. Returns logits [rows, V]."""
        assert len(tokens) % ROWS == 0
        return self.model.lm_head(self.forward(torch.tensor(tokens).unsqueeze(1), cache))[:, 0]


def gather_rows(parts: Sequence[tuple[DynamicCache, list[int]]]) -> DynamicCache:
    """state.gather, padded as decode_step wants it."""
    return state.gather(parts, multiple=ROWS)
