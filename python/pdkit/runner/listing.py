"""What would run, as a table for people and as JSON for programs."""

import json

from pdkit.core.console import columns
from pdkit.runner.options import Options
from pdkit.runner.select import Selection

HEADER = ("FILE", "SUITE", "HW", "EST", "NIGHTLY", "PARTITION", "DISABLED")
NUMERIC = (HEADER.index("EST"), HEADER.index("PARTITION"))


def table(selection: Selection, options: Options) -> str:
    """Aligned columns, one line per registration, and a closing line with the totals."""
    rows = [HEADER]
    for r in selection.enabled + selection.disabled:
        nightly = "yes" if r.nightly else "no"
        why = "-" if r.is_enabled else r.disabled or "no reason given"
        part = f"{selection.partition[r]}/{options.partition_size}" if r in selection.partition else "-"
        rows.append((r.name, r.suite, r.hw, f"{r.est_time:g} s", nightly, part, why))
    files = len({r.filename for r in selection.enabled})
    line = f"{files} file{'s' * (files != 1)} would run, estimated {selection.est_time:g} s"
    line += f"; {len(selection.disabled)} disabled" if selection.disabled else ""
    line += f"; {selection.why_empty}" if selection.why_empty else ""
    return f"{columns(rows, right=NUMERIC)}\n{line}"


def as_json(selection: Selection, options: Options) -> str:
    """The same as one JSON object; `files` holds one entry per registration, times are in seconds."""
    files = [
        r.as_dict() | {"nightly": r.nightly, "disabled": r.disabled, "partition": selection.partition.get(r)}
        for r in selection.enabled + selection.disabled
    ]
    document = {
        **{name: getattr(options, name) for name in ("hw", "suite", "nightly", "partition_size")},
        "est_time": selection.est_time,
        "files": files,
    }
    return json.dumps(document, indent=2)
