"""Which files and tests are meant by names on the command line: files, `-k NAME`, `--last-failed`."""

import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pdkit.core import source
from pdkit.core.errors import UsageError
from pdkit.core.registry import Collection, Registration, find_test_files, is_test, registrations_of_file
from pdkit.core.suggest import nearest


def named(collection: Collection, words: Iterable[str]) -> list[Registration]:
    """The registrations of the files that `words` name: paths of files or directories, or ends of registered paths.

    A file that is registered for several kinds of hardware is meant once, on CPU if it can. Raises UsageError.
    """
    of_path: dict[str, list[Registration]] = {}
    for registration in collection.registrations:
        of_path.setdefault(registration.filename, []).append(registration)
    chosen: dict[str, Registration] = {}
    for word in words:
        for filename in _files(collection, word):
            found = of_path.get(filename) or registrations_of_file(Path(filename))
            chosen[filename] = next((each for each in found if each.hw == "cpu"), found[0])
    return list(chosen.values())


def _files(collection: Collection, word: str) -> list[str]:
    path = Path(word)
    if path.is_file():
        return [str(path.absolute())]
    if path.is_dir():
        if found := [each for each in find_test_files(path.absolute()) if is_test(each)]:
            return found
        raise UsageError(f"{word}: no test file in this directory")
    end = "/" + word.removesuffix(".py") + ".py"
    if found := [each.filename for each in collection.registrations if f"/{each.name}".endswith(end)]:
        return found
    stems = {Path(each.filename).stem for each in collection.registrations}
    near = ", ".join(nearest(path.stem, stems))
    raise UsageError(
        f"{word}: neither a path nor the name of a registered file" + f"; nearest known: {near}" * bool(near)
    )


def is_file_named(registration: Registration, pattern: str) -> bool:
    """Whether `-k` means all tests of the file."""
    return _matches(Path(registration.filename).stem, pattern)


def has_test(registration: Registration, pattern: str) -> bool:
    """Whether unittest's `-k` finds a test in the file, as far as its text and that of its base classes says."""
    try:
        classes = source.read(Path(registration.filename)).classes
    except SyntaxError:
        return True  # it is named as an error before anything runs
    return any(
        _matches(f"__main__.{name}.{method}", pattern)
        for name, cls in classes.items()
        for each in cls.mro
        for method in each.methods
        if method.startswith("test")
    )


def _matches(name: str, pattern: str) -> bool:
    """As unittest has it: a part of the name, or a pattern of all of it if there is a `*`."""
    return fnmatchcase(name, pattern if "*" in pattern else f"*{pattern}*")


def last_failed(path: Path | None) -> list[str]:
    """Files that failed when they last ran, as `keep` wrote them down, those that are still there. Raises UsageError."""
    if path is None:
        raise UsageError("--last-failed: nothing is kept (--no-history, or PDKIT_HISTORY is empty); name the files")
    try:
        return [name for name in _read(path) if Path(name).is_file()]
    except FileNotFoundError:
        raise UsageError(f"--last-failed: no run is kept in {path}; run without it first") from None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--last-failed: {path} cannot be read: {error}") from None


def _read(path: Path) -> list[str]:
    names = json.loads(path.read_text())
    if not isinstance(names, list):
        raise ValueError("not a list of files")
    return [str(name) for name in names]


def keep(path: Path, failed: Sequence[str], passed: Sequence[str]) -> None:
    """Adds what failed to the file at `path`, and takes from it what passed. Raises OSError."""
    try:
        before = _read(path)
    except (FileNotFoundError, ValueError):
        before = []
    names = [name for name in before if name not in passed or name in failed]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(dict.fromkeys([*names, *failed])), indent=1) + "\n")
