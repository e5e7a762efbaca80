"""Snapshots of prefill states at chunk boundaries, so that prompts with a common beginning share its computation."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from transformers.cache_utils import DynamicCache

from pdkit.engine import state

CAPACITY = 512


class PrefixCache:
    """Least recently used entry goes first. `grain`: tokens a chunk; `capacity`: entries."""

    def __init__(self, grain: int, capacity: int = CAPACITY) -> None:
        self.grain, self.capacity = grain, capacity
        self._entries: OrderedDict[tuple[str | None, bytes], DynamicCache] = OrderedDict()

    @staticmethod
    def _key(ids: Sequence[int], length: int, extra_key: str | None) -> tuple[str | None, bytes]:
        return extra_key, array("l", ids[:length]).tobytes()

    def match(self, ids: Sequence[int], limit: int, extra_key: str | None = None) -> DynamicCache | None:
        """The cache of the longest known prefix of `ids` of at most `limit` tokens, ready to be continued; or None."""
        for length in range(limit // self.grain * self.grain, 0, -self.grain):
            key = self._key(ids, length, extra_key)
            if key in self._entries:
                self._entries.move_to_end(key)
                return state.snapshot(self._entries[key])
        return None

    def insert(self, ids: Sequence[int], cache: DynamicCache, extra_key: str | None = None) -> None:
        """Remember `cache`, the state of its own length of `ids`, if it ends on a chunk boundary."""
        length = cache.get_seq_length()
        if length % self.grain:
            return
        key = self._key(ids, length, extra_key)
        if key not in self._entries:
            self._entries[key] = state.snapshot(cache)
            while len(self._entries) > self.capacity:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
