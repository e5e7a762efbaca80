"""The checksum of KV pages that prefill and decode compare under --disaggregation-enable-kv-checksum."""

from __future__ import annotations

import ctypes
import zlib
from typing import Any

from torch import Tensor

from pdkit.deployment.cpu.registry import replaces


@replaces(
    "sglang.srt.disaggregation.checksum:KvChecksumComputer.compute",
    family="any",
    imitates=("kernels/ops/memory/adler32.py",),
)
def compute(self: Any, kv_page_indices_gpu: Tensor, state_indices_gpu: Tensor | None = None) -> int:
    """the checksum is a CUDA kernel's

    Adler-32 of all items as one text: of each buffer of KV pages those of `kv_page_indices_gpu` [pages], then of each
    buffer of states those of `state_indices_gpu` [states], both int64.
    """
    groups = [(kv_page_indices_gpu, self._kv_data_ptrs, self._kv_item_lens)]
    if state_indices_gpu is not None:
        groups.append((state_indices_gpu, self._state_data_ptrs, self._state_item_lens))
    value = 1
    for indices, pointers, sizes in groups:
        for pointer, size in zip(pointers, sizes):
            for index in indices.tolist():
                value = zlib.adler32((ctypes.c_char * size).from_address(pointer + index * size), value)
    return value
