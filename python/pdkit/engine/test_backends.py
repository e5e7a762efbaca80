"""Transfer backends of the embedded engine that tests start it with, by --disaggregation-transfer-backend.

pdkit.engine.test_backends:HeldTransfer   keeps KV transfers waiting (on prefill), or refuses them (on decode), while a
                                          file says so
pdkit.engine.test_backends:BitFlip        flips one bit of some KV transfers on the wire, and empties others
"""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import torch

from pdkit.engine.transfer import KVTransfer, TransferBackend, TransferError

HOLD_FILE_VARIABLE = "PDKIT_HOLD_FILE"
POLL_S = 0.02

# What happens to the KV transfer of a prompt of this length while the file says HOLD.
HELD_BEFORE = 301
HELD_DURING = 302


class Valve:
    """The file at `path`. One process turns it, the others look."""

    HOLD, REFUSE = "hold", "refuse"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def turn(self, word: str | None) -> None:
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(word or "")
        os.replace(new, self.path)

    def says(self, word: str) -> bool:
        return self.path.read_text() == word


class HeldTransfer(TransferBackend):
    """Plain TCP while the valve is open."""

    def __init__(self) -> None:
        path = os.environ.get(HOLD_FILE_VARIABLE)
        if not path:
            raise ValueError(f"{HOLD_FILE_VARIABLE} is not set; let it name the file that says what is held")
        self._valve = Valve(path)

    async def pieces(self, data: bytes) -> AsyncIterator[bytes]:
        """HELD_BEFORE: nothing leaves before the valve opens; HELD_DURING: one half does."""
        length = KVTransfer.unpack(data).prompt_tokens
        if length == HELD_BEFORE:
            await self._until_open()
        half = len(data) // 2 if length == HELD_DURING else len(data)
        yield data[:half]
        if half < len(data):
            await self._until_open()
            yield data[half:]

    def incoming(self, kv_transfer: KVTransfer) -> KVTransfer:
        if self._valve.says(Valve.REFUSE):
            raise TransferError("this decode server takes nothing")
        return kv_transfer

    async def _until_open(self) -> None:
        while self._valve.says(Valve.HOLD):
            await asyncio.sleep(POLL_S)


# Prompts of these lengths are hit, at this share of the bytes of their transfer: one length at least of each class of
# prompts, shorter than a window, a page, some pages, and longer than that.
BIT_FLIPS = {7: 0.5, 61: 0.5, 211: 0.0, 212: 0.5, 213: 1.0, 523: 0.5, 1021: 0.5}

# Nothing but zeros comes of the state of prompts of these lengths, with a checksum that is right.
WITHHELD = (8, 62, 214, 524, 1022)


class BitFlip(TransferBackend):
    """Flips a bit of the KV transfer of a prompt whose length is in BIT_FLIPS, and empties that of one in WITHHELD.

    Every other one arrives as it was sent.
    """

    def outgoing(self, kv_transfer: KVTransfer) -> KVTransfer:
        if kv_transfer.prompt_tokens not in WITHHELD:
            return kv_transfer
        empty = {name: torch.zeros_like(tensor) for name, tensor in kv_transfer.tensors.items()}
        return replace(kv_transfer, tensors=empty)

    def wire(self, data: bytes) -> bytes:
        share = BIT_FLIPS.get(KVTransfer.unpack(data).prompt_tokens)
        if share is None:
            return data
        place = round(share * (len(data) - 1))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
