"""What a test hands over to the report of its run: one line of JSON each, in a file of the report directory.

    from pdkit.report.record import record_table

    record_table("recovery", ["event", "launch", "eval"], [["SIGKILL prefill", "recovered, 3.1 s", "502, then 200"]])

Without a report directory nothing is written: a test need not ask whether there is one.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VARIABLE = "PDKIT_REPORT_DIR"
FILE = "records.jsonl"


def record(kind: str, **fields: Any) -> None:
    """Appends {"kind": kind, "ts": seconds since 1970, **fields}; raises TypeError where a field is no JSON."""
    if directory := os.environ.get(VARIABLE):
        append(Path(directory), kind, **fields)


def append(directory: Path, kind: str, **fields: Any) -> None:
    """The same to a directory that is known. A line is written at once, so that processes may share the file."""
    line = json.dumps({"kind": kind, "ts": round(time.time(), 3), **fields}) + "\n"
    with open(directory / FILE, "ab", buffering=0) as file:
        file.write(line.encode())


def record_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
    """A table for the report: cells are texts and numbers, the first of a row is its heading."""
    rows = [list(row) for row in rows]
    assert all(len(row) == len(columns) for row in rows), (
        f"{title}: a row has not the {len(columns)} cells of {columns}"
    )
    record("table", title=title, columns=list(columns), rows=rows, note=note)
