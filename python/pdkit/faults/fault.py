"""What a fault is: where it stands in the way of a request, which requests it meets, and what it does to them."""

import zlib
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np
import torch

from pdkit.engine.transfer import KVTransfer
from pdkit.faults import pieces
from pdkit.faults.pieces import Kind

REMEMBERED = 64
SHARED_ENTRIES = 8


class Where(Enum):
    """Where a fault acts."""

    PREFILL = "prefill, before the KV transfer is packed"
    WIRE = "the bytes on the wire"
    DECODE = "decode, before it checks the KV transfer"
    RESTORE = "decode, after its checks"
    LB = "the load balancer"
    SERVER = "a server, beside the transfer"


@dataclass
class Context:
    """A fault and one KV transfer that it meets.

    earlier: KV transfers that passed here before this one, unharmed, oldest first. rng: its own for each context, the
    same in each run.
    """

    earlier: deque[KVTransfer]
    rng: np.random.Generator


Change = Callable[[KVTransfer, Context], KVTransfer | None]


@dataclass(frozen=True)
class Fault:
    """A named fault.

    change    of KV transfers: the changed one, None if it is never sent; may raise TransferError
    wire      of bytes
    trick     the name of what a load balancer (`pdkit.faults.load_balancer`) or a server (`pdkit.faults.engine`) does
    size      its parameter: how much, from how many tokens on, at which place
    every     it meets one in so many requests
    after     it begins after so many requests
    only_served  it shows only where servers serve: in long prompts, or in requests at the same time
    asks      the tests that are about faults of its kind; () all those that are about the state of a request
    says      a pattern of the headline that names its kind; "" where any failure will do
    resembles a bug of the field that had this shape
    harmless  why it changes no logit, token or status, if it is known not to
    """

    name: str
    what: str
    where: Where
    change: Change | None = None
    wire: Callable[[bytes], bytes] | None = None
    trick: str = ""
    size: float = 0
    every: int = 1
    after: int = 0
    only_served: bool = False
    asks: tuple[str, ...] = ()
    says: str = ""
    resembles: str = ""
    harmless: str = ""

    def __post_init__(self) -> None:
        acts = {Where.WIRE: self.wire, Where.LB: self.trick, Where.SERVER: self.trick}.get(self.where, self.change)
        assert acts and self.every >= 1 and self.after >= 0, self.name

    @property
    def is_of_the_transfer(self) -> bool:
        """Whether it can be tried in this process, on the state of a request alone."""
        return self.where not in (Where.LB, Where.SERVER) and not self.only_served


@dataclass
class Injection:
    """The run of one fault at one place: counts KV transfers, remembers them, applies the fault to those it meets."""

    fault: Fault
    seen: int = 0
    met: int = 0
    earlier: deque[KVTransfer] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def is_met(self) -> bool:
        """Counts a request; True if it is met: the last one of each `every`, of those past the first `after`."""
        self.seen += 1
        begun = self.seen - self.fault.after
        met = begun > 0 and begun % self.fault.every == 0
        self.met += met
        return met

    def apply(self, kv_transfer: KVTransfer) -> KVTransfer | None:
        """`kv_transfer` as it goes on from here. Raises what the fault raises."""
        context = Context(self.earlier, np.random.default_rng([zlib.crc32(self.fault.name.encode()), self.seen]))
        try:
            is_met, change = self.is_met(), self.fault.change
            return change(kv_transfer, context) if is_met and change else kv_transfer
        finally:
            self.earlier.append(kv_transfer)


def changed(
    kv_transfer: KVTransfer, kinds: Collection[Kind], operation: Callable[[str, Kind, torch.Tensor], torch.Tensor]
) -> KVTransfer:
    """`kv_transfer` with operation(name, kind, tensor) in place of each tensor of `kinds`."""
    names = kv_transfer.tensors
    of_kind = ((name, pieces.kind_of(name, names)) for name in names)
    new = {name: operation(name, kind, names[name]) for name, kind in of_kind if kind in kinds}
    return replace(kv_transfer, tensors={**names, **new})


def on_tensors(kinds: Collection[Kind], operation: Callable[..., Any]) -> Change:
    """operation(tensor) on each tensor of `kinds`."""
    return lambda kv_transfer, context: changed(kv_transfer, kinds, lambda name, kind, tensor: operation(tensor))


def on_counts(kinds: Collection[Kind], operation: Callable[..., Any]) -> Change:
    """operation(count) on each count of `kinds`."""

    def change(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
        names = kv_transfer.tensors.keys() | kv_transfer.counts.keys()
        changed = {
            name: operation(count) if pieces.kind_of(name, names) in kinds else count
            for name, count in kv_transfer.counts.items()
        }
        return replace(kv_transfer, counts=changed)

    return change


def at_random(operation: Callable[..., Any]) -> Change:
    """operation(tensor, rng) on every tensor that has elements."""
    return lambda kv_transfer, context: changed(
        kv_transfer,
        pieces.TENSORS,
        lambda name, kind, tensor: operation(tensor, context.rng) if tensor.numel() else tensor,
    )


def missing(kind: Kind) -> Change:
    """The tensors, or counts, of `kind` are not in the message."""

    def change(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
        names = kv_transfer.tensors.keys() | kv_transfer.counts.keys()
        kept = {name for name in names if pieces.kind_of(name, names) is not kind}
        return replace(
            kv_transfer,
            tensors={name: tensor for name, tensor in kv_transfer.tensors.items() if name in kept},
            counts={name: count for name, count in kv_transfer.counts.items() if name in kept},
        )

    return change


def newest_tokens(tokens: int, operation: Callable[..., Any], kinds: Collection[Kind] = pieces.TENSORS) -> Change:
    """operation(tensor, rows) with the number of newest rows that the newest `tokens` tokens touch."""

    def change(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
        def without_newest(name: str, kind: Kind, tensor: torch.Tensor) -> torch.Tensor:
            return operation(tensor, pieces.rows_of_newest(kind, kv_transfer.prompt_tokens, tokens))

        return changed(kv_transfer, kinds, without_newest)

    return change


def left_over(kinds: Collection[Kind]) -> Change:
    """The tensors of `kinds` as the KV transfer before this one left them in these slots."""

    def change(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
        before = context.earlier[-1].tensors if context.earlier else {}
        return changed(
            kv_transfer, kinds, lambda name, kind, tensor: pieces.overlaid(before.get(name), pieces.zeroed(tensor))
        )

    return change


def from_same_beginning(
    kinds: Collection[Kind],
    among: Callable[[KVTransfer, Context], Sequence[KVTransfer]] = lambda _, context: context.earlier,
) -> Change:
    """The tensors of `kinds` hold the rows of the earlier request that shares the longest beginning with this one."""

    def change(kv_transfer: KVTransfer, context: Context) -> KVTransfer | None:
        other = same_beginning(kv_transfer, among(kv_transfer, context))
        if other is None:
            return kv_transfer
        return changed(kv_transfer, kinds, lambda name, kind, tensor: pieces.overlaid(other.tensors.get(name), tensor))

    return change


def same_beginning(kv_transfer: KVTransfer, earlier: Sequence[KVTransfer]) -> KVTransfer | None:
    """Of `earlier`, the one that shares the longest beginning of at least SHARED_ENTRIES 4x entries, but not all of it.

    The first 4x layer tells: its entries see the tokens before them only.
    """
    names = kv_transfer.tensors
    probe = next(name for name in sorted(names) if pieces.kind_of(name, names) is Kind.C4_COMPRESSED)
    own = kv_transfer.tensors[probe].shape[-2]
    best, longest = None, SHARED_ENTRIES - 1
    for other in reversed(earlier):
        shared = pieces.common_rows(kv_transfer.tensors[probe], other.tensors[probe])
        if longest < shared < own:
            best, longest = other, shared
    return best
