"""Mooncake's engine and NIXL's agent with a tap in between: what they are asked to write goes through a fault.

install()    in a process, before SGLang imports a backend
"""

import importlib
import json
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdkit.faults.real_engine.blocks import METADATA, Block, Memory, Regions, rows_of
from pdkit.faults.real_engine.library import LIBRARY, TransferFault
from pdkit.faults.switch import Switch

SWITCH_VARIABLE, PIECES_VARIABLE = "PDKIT_TRANSFER_FAULT_FILE", "PDKIT_TRANSFER_PIECES"
MODULES = {"mooncake.engine": "TransferEngine", "nixl._api": "nixl_agent"}
LOOK_S = 0.05
REMEMBERED_LISTS = 512


class Tap:
    """Between SGLang and a backend: which fault is on, and what it makes of a transfer."""

    def __init__(self, switch: Switch, regions: Regions) -> None:
        self.switch, self.regions = switch, regions
        self._name: str | None = None
        self._memory = Memory()
        self._lock = threading.Lock()

    @classmethod
    def of_environment(cls) -> "Tap":
        pools, states = json.loads(os.environ[PIECES_VARIABLE])
        return cls(Switch(os.environ[SWITCH_VARIABLE], LIBRARY), Regions(pools, states))

    def fault(self) -> TransferFault | None:
        """The fault that is on, or None."""
        name = self.switch.name()
        return LIBRARY[name] if name else None

    def register(self, regions: Iterable[Any]) -> None:
        self.regions.register([(int(address), int(size)) for address, size in regions])

    def changed(self, fault: TransferFault | None, blocks: list[Block]) -> list[Block]:
        """What becomes of `blocks`. Every transfer passes here, so that the sizes of pages are known."""
        with self._lock:
            pages = self.regions.named(blocks)
            if fault is None:
                return blocks
            if fault.name != self._name:
                self._name, self._memory = fault.name, Memory()
            result = list(fault.change(pages, self._memory)) if fault.change else blocks
        if (fault.delay and not self.is_on_time(fault, blocks)) or (fault.change and result != pages):
            self.switch.record()
        return result if fault.change else blocks

    def is_on_time(self, fault: TransferFault, blocks: list[Block]) -> bool:
        """Whether nothing is late. Of what is reported early, metadata are not: decode waits for them."""
        return not fault.delay or (fault.early and all(self.regions.piece(each.source) in METADATA for each in blocks))


def wrapped_engine(original: Any, tap: Tap) -> type:
    """A class that SGLang takes for Mooncake's TransferEngine."""

    class TransferEngine:
        def __init__(self, *args: Any, **options: Any) -> None:
            self._engine = original(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._engine, name)

        def batch_register_memory(self, addresses: Sequence[int], sizes: Sequence[int]) -> Any:
            tap.register(zip(addresses, sizes))
            return self._engine.batch_register_memory(addresses, sizes)

        def batch_transfer_sync_write(
            self, session: str, sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int]
        ) -> Any:
            fault = tap.fault()
            blocks = tap.changed(
                fault,
                [
                    Block(int(source), int(target), int(length))
                    for source, target, length in zip(sources, targets, lengths)
                ],
            )
            if fault is None:
                return self._engine.batch_transfer_sync_write(session, sources, targets, lengths)
            if tap.is_on_time(fault, blocks):
                return self._write(session, blocks)
            if fault.early:
                threading.Timer(fault.delay, self._write, (session, blocks)).start()
                return 0
            time.sleep(fault.delay)
            return self._write(session, blocks)

        def _write(self, session: str, blocks: Any) -> Any:
            if not blocks:
                return 0
            sources, targets, lengths = zip(*((block.source, block.target, block.length) for block in blocks))
            return self._engine.batch_transfer_sync_write(session, list(sources), list(targets), list(lengths))

    return TransferEngine


@dataclass
class Announced:
    """In place of a NIXL transfer: its notification goes first, and the transfer, if there is one, `delay` s later."""

    peer: str
    message: bytes
    transfer: object = None
    delay: float = 0.0


def wrapped_agent(original: Any, tap: Tap) -> Any:
    """A subclass of NIXL's agent."""

    class Agent(original):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._lists: dict[int, Any] = {}
            self._lists_lock = threading.Lock()
            super().__init__(*args, **options)

        def register_memory(self, regions: Any, mem_type: Any = None, *args: Any, **options: Any) -> Any:
            tap.register((region[0], region[1]) for region in regions)
            return super().register_memory(regions, mem_type, *args, **options)

        def prep_xfer_dlist(
            self, agent_name: str, xfer_list: Any, mem_type: Any = None, *args: Any, **options: Any
        ) -> Any:
            handle = super().prep_xfer_dlist(agent_name, xfer_list, mem_type, *args, **options)
            self._remember(handle, xfer_list, mem_type, agent_name)
            return handle

        def get_xfer_descs(self, descs: Any, mem_type: Any = None) -> Any:
            result = super().get_xfer_descs(descs, mem_type)
            self._remember(result, descs, mem_type, None)
            return result

        def _remember(self, handle: Any, rows: Any, kind: Any, peer: Any) -> None:
            """What a list of descriptors was made of; of those that serve one transfer, the newest only."""
            with self._lists_lock:
                self._lists[id(handle)] = handle, np.asarray(rows, dtype=np.uint64), kind, peer
                passing = [key for key, (_, _, _, peer) in self._lists.items() if peer is None]
                for key in passing[:-REMEMBERED_LISTS]:
                    del self._lists[key]

        def make_prepped_xfer(
            self,
            operation: str,
            local: Any,
            local_rows: Any,
            remote: Any,
            remote_rows: Any,
            notif_msg: bytes = b"",
            *args: Any,
            **options: Any,
        ) -> Any:
            _, sources, source_kind, _ = self._lists[id(local)]
            _, targets, target_kind, peer = self._lists[id(remote)]
            rows = rows_of(sources, local_rows), rows_of(targets, remote_rows)
            changed = self._changed(operation, *rows, source_kind, target_kind, peer, notif_msg)
            if changed is not None:
                return changed
            asked = operation, local, local_rows, remote, remote_rows, notif_msg
            return super().make_prepped_xfer(*asked, *args, **options)

        def initialize_xfer(
            self,
            operation: str,
            local: Any,
            remote: Any,
            remote_agent: str,
            notif_msg: bytes = b"",
            *args: Any,
            **options: Any,
        ) -> Any:
            (_, sources, source_kind, _), (_, targets, target_kind, _) = self._lists[id(local)], self._lists[id(remote)]
            changed = self._changed(operation, sources, targets, source_kind, target_kind, remote_agent, notif_msg)
            if changed is not None:
                return changed
            return super().initialize_xfer(operation, local, remote, remote_agent, notif_msg, *args, **options)

        def _changed(
            self,
            operation: str,
            sources: Any,
            targets: Any,
            source_kind: Any,
            target_kind: Any,
            peer: str,
            message: bytes,
        ) -> Any:
            """A transfer in place of the one that is asked for; None to leave it as it is."""
            fault = tap.fault()
            asked = [Block(int(s[0]), int(t[0]), int(s[1])) for s, t in zip(sources, targets)]
            blocks = tap.changed(fault, asked)
            if fault is None:
                return None
            late = not tap.is_on_time(fault, blocks)
            early = late and fault.early
            if late and not early:
                time.sleep(fault.delay)
            if not blocks:
                return Announced(peer, message)
            local = [(block.source, block.length, int(sources[0][2])) for block in blocks]
            remote = [(block.target, block.length, int(targets[0][2])) for block in blocks]
            transfer = super().initialize_xfer(
                operation,
                super().get_xfer_descs(np.array(local, dtype=np.uint64), source_kind),
                super().get_xfer_descs(np.array(remote, dtype=np.uint64), target_kind),
                peer,
                b"" if early else message,
            )
            return Announced(peer, message, transfer, fault.delay) if early else transfer

        def transfer(self, handle: Any, *args: Any, **options: Any) -> Any:
            if not isinstance(handle, Announced):
                return super().transfer(handle, *args, **options)
            if handle.message:  # from 0.5.23 on SGLang sends it by itself, once all is written
                self.send_notif(handle.peer, handle.message)
            if handle.transfer is not None:
                threading.Timer(handle.delay, super().transfer, (handle.transfer,)).start()
            return "DONE"

        def check_xfer_state(self, handle: Any) -> Any:
            return "DONE" if isinstance(handle, Announced) else super().check_xfer_state(handle)

    return Agent


def watch_environment(tap: Tap) -> None:
    """Gives this process the environment variables of the fault that is on, for as long as it is."""
    names = {name for fault in LIBRARY.values() for name in fault.environment}
    while True:
        fault = tap.fault()
        wanted = fault.environment if fault else {}
        for name in names:
            if name in wanted and os.environ.get(name) != wanted[name]:
                os.environ[name] = wanted[name]
                tap.switch.record()
            elif name not in wanted:
                os.environ.pop(name, None)
        time.sleep(LOOK_S)


def install() -> None:
    """Wraps the backends of this process, those that there are."""
    tap = Tap.of_environment()
    for wrap, (module, name) in zip((wrapped_engine, wrapped_agent), MODULES.items()):
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        setattr(found, name, wrap(getattr(found, name), tap))

    def watch() -> None:
        threading.Thread(target=watch_environment, args=(tap,), daemon=True).start()

    watch()
    os.register_at_fork(after_in_child=watch)  # threads do not survive a fork, and a forked scheduler transfers
