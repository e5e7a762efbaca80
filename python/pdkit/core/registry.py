"""Which test files are registered, for which hardware and suite, and which of them a command line selects."""

import gc
import json
import os
import re
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

from pdkit.core import ci_register, top_level
from pdkit.core.suggest import unknown
from pdkit.runner.options import Options, UsageError

PROJECT_SUITES = {
    "cpu": ("stage-a-test-cpu",),
    "cuda": (
        "stage-b-test-1-gpu-large",
        "stage-b-test-2-gpu-large",
        "stage-c-test-4-gpu-h100",
        "stage-c-test-dsv4-8-gpu-h200",
    ),
}

_REGISTERS = re.compile(rb"^register_\w+_ci\s*\(", re.MULTILINE)


@dataclass(frozen=True)
class Registration:
    """One `register_<hw>_ci(...)` call of one file; `est_time` in seconds."""

    filename: str
    name: str
    hw: str
    suite: str
    est_time: float
    nightly: bool = False
    disabled: str | None = None

    @property
    def is_enabled(self) -> bool:
        return self.disabled is None


@dataclass(frozen=True)
class Collection:
    """All registrations below one directory, and one line for each file that breaks a rule."""

    registrations: tuple[Registration, ...]
    errors: tuple[str, ...]
    hardware: tuple[str, ...]

    def suites(self, hw: str) -> set[str]:
        """Suites that some file registers for `hw`, and those that this project defines."""
        return {r.suite for r in self.registrations if r.hw == hw} | set(PROJECT_SUITES.get(hw, ()))


@dataclass(frozen=True)
class Selection:
    """What a command line means: `enabled` run in this order, `disabled` are only named.

    `partition` maps the registrations of a partitioned suite to their partition, from 0. `measured` says of how many
    files the times are measured ones, where the command line names a file of such.
    """

    enabled: tuple[Registration, ...]
    disabled: tuple[Registration, ...]
    partition: dict[Registration, int]
    why_empty: str = ""
    measured: str = ""

    @property
    def est_time(self) -> float:
        return sum(r.est_time for r in self.enabled)


def _parse_top_level(rules: ModuleType, filename: str):
    """What SGLang's `ut_parse_one_file` finds, by SGLang's own visitor."""
    source = Path(filename).read_bytes()
    if b"register_" not in source:
        return [], False
    visitor = rules.RegistryVisitor(filename)
    visitor.visit(top_level.parse(source, filename))
    return visitor.registries, visitor.has_main_entry


@contextmanager
def _no_garbage_collection():
    """Syntax trees hold no cycles, yet make the collector walk them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _is_test(path: str, name: str) -> bool:
    if not name.endswith(".py"):
        return False
    if name.startswith("test_"):
        return True
    try:
        return bool(_REGISTERS.search(Path(path).read_bytes()))
    except OSError:
        return True


def find_test_files(root: Path) -> list[str]:
    """Files below `root` that are tests by name, or that seem to register themselves, sorted."""
    files = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not name.startswith((".", "__"))]
        paths = ((os.path.join(directory, name), name) for name in names)
        files += [path for path, name in paths if _is_test(path, name)]
    return sorted(files)


def _registrations_of(rules: ModuleType, filename: str, root: Path) -> list[Registration]:
    if not Path(filename).name.startswith("test_") and not rules.ut_parse_one_file(filename)[0]:
        return []
    name = os.path.relpath(filename, root.parent)
    registrations = []
    for found in rules.collect_tests([filename]):
        hw = found.backend.name.lower()
        if not found.effective_suite:
            raise ValueError(f"{filename}: register_{hw}_ci() names no suite")
        registrations.append(
            Registration(
                filename=filename,
                name=name,
                hw=hw,
                suite=found.effective_suite,
                est_time=found.est_time,
                nightly=found.nightly,
                disabled=found.disabled,
            )
        )
    return registrations


def collect(root: Path, rules: ModuleType | None = None) -> Collection:
    """Registrations of all test files below `root`, by the rules of the installed SGLang.

    Raises CIRegisterNotFound where SGLang is not installed.
    """
    root = root.absolute()
    rules = rules or ci_register.load()
    rules.ut_parse_one_file = partial(_parse_top_level, rules)
    registrations, errors = [], []
    with _no_garbage_collection(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for filename in find_test_files(root):
            try:
                registrations += _registrations_of(rules, filename, root)
            except SyntaxError as error:
                errors.append(_syntax_error_line(filename, error))
            except (ValueError, OSError) as error:
                line = " ".join(str(error).split())
                errors.append(line if filename in line else f"{filename}: {line}")
    hardware = tuple(backend.name.lower() for backend in rules.HWBackend)
    return Collection(tuple(registrations), tuple(errors), hardware)


def live_estimates(path: Path) -> dict[str, float]:
    """Seconds by file, from a JSON object or from the JSON lines of a TIMINGS block.

    Raises UsageError where `path` is neither.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"--partition-model-file {path}: {reason}") from None
    try:
        estimates = _parse_estimates(text)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f'--partition-model-file {path}: expected a JSON object {{"test/registered/...py": seconds}} '
            'or lines {"file": ..., "elapsed": seconds}'
        ) from None
    return estimates


def _parse_estimates(text: str) -> dict[str, float]:
    try:
        estimates = json.loads(text)
    except ValueError:
        estimates = None
    if estimates is None or "elapsed" in estimates:
        records = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        estimates = {record["file"]: record["elapsed"] for record in records}
    if not estimates:
        raise ValueError("no estimates")
    for seconds in estimates.values():
        if isinstance(seconds, bool) or not 0 <= seconds < float("inf"):
            raise ValueError(seconds)
    return {name: float(seconds) for name, seconds in estimates.items()}


def _estimate(registration: Registration, estimates: dict[str, float]) -> float | None:
    """Seconds of the longest path in `estimates` that the path of the file ends with."""
    parts = Path(registration.filename).parts
    tails = ("/".join(parts[-length:]) for length in range(len(parts), 0, -1))
    return next((estimates[tail] for tail in tails if tail in estimates), None)


def with_estimates(
    registrations: list[Registration], estimates: dict[str, float]
) -> tuple[list[Registration], list[Registration]]:
    """(the registrations, with the measured time where `estimates` has one; those that it has one for)."""
    seconds = {registration: _estimate(registration, estimates) for registration in registrations}
    measured = {r: replace(r, est_time=found) for r, found in seconds.items() if found is not None}
    return [measured.get(registration, registration) for registration in registrations], list(measured)


def check_names(collection: Collection, hw: str | None, suite: str | None):
    """Raises UsageError, naming the nearest known ones, where hardware or suite is unknown."""
    if hw and hw not in collection.hardware:
        raise UsageError(unknown("hardware", hw, collection.hardware, len(collection.hardware)))
    if not suite:
        return
    suites = {name: collection.suites(name) for name in collection.hardware}
    if any(suite in suites[name] for name in ([hw] if hw else collection.hardware)):
        return
    owners = [name for name in collection.hardware if suite in suites[name]]
    if owners:
        raise UsageError(f"suite {suite!r} is not for hardware {hw!r} but for: {', '.join(owners)}")
    known = suites[hw] if hw else set().union(*suites.values())
    raise UsageError(unknown("suite", suite, known or set().union(*suites.values())))


def select(collection: Collection, options: Options) -> Selection:
    """The registrations that `options` ask for; without hardware or suite, those of all.

    Raises UsageError for an unknown hardware or suite.
    """
    hw, suite = options.hw, options.suite
    check_names(collection, hw, suite)
    chosen = [r for r in collection.registrations if hw in (None, r.hw) and suite in (None, r.suite)]
    if hw and suite:
        of_suite, chosen = chosen, [r for r in chosen if r.nightly == options.nightly]
    elif options.nightly:
        of_suite, chosen = chosen, [r for r in chosen if r.nightly]
    else:
        of_suite = chosen

    measured_of = ""
    if options.partition_model_file:
        chosen, measured = with_estimates(chosen, live_estimates(options.partition_model_file))
        others = ", est_time of the others" if len(measured) < len(chosen) else ""
        measured_of = f"times of {len(measured)} of {len(chosen)} files from {options.partition_model_file}{others}"
    enabled = [r for r in chosen if r.is_enabled]
    disabled = [r for r in chosen if not r.is_enabled]

    partition = {}
    if options.partition_size:
        for rank in range(options.partition_size):
            members = ci_register.load().auto_partition(enabled, rank, options.partition_size)
            partition.update(dict.fromkeys(members, rank))
        if options.partition_id is not None:
            enabled = [r for r in enabled if partition[r] == options.partition_id]
    why_empty = "" if enabled else _why_empty(options, of_suite, disabled, partition)
    return Selection(tuple(enabled), tuple(disabled), partition, why_empty, measured_of)


def _why_empty(options: Options, of_suite: list, disabled: list, partition: dict) -> str:
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


def syntax_errors(registrations: Iterable[Registration]) -> list[str]:
    """One line for each file that is not Python; collecting looks at registrations and main block only."""
    errors = []
    for filename in dict.fromkeys(r.filename for r in registrations):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(Path(filename).read_bytes(), filename, "exec", dont_inherit=True)
        except SyntaxError as error:
            errors.append(_syntax_error_line(filename, error))
    return errors


def _syntax_error_line(filename: str, error: SyntaxError) -> str:
    return f"{filename}:{error.lineno or 1}: not valid Python: {error.msg}"
