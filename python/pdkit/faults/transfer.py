"""A transfer backend with a switch: `--disaggregation-transfer-backend pdkit.faults:FaultyTransfer`."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pdkit.engine.transfer import KVTransfer, TransferBackend, load_backend
from pdkit.faults.engine import FaultyServer
from pdkit.faults.fault import Injection, Where
from pdkit.faults.switch import Switch

BACKEND_VARIABLE = "PDKIT_FAULT_BACKEND"


class FaultyTransfer(TransferBackend):
    """Meets transfers with the fault that is on, on top of the backend that PDKIT_FAULT_BACKEND names (default: tcp).

    A fault of what decode restores is applied as soon as decode's checks are behind: `DecodeReceiver` accepts what
    `incoming` returns before it gives the event loop a turn.
    """

    def __init__(self) -> None:
        self._switch = Switch.of_environment()
        FaultyServer.install(self._switch)
        self._backend = load_backend(os.environ.get(BACKEND_VARIABLE, "tcp"))

    def outgoing(self, kv_transfer: KVTransfer) -> KVTransfer | None:
        sent = self._backend.outgoing(kv_transfer)
        with self._injection(Where.PREFILL) as injection:
            return injection.apply(sent) if injection and sent else sent

    def wire(self, data: bytes) -> bytes:
        data = self._backend.wire(data)
        with self._injection(Where.WIRE) as injection:
            return injection.fault.wire(data) if injection and injection.is_met() and injection.fault.wire else data

    def incoming(self, kv_transfer: KVTransfer) -> KVTransfer:
        kv_transfer = self._backend.incoming(kv_transfer)
        with self._injection(Where.DECODE) as injection:
            if injection:
                changed = injection.apply(kv_transfer)
                assert changed is not None, "what decode checks has arrived"
                return changed
        asyncio.get_running_loop().call_soon(self._restored, kv_transfer)
        return kv_transfer

    def _restored(self, kv_transfer: KVTransfer) -> None:
        with self._injection(Where.RESTORE) as injection:
            if injection:
                changed = injection.apply(kv_transfer)
                assert changed is not None, "what decode restores has arrived"
                kv_transfer.tensors, kv_transfer.counts = changed.tensors, changed.counts

    @contextmanager
    def _injection(self, place: Where) -> Iterator[Injection | None]:
        injection = self._switch.injection(place)
        before = injection.met if injection else 0
        try:
            yield injection
        finally:
            if injection and injection.met > before:
                self._switch.record()
