"""Which registrations a command line selects, in which order, and how a suite is partitioned."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from pdkit.core import ci_register
from pdkit.core.errors import UsageError
from pdkit.core.registry import Collection, Registration
from pdkit.core.suggest import unknown
from pdkit.runner import narrow
from pdkit.runner.options import Options


@dataclass(frozen=True)
class Selection:
    """What a command line means: `enabled` run in this order, `disabled` are only named.

    `partition` maps the registrations of a partitioned suite to their partition, from 0. `measured` says of how many
    files the times are measured ones, where the command line names a file of such.
    """

    enabled: tuple[Registration, ...]
    disabled: tuple[Registration, ...] = ()
    partition: dict[Registration, int] = field(default_factory=dict)
    why_empty: str = ""
    measured: str = ""

    @property
    def est_time(self) -> float:
        return sum(r.est_time for r in self.enabled)


def _estimates(text: str, suite: str) -> dict[str, float]:
    """Seconds by file, from the model.json of SGLang's CI, a JSON object, or the JSON lines of a TIMINGS block.

    Empty where a model lacks `suite`. Raises ValueError, KeyError, TypeError or AttributeError where it is none of these.
    """
    try:
        estimates = json.loads(text)
    except ValueError:
        estimates = None
    if estimates is None or "elapsed" in estimates:
        records = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        estimates = {record["file"]: record["elapsed"] for record in records}
    if isinstance(estimates.get("est"), dict):
        estimates = estimates["est"].get(suite) or {}
    elif not estimates:
        raise ValueError("no estimates")
    for seconds in estimates.values():
        if isinstance(seconds, bool) or not 0 <= seconds < float("inf"):
            raise ValueError(seconds)
    return {name: float(seconds) for name, seconds in estimates.items()}


def with_estimates(registrations: list[Registration], path: Path, suite: str) -> tuple[list[Registration], str]:
    """The registrations with the times of a file, and one line that says for how many; est_time where it has none.

    A time is that of the longest path in the file that the path of the registered file ends with.
    """
    try:
        estimates = _estimates(path.read_text(), suite)
        problem = "" if estimates else f"it has no times for {suite}"
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "not a text file"
    except (ValueError, KeyError, TypeError, AttributeError):
        problem = (
            'expected {"est": {suite: {file: seconds}}}, {file: seconds} or lines {"file": ..., "elapsed": seconds}'
        )
    if problem:
        return registrations, f"no times from {path}: {problem}; est_time of all files"
    measured = {}
    for registration in registrations:
        parts = Path(registration.filename).parts
        tails = ("/".join(parts[-length:]) for length in range(len(parts), 0, -1))
        if tail := next((tail for tail in tails if tail in estimates), None):
            measured[registration] = replace(registration, est_time=estimates[tail])
    others = ", est_time of the others" if len(measured) < len(registrations) else ""
    line = f"times of {len(measured)} of {len(registrations)} files from {path}{others}"
    return [measured.get(registration, registration) for registration in registrations], line


def check_names(collection: Collection, hw: str | None, suite: str | None) -> None:
    """Raises UsageError, naming the nearest known ones, where hardware or suite is unknown."""
    if hw and hw not in collection.hardware:
        raise UsageError(unknown("hardware", hw, collection.hardware, len(collection.hardware)))
    suites = {name: collection.suites(name) for name in collection.hardware}
    asked = set().union(*(suites[name] for name in ([hw] if hw else suites)))
    if not suite or suite in asked:
        return
    if owners := [name for name in suites if suite in suites[name]]:
        raise UsageError(f"suite {suite!r} is not for hardware {hw!r} but for: {', '.join(owners)}")
    raise UsageError(unknown("suite", suite, asked or set().union(*suites.values())))


def select(collection: Collection, options: Options) -> Selection:
    """The registrations that `options` ask for; without hardware or suite, those of all.

    Raises UsageError for an unknown hardware or suite.
    """
    hw, suite = options.hw, options.suite
    check_names(collection, hw, suite)
    words = options.files or (narrow.last_failed(options.last_failed_file) if options.last_failed else ())
    names_files = options.files or options.last_failed
    chosen = narrow.named(collection, words) if names_files else list(collection.registrations)
    chosen = [r for r in chosen if hw in (None, r.hw) and suite in (None, r.suite)]
    of_suite = chosen
    if not names_files and (options.nightly or (hw and (suite or options.only))):
        chosen = [r for r in chosen if r.nightly == options.nightly]
    if options.only:
        chosen = [r for r in chosen if narrow.is_file_named(r, options.only) or narrow.has_test(r, options.only)]

    measured_of = ""
    if options.partition_model_file:
        chosen, measured_of = with_estimates(chosen, options.partition_model_file, suite or "")
    enabled = [r for r in chosen if r.is_enabled]
    disabled = [r for r in chosen if not r.is_enabled]

    partition = {}
    if options.partition_size:
        for rank in range(options.partition_size):
            members = ci_register.auto_partition(enabled, rank, options.partition_size)
            partition.update(dict.fromkeys(members, rank))
        if options.partition_id is not None:
            enabled = [r for r in enabled if partition[r] == options.partition_id]
    why_empty = "" if enabled else _why_empty(options, of_suite, disabled, partition)
    return Selection(tuple(enabled), tuple(disabled), partition, why_empty, measured_of)


def _why_empty(
    options: Options, of_suite: list[Registration], disabled: list[Registration], partition: dict[Registration, int]
) -> str:
    if options.only and of_suite and not disabled:
        return f"nothing in {len(of_suite)} file{'s' * (len(of_suite) != 1)} is called like {options.only!r} (-k)"
    if options.last_failed and not of_suite:
        return f"no file failed when it last ran, says {options.last_failed_file}"
    if partition:
        files = f"{len(partition)} file" + "s" * (len(partition) != 1)
        return f"partition {options.partition_id} of {options.partition_size} is empty: the suite has {files}"
    if disabled:
        return f"all {len(disabled)} registrations are disabled"
    if of_suite and options.nightly:
        return f"none of {len(of_suite)} registrations is nightly: leave --nightly out"
    if of_suite:
        return f"all {len(of_suite)} registrations are nightly: add --nightly"
    return "no file is registered"
