"""Which fault is on: a small file that servers and load balancer read at each request, so that they stay up."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdkit.core.suggest import unknown
from pdkit.faults.fault import Fault, Injection, Where
from pdkit.faults.library import LIBRARY

VARIABLE = "PDKIT_FAULT_FILE"


class UnknownFault(ValueError):
    """No fault has the name asked for; the message is one line that names the nearest."""


class Switch:
    """The file at `path`. One process turns it; the others read it. `library`: the faults that there are, by name."""

    def __init__(self, path: str | Path, library: Mapping[str, Any] = LIBRARY) -> None:
        self.path, self.library = Path(path), library
        self._met_file = self.path.with_name(self.path.name + ".met")
        self._text: str | None = None
        self._injections: dict[Where, Injection] = {}

    @classmethod
    def of_environment(cls) -> "Switch":
        """The switch that this process was started with. Raises ValueError with one line for the user."""
        path = os.environ.get(VARIABLE)
        if not path:
            raise ValueError(f"{VARIABLE} is not set; let it name the file that says which fault is on")
        return cls(path)

    def turn(self, name: str | None) -> None:
        """Turn the fault on, None: all off; either begins a new run. Raises UnknownFault."""
        if name is not None:
            find(name, self.library)
        run = json.loads(self._read() or "{}").get("run", 0) + 1
        self._met_file.write_bytes(b"")
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps({"run": run, "fault": name}))
        os.replace(new, self.path)

    def name(self) -> str | None:
        return json.loads(self._read() or "{}").get("fault")

    def met(self) -> int:
        """How many requests met the fault since it was turned on, in all processes together."""
        return self._met_file.stat().st_size if self._met_file.exists() else 0

    def record(self) -> None:
        """Say that one more request met the fault."""
        with open(self._met_file, "ab", buffering=0) as file:
            file.write(b".")

    def injection(self, *places: Where) -> Injection | None:
        """The run of the fault that is on, if it acts at one of `places`; the same one until the switch is turned."""
        text = self._read()
        if text != self._text:
            name = json.loads(text or "{}").get("fault")
            fault = find(name, self.library) if name else None
            self._text, self._injections = text, {fault.where: Injection(fault)} if fault else {}
        return next((self._injections[place] for place in places if place in self._injections), None)

    def _read(self) -> str:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return ""


def find(name: str, library: Mapping[str, Fault] = LIBRARY) -> Fault:
    """Raises UnknownFault."""
    if name not in library:
        raise UnknownFault(unknown("fault", name, library))
    return library[name]
