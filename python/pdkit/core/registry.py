"""Which test files are registered, for which hardware and suite."""

import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

from pdkit.core import ci_register, top_level
from pdkit.core.errors import UsageError
from pdkit.core.source import content_of

PROJECT_SUITES = {
    "cpu": ("stage-a-test-cpu",),
    "cuda": (
        "stage-b-test-1-gpu-large",
        "stage-b-test-2-gpu-large",
        "stage-c-test-4-gpu-h100",
        "stage-c-test-dsv4-8-gpu-h200",
    ),
}

# Names of SGLang's own suites since it registers by `stage=` and `runner_config=`: {stage}-test-{runner_config}.
STAGES = ("base-a", "base-b", "base-c", "extra-a", "extra-b")
RUNNER_CONFIGS = {
    "cpu": ("cpu", "cpu-arm64"),
    "cuda": (
        *("1-gpu-small", "1-gpu-large", "2-gpu-large", "4-gpu-h100", "4-gpu-b200", "4-gpu-gb300"),
        *("8-gpu-h20", "8-gpu-h200", "8-gpu-b200", "deepep-4-gpu-h100", "deepep-4-gpu-b200", "deepep-8-gpu-h200"),
    ),
}

NAMELESS = ("amd", "npu")  # SGLang's runner does not check the suites of these, and some files name none

UNREGISTERED_S = 60.0
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

    def as_dict(self) -> dict[str, Any]:
        names = {"file": self.name, "path": self.filename, "hw": self.hw, "suite": self.suite}
        return names | {"est_time": self.est_time}


@dataclass(frozen=True)
class Collection:
    """All registrations below one directory, and one line for each file that breaks a rule."""

    registrations: tuple[Registration, ...]
    errors: tuple[str, ...]
    hardware: tuple[str, ...]

    def suites(self, hw: str) -> set[str]:
        """Suites that some file registers for `hw`, and those that need no file."""
        return {r.suite for r in self.registrations if r.hw == hw and r.suite} | defined_suites(hw)


def pair_of(suite: str) -> tuple[str, str] | None:
    """(stage, runner_config) of a suite of that form; None for one that has a single name."""
    stage, separator, runner_config = suite.partition("-test-")
    known = any(runner_config in configs for configs in RUNNER_CONFIGS.values())
    return (stage, runner_config) if separator and stage in STAGES and known else None


def defined_suites(hw: str) -> set[str]:
    """Suites that exist though no file is registered in them: this project's, and those of the installed SGLang."""
    pairs = [f"{stage}-test-{config}" for stage in STAGES for config in RUNNER_CONFIGS.get(hw, ())]
    takes_pairs = "runner_config" in signature(ci_register.load().register_cuda_ci).parameters
    return {*PROJECT_SUITES.get(hw, ()), *(pairs if takes_pairs else ())}


def _parse_top_level(rules: ModuleType, filename: str) -> tuple[list[Any], bool]:
    """What SGLang's `ut_parse_one_file` finds, by SGLang's own visitor."""
    source = content_of(Path(filename))
    if b"register_" not in source:
        return [], False
    visitor = rules.RegistryVisitor(filename)
    visitor.visit(top_level.parse(source, filename))
    return visitor.registries, visitor.has_main_entry


def _seems_a_test(path: str, name: str) -> bool:
    if not name.endswith(".py"):
        return False
    if name.startswith("test_"):
        return True
    try:
        return bool(_REGISTERS.search(content_of(Path(path))))
    except OSError:
        return True


def find_test_files(root: Path) -> list[str]:
    """Files below `root` that are tests by name, or that seem to register themselves, sorted."""
    files = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not name.startswith((".", "__"))]
        paths = ((os.path.join(directory, name), name) for name in names)
        files += [path for path, name in paths if _seems_a_test(path, name)]
    return sorted(files)


def is_test(filename: str, rules: ModuleType | None = None) -> bool:
    """Whether one of `find_test_files` is a test: by its name, or because it registers itself and not only says so.

    A file that is not Python counts as one, so that it is named as an error.
    """
    try:
        return Path(filename).name.startswith("test_") or bool(
            _parse_top_level(rules or ci_register.load(), filename)[0]
        )
    except SyntaxError:
        return True


def _registrations_of(rules: ModuleType, filename: str, root: Path) -> list[Registration]:
    if not is_test(filename, rules):
        return []
    name = os.path.relpath(filename, root.parent)
    registrations = []
    for found in rules.collect_tests([filename]):
        hw = found.backend.name.lower()
        suite = found.effective_suite or ""
        if not suite and hw not in NAMELESS:
            raise ValueError(f"{filename}: register_{hw}_ci() names no suite")
        registrations.append(Registration(filename, name, hw, suite, found.est_time, found.nightly, found.disabled))
    return registrations


def collect(root: Path, rules: ModuleType | None = None) -> Collection:
    """Registrations of all test files below `root`, by the rules of the installed SGLang.

    Raises CIRegisterNotFound where SGLang is not installed.
    """
    root = root.absolute()
    rules = rules or ci_register.load()
    vars(rules).update(ut_parse_one_file=partial(_parse_top_level, rules))
    registrations, errors = [], []
    with warnings.catch_warnings():
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


def registrations_of_file(path: Path) -> list[Registration]:
    """Those of a file anywhere; of one that has none, a registration on CPU in no suite, for it can be run all the same.

    Raises UsageError where it is not Python, CIRegisterNotFound where SGLang is not installed.
    """
    filename = str(path.absolute())
    rules = ci_register.load()
    vars(rules).update(ut_parse_one_file=partial(_parse_top_level, rules))
    try:
        found = []
        if _REGISTERS.search(content_of(path)):
            found = _registrations_of(rules, filename, Path.cwd() / "registered")
        return found or [Registration(filename, os.path.relpath(filename), "cpu", "", UNREGISTERED_S)]
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None


def syntax_errors(registrations: Iterable[Registration]) -> list[str]:
    """One line for each file that is not Python; collecting looks at registrations and main block only."""
    errors = []
    for filename in dict.fromkeys(r.filename for r in registrations):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(content_of(Path(filename)), filename, "exec", dont_inherit=True)
        except SyntaxError as error:
            errors.append(_syntax_error_line(filename, error))
    return errors


def _syntax_error_line(filename: str, error: SyntaxError) -> str:
    return f"{filename}:{error.lineno or 1}: not valid Python: {error.msg}"
