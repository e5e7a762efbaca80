"""A transfer backend with a switch: `--disaggregation-transfer-backend pdkit.faults:FaultyTransfer`."""

import asyncio
import os
from contextlib import contextmanager

from pdkit.engine.transfer import TransferBackend, load_backend
from pdkit.faults.engine import FaultyServer
from pdkit.faults.fault import Where
from pdkit.faults.switch import Switch

BACKEND_VARIABLE = "PDKIT_FAULT_BACKEND"


class FaultyTransfer(TransferBackend):
    """Meets transfers with the fault that is on, on top of the backend that PDKIT_FAULT_BACKEND names (default: tcp).

    A fault of what decode restores is applied as soon as decode's checks are behind: `DecodeReceiver` accepts what
    `incoming` returns before it gives the event loop a turn.
    """

    def __init__(self):
        self._switch = Switch.of_environment()
        FaultyServer.install(self._switch)
        self._backend = load_backend(os.environ.get(BACKEND_VARIABLE, "tcp"))

    def outgoing(self, kv_transfer):
        kv_transfer = self._backend.outgoing(kv_transfer)
        with self._injection(Where.PREFILL) as injection:
            return injection.apply(kv_transfer) if injection and kv_transfer else kv_transfer

    def wire(self, data):
        data = self._backend.wire(data)
        with self._injection(Where.WIRE) as injection:
            return injection.fault.wire(data) if injection and injection.is_met() else data

    def incoming(self, kv_transfer):
        kv_transfer = self._backend.incoming(kv_transfer)
        with self._injection(Where.DECODE) as injection:
            if injection:
                return injection.apply(kv_transfer)
        asyncio.get_running_loop().call_soon(self._restored, kv_transfer)
        return kv_transfer

    def _restored(self, kv_transfer):
        with self._injection(Where.RESTORE) as injection:
            if injection:
                changed = injection.apply(kv_transfer)
                kv_transfer.tensors, kv_transfer.counts = changed.tensors, changed.counts

    @contextmanager
    def _injection(self, place):
        injection = self._switch.injection(place)
        before = injection.met if injection else 0
        try:
            yield injection
        finally:
            if injection and injection.met > before:
                self._switch.record()
