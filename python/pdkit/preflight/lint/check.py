"""All rules over test files."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pdkit.core.registry import Collection, collect
from pdkit.core.source import Source, read
from pdkit.preflight.finding import Finding, broken
from pdkit.preflight.lint import evals, exemptions, overrides, registration, thresholds

RULES: dict[str, Callable[[Source, Collection], Iterator[Finding]]] = {
    "registration": registration.registration,
    "suite": registration.suite,
    "silent-main": registration.silent_main,
    "deprecated-eval": evals.deprecated_eval,
    "pd-override": overrides.pd_override,
    "noisy-threshold": thresholds.noisy_threshold,
}


def test_root_of(path: Path) -> Path:
    """The tree that a test file belongs to: the nearest directory `registered` above it, or else its own."""
    return next((parent for parent in path.parents if parent.name == "registered"), path.parent)


def lint_file(path: Path, collection: Collection) -> list[Finding]:
    """What the rules find in one file. Raises OSError."""
    try:
        source = read(path)
    except SyntaxError as error:
        return [broken(path, error.lineno or 1, "syntax", f"not valid Python: {error.msg}; nothing else was checked")]
    found = [finding for check in RULES.values() for finding in check(source, collection)]
    return exemptions.apply(path, source.text, found, RULES)


def lint(paths: Iterable[Path]) -> list[Finding]:
    """What the rules find in files, and in all Python files below directories.

    Raises OSError where a path cannot be read, CIRegisterNotFound without SGLang.
    """
    paths = list(paths)
    for path in paths:
        path.stat()
    files = [f for path in paths for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    files = list(dict.fromkeys(file.absolute() for file in files))
    collections = {root: collect(root) for root in dict.fromkeys(map(test_root_of, files))}
    return [finding for file in files for finding in lint_file(file, collections[test_root_of(file)])]
