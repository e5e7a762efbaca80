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
    """Meets hand-overs with the fault that is on, on top of the backend that PDKIT_FAULT_BACKEND names (default: tcp).

    A fault of what decode restores is applied as soon as decode's checks are behind: `DecodeReceiver` accepts what
    `incoming` returns before it gives the event loop a turn.
    """

    def __init__(self):
        self._switch = Switch.of_environment()
        FaultyServer.install(self._switch)
        self._backend = load_backend(os.environ.get(BACKEND_VARIABLE, "tcp"))

    def outgoing(self, handover):
        handover = self._backend.outgoing(handover)
        with self._encounter(Where.PREFILL) as encounter:
            return encounter.apply(handover) if encounter and handover else handover

    def wire(self, data):
        data = self._backend.wire(data)
        with self._encounter(Where.WIRE) as encounter:
            return encounter.fault.wire(data) if encounter and encounter.is_met() else data

    def incoming(self, handover):
        handover = self._backend.incoming(handover)
        with self._encounter(Where.DECODE) as encounter:
            if encounter:
                return encounter.apply(handover)
        asyncio.get_running_loop().call_soon(self._restored, handover)
        return handover

    def _restored(self, handover):
        with self._encounter(Where.RESTORE) as encounter:
            if encounter:
                changed = encounter.apply(handover)
                handover.tensors, handover.counts = changed.tensors, changed.counts

    @contextmanager
    def _encounter(self, place):
        encounter = self._switch.encounter(place)
        before = encounter.met if encounter else 0
        try:
            yield encounter
        finally:
            if encounter and encounter.met > before:
                self._switch.record()
