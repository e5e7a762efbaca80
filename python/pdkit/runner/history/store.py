"""The file that records are kept in: how a line gets into it, and how lines that are no records are met."""

import fcntl
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pdkit.runner.history.record import VERSION, Record


def append(path: Path, record: Record) -> None:
    """Adds one line, whole or not at all, also where others add at the same time. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        is_torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        line = b"\n" * is_torn + record.to_json().encode() + b"\n"
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(size)
            raise


@dataclass(frozen=True)
class History:
    """Records in the order of time, and one line for each line of a file that was skipped."""

    records: tuple[Record, ...]
    skipped: tuple[str, ...]


def read(paths: Iterable[Path]) -> History:
    """All records of some files; of two with the same line one is kept. Raises OSError."""
    from pydantic import TypeAdapter, ValidationError

    parser = TypeAdapter(Record)
    records, skipped = {}, []
    for path in paths:
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                record = parser.validate_json(line.replace(b'"rung":', b'"target":'))  # its name until November 2026
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                place = ".".join(map(str, first["loc"]))
                skipped.append(f"{path}:{number}: skipped, no record: {place + ': ' if place else ''}{first['msg']}")
                continue
            if record.version != VERSION:
                skipped.append(f"{path}:{number}: skipped, a record of version {record.version}, not {VERSION}")
                continue
            records[line] = record
    return History(tuple(sorted(records.values(), key=lambda record: record.time)), tuple(skipped))
