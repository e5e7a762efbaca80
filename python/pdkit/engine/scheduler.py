"""The torch thread: the only one that touches the model.

Prefill goes first, a chunk at a time, in order of arrival. Decode steps batches of sequences of equal length; the
shortest batch steps first, so that it meets the longer ones and joins them. A batch that had to wait `PATIENCE`
seconds goes before shorter ones.
"""

import os
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.cache_utils import DynamicCache

from pdkit.core.errors import ExitCode
from pdkit.engine import state
from pdkit.engine.model_runner import ROWS, ModelRunner, gather_rows
from pdkit.engine.prefix_cache import PrefixCache
from pdkit.engine.request import Request

PATIENCE = 1.0
Prefilled = Callable[[Request, DynamicCache | None], Any]


@dataclass
class Counters:
    """Work of one server, as `/server_info` reports it. Tokens that came from a cache are not prefilled."""

    requests: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0


@dataclass
class _Batch:
    """Requests of one length; row i of `cache` belongs to requests[i]. Rows beyond them are padding."""

    requests: list[Request]
    cache: DynamicCache
    stepped: float = field(default_factory=time.monotonic)

    @property
    def length(self) -> int:
        return self.cache.get_seq_length()

    def live(self) -> list[int]:
        return [row for row, request in enumerate(self.requests) if request.finish_reason is None]


def _merge(batches: Sequence[_Batch]) -> _Batch:
    rows = [batch.live() for batch in batches]
    requests = [batch.requests[row] for batch, chosen in zip(batches, rows) for row in chosen]
    cache = gather_rows([(batch.cache, chosen) for batch, chosen in zip(batches, rows) if chosen])
    return _Batch(requests, cache, min(batch.stepped for batch in batches))


class Scheduler:
    """Owns the thread. `prefix_cache` may be None. Public methods may be called from any thread."""

    def __init__(self, runner: ModelRunner, prefix_cache: PrefixCache | None = None) -> None:
        self.runner, self.prefix_cache, self.counters = runner, prefix_cache, Counters()
        self._inbox: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._prefills: deque[tuple[Request, Prefilled, DynamicCache | None]] = deque()
        self._batches: list[_Batch] = []
        self._thread = threading.Thread(target=self._run, name="torch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, action: Callable[[], Any], done: Callable[[Any], Any] = lambda result: None) -> None:
        """Run action() on the torch thread, then done(result) there."""
        self._inbox.put(lambda: done(action()))

    def generate(self, request: Request) -> None:
        """Prefill and decode here: the monolithic server."""
        self._inbox.put(lambda: self._add_prefill(request, self._start_decode))

    def prefill(self, request: Request, done: Prefilled) -> None:
        """Prefill only. done(request, cache) runs on the torch thread; cache is None if the request was aborted."""
        self._inbox.put(lambda: self._add_prefill(request, done))

    def decode(self, request: Request, cache: DynamicCache) -> None:
        """Go on from a state that came from elsewhere; the request already holds its first token."""
        self._inbox.put(lambda: self._join(request, cache))

    def _add_prefill(self, request: Request, done: Prefilled) -> None:
        self.counters.requests += 1
        self._prefills.append((request, done, None))

    def _join(self, request: Request, cache: DynamicCache) -> None:
        self.counters.requests += 1
        self._start_decode(request, cache)

    def _start_decode(self, request: Request, cache: DynamicCache | None) -> None:
        if request.finish_reason is None and cache is not None:
            self._batches.append(_Batch([request], gather_rows([(cache, [0])])))

    def _run(self) -> None:
        try:
            while True:
                busy = self._prefills or self._batches
                while not self._inbox.empty() or not busy:
                    self._inbox.get()()
                    busy = self._prefills or self._batches
                if self._prefills:
                    self._prefill_chunk()
                else:
                    self._decode_batch()
        except BaseException:
            traceback.print_exc()
            print("the torch thread failed; the server ends", file=sys.stderr, flush=True)
            os._exit(ExitCode.FAILED)

    def _prefill_chunk(self) -> None:
        request, done, cache = self._prefills.popleft()
        if request.finish_reason is not None:
            done(request, None)
            return
        if cache is None:
            cache = self._cached_prefix(request)
            request.cached_tokens = cache.get_seq_length()
        start = cache.get_seq_length()
        logits = self.runner.prefill_step(request.ids, cache, request.keep_from)
        end = cache.get_seq_length()
        self.counters.prefill_tokens += end - start
        if self.prefix_cache is not None:
            self.prefix_cache.insert(request.ids, cache, request.extra_key)
        request.add_prompt_logits(end - len(logits), logits)
        if end < len(request.ids):
            self._prefills.appendleft((request, done, cache))
        else:
            request.add_output_logits(logits[-1])
            done(request, None if request.is_aborted else cache)

    def _cached_prefix(self, request: Request) -> DynamicCache:
        found = None
        if self.prefix_cache is not None:
            found = self.prefix_cache.match(request.ids, request.keep_from, request.extra_key)
        return found or state.new_cache(self.runner.config)

    def _next_batch(self) -> _Batch:
        now = time.monotonic()
        waiting = min(self._batches, key=lambda batch: batch.stepped)
        if now - waiting.stepped > PATIENCE:
            return waiting
        return min(self._batches, key=lambda batch: batch.length)

    def _decode_batch(self) -> None:
        batch = self._next_batch()
        peers = [other for other in self._batches if other.length == batch.length]
        rows = sum(len(peer.live()) for peer in peers)
        if len(peers) > 1 or -(-rows // ROWS) < -(-len(batch.requests) // ROWS):
            self._batches = [other for other in self._batches if other.length != batch.length]
            if not rows:
                return
            batch = _merge(peers)
            self._batches.append(batch)
        padded = -(-len(batch.requests) // ROWS) * ROWS
        tokens = [request.output_ids[-1] for request in batch.requests]
        logits = self.runner.decode_step(tokens + tokens[-1:] * (padded - len(tokens)), batch.cache)
        batch.stepped = time.monotonic()
        live = batch.live()
        self.counters.decode_steps += 1
        self.counters.decode_tokens += len(live)
        for row in live:
            batch.requests[row].add_output_logits(logits[row])
        if not batch.live():
            self._batches.remove(batch)
