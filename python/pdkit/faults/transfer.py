"""A transfer backend with a switch: `--disaggregation-transfer-backend pdkit.faults.transfer:FaultyTransfer`."""

import asyncio
import os

from pdkit.engine.transfer import KVTransfer, TransferBackend, load_backend
from pdkit.faults.engine import FaultyServer
from pdkit.faults.fault import Where
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
        return self._met(Where.PREFILL, sent) if sent else sent

    def wire(self, data: bytes) -> bytes:
        data = self._backend.wire(data)
        injection = self._switch.injection(Where.WIRE)
        if injection is None or injection.fault.wire is None or not injection.is_met():
            return data
        self._switch.record()
        return injection.fault.wire(data)

    def incoming(self, kv_transfer: KVTransfer) -> KVTransfer:
        kv_transfer = self._backend.incoming(kv_transfer)
        asyncio.get_running_loop().call_soon(self._restored, kv_transfer)
        changed = self._met(Where.DECODE, kv_transfer)
        assert changed is not None, "what decode checks has arrived"
        return changed

    def _restored(self, kv_transfer: KVTransfer) -> None:
        changed = self._met(Where.RESTORE, kv_transfer)
        assert changed is not None, "what decode restores has arrived"
        kv_transfer.tensors, kv_transfer.counts = changed.tensors, changed.counts

    def _met(self, place: Where, kv_transfer: KVTransfer) -> KVTransfer | None:
        """`kv_transfer` as it goes on from `place`. Raises what a fault there raises."""
        injection = self._switch.injection(place)
        if injection is None:
            return kv_transfer
        before = injection.met
        try:
            return injection.apply(kv_transfer)
        finally:
            if injection.met > before:
                self._switch.record()
