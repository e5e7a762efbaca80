"""Sources of a release of SGLang: the installed one, or those in a wheel that is not installed."""

import importlib.metadata
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pdkit.core.errors import NotReady, UsageError


class ReleaseNotFound(NotReady):
    """No SGLang where one was expected; the message is one line that says what to do."""


class BadWheel(UsageError):
    """A file is no wheel of SGLang; the message is one line."""


@dataclass(frozen=True)
class Release:
    """`root` is the directory that holds the package `sglang`, `origin` what a person calls it."""

    version: str
    root: Path
    origin: str


def installed() -> Release:
    """The SGLang of this interpreter, which is not imported. Raises ReleaseNotFound."""
    spec = find_spec("sglang")
    packages = [Path(path) for path in (spec.submodule_search_locations if spec else None) or ()]
    package = next((path for path in packages if (path / "srt").is_dir()), None)
    if package is None:
        raise ReleaseNotFound("sglang is not installed here: pip install sglang, or --sglang-wheel FILE")
    version = importlib.metadata.version("sglang")
    return Release(version, package.parent, f"sglang {version} (installed)")


def version_of_wheel(wheel: Path) -> str:
    """Version that the metadata in a wheel of SGLang states. Raises BadWheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            headers = archive.read(names[0]).decode().split("\n\n")[0].splitlines() if names else []
    except (OSError, zipfile.BadZipFile) as error:
        raise BadWheel(f"{wheel}: {getattr(error, 'strerror', None) or 'not a wheel'}") from None
    fields = dict(line.split(": ", 1) for line in headers if ": " in line)
    if fields.get("Name") != "sglang":
        raise BadWheel(f"{wheel}: a wheel of {fields.get('Name', 'nothing known')}, not of sglang")
    return fields["Version"]


@contextmanager
def unpacked(wheel: Path) -> Iterator[Release]:
    """The Python sources of a wheel, in a temporary directory. Raises BadWheel."""
    version = version_of_wheel(wheel)
    with tempfile.TemporaryDirectory(prefix=f"sglang-{version}-") as folder, zipfile.ZipFile(wheel) as archive:
        sources = [name for name in archive.namelist() if name.startswith("sglang/") and name.endswith(".py")]
        archive.extractall(folder, sources)
        yield Release(version, Path(folder), f"sglang {version} ({wheel.name})")
