"""What a transfer backend is asked to write, block by block, and what else it can make of that: pure functions.

SGLang registers its memory with the backend in a fixed order: pools of pages, metadata, states. By that order an
address belongs to a piece of DeepSeek-V4's state, see `pieces_of`. Mooncake gets each of the three in a call of its own
until SGLang 0.5.22, all in one from 0.5.23 on; NIXL always three.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pdkit.faults.pieces import Kind

FIRST_DRAFT = "draft probabilities", "draft tokens", "draft hidden state"
# Of `disaggregation.utils.MetadataBuffers.get_buf_infos`.
METADATA = (
    "first token", "cached tokens", "first logprob", "first logprob's token", "top logprobs", "top logprobs' tokens",
    *FIRST_DRAFT, "room",
)  # fmt: skip
DRAFT_WINDOW = "draft window"
CANARY = "canary"  # of SGLang's --kv-canary: what it wrote beside each slot of the window, and sends along
UNKNOWN = "unknown"
POOLS, METADATA_CALL = 0, 1


@dataclass(frozen=True)
class Block:
    """`length` bytes at `source` in prefill's memory, to be written to `target` in decode's."""

    source: int
    target: int
    length: int
    piece: str = UNKNOWN


@dataclass
class Memory:
    """What the faults of one process remember. `earlier`: the pages that the last transfer read, by piece."""

    earlier: dict[str, tuple[int, ...]] = field(default_factory=dict)


Change = Callable[[Sequence[Block], Memory], Sequence[Block]]


def pieces_of(ratios: Sequence[int], canary: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(pieces of the pools, pieces of the states) in the order in which SGLang registers them.

    ratios: tokens a compressed entry, for each layer of the model without those of its draft; 0 for window attention.
    canary: servers run with --kv-canary, see `kv_canary.pool_patcher.buf_info_splice` of SGLang 0.5.23.
    From `DeepSeekV4TokenToKVPool.get_contiguous_buf_infos`, `get_state_buf_infos`, `get_c128_state_buf_infos` and
    `disaggregation.utils.setup_state_kv_args` of SGLang 0.5.17; 0.5.23 has the same order (`get_request_state_buf_infos`).
    """
    four, long = sum(ratio == 4 for ratio in ratios), sum(ratio == 128 for ratio in ratios)
    pools = [Kind.C4_COMPRESSED] * four + [Kind.INDEXER_COMPRESSED] * four + [Kind.C128_COMPRESSED] * long
    states = [Kind.WINDOW] * len(ratios) + [Kind.C4_BUFFERS] * four + [Kind.INDEXER_BUFFERS] * four
    around = (CANARY,) * canary
    names = (
        *(*around, *(kind.value for kind in states), *around),
        *(Kind.C128_BUFFERS.value,) * long,
        *(*around, DRAFT_WINDOW, *around),
    )
    return tuple(kind.value for kind in pools), names


def rows_of(listed: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Rows (address, bytes, device) number `chosen` of a list that NIXL was given.

    listed: N x 3, those rows themselves; or N x 5, runs (address, bytes, device, stride, count) of `count` rows that
    are `stride` bytes apart, numbered through (SGLang from 0.5.23 on).
    """
    chosen = np.asarray(chosen, dtype=np.int64)
    if listed.shape[1] == 3:
        return listed[chosen]
    counts = listed[:, 4].astype(np.int64)
    ends = np.cumsum(counts)
    at = np.searchsorted(ends, chosen, side="right")
    within = (chosen - (ends - counts)[at]).astype(np.uint64)
    runs = listed[at]
    return np.column_stack((runs[:, 0] + within * runs[:, 3], runs[:, 1], runs[:, 2]))


class Regions:
    """Registered memory: to which piece an address belongs, and how large the pages of a piece are."""

    def __init__(self, pools: Sequence[str], states: Sequence[str]) -> None:
        self._names = {POOLS: list(pools), METADATA_CALL: list(METADATA)}
        self._states = list(states)
        self._calls = 0
        self._regions: list[tuple[int, int, str]] = []
        self._pages: dict[str, int] = {}

    def register(self, regions: Sequence[tuple[int, int]]) -> None:
        """One call of the backend's registration: (address, bytes) of each region."""
        names = self._names.get(self._calls, self._states)
        if self._calls == POOLS and len(regions) > len(names) + len(METADATA):  # states, too; a draft's if there is one
            names = [*names, *METADATA, *self._states]
        for address, size in regions:
            self._regions.append((address, size, names.pop(0) if names else UNKNOWN))
        self._regions.sort()
        self._calls += 1

    def piece(self, address: int) -> str:
        at = bisect_right(self._regions, (address, math.inf, "")) - 1
        if at < 0:
            return UNKNOWN
        start, size, name = self._regions[at]
        return name if address < start + size else UNKNOWN

    def named(self, blocks: Sequence[Block]) -> list[Block]:
        """The blocks with their pieces; what was joined is taken apart into pages, as far as any block was one page."""
        pages = []
        for block in blocks:
            name = self.piece(block.source)
            if name == UNKNOWN:
                pages.append(block)
                continue
            self._pages[name] = math.gcd(self._pages.get(name, 0), block.length)
            size = self._pages[name]
            pages += [
                Block(block.source + offset, block.target + offset, size, name)
                for offset in range(0, block.length, size)
            ]
        return pages


def lost(*pieces: str) -> Change:
    """Never written: decode reads what stands there."""
    return lambda blocks, memory: [block for block in blocks if block.piece not in pieces]


def half(*pieces: str) -> Change:
    """The second half of each page is never written."""

    def change(blocks: Sequence[Block], memory: Memory) -> Sequence[Block]:
        return [replace(block, length=block.length // 2) if block.piece in pieces else block for block in blocks]

    return change


def swapped(*pieces: str) -> Change:
    """The first two pages of a piece get each other's content."""

    def change(blocks: Sequence[Block], memory: Memory) -> Sequence[Block]:
        result = list(blocks)
        for piece in pieces:
            places = [at for at, block in enumerate(blocks) if block.piece == piece]
            if len(places) > 1:
                one, two = places[:2]
                result[one] = replace(blocks[one], source=blocks[two].source)
                result[two] = replace(blocks[two], source=blocks[one].source)
        return result

    return change


def from_before(*pieces: str) -> Change:
    """The pages of a piece are read where the transfer before this one read its own."""

    def change(blocks: Sequence[Block], memory: Memory) -> Sequence[Block]:
        result = list(blocks)
        for piece in pieces:
            places = [at for at, block in enumerate(blocks) if block.piece == piece]
            earlier = memory.earlier.get(piece, ())
            for at, source in zip(places, earlier):
                result[at] = replace(blocks[at], source=source)
            if places:
                memory.earlier[piece] = tuple(blocks[at].source for at in places)
        return result

    return change
