"""Data of the package; what is in this clone alone, of which an installed package has none; and the cache."""

import os
from collections.abc import Mapping
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
REPOSITORY = Path(__file__).resolve().parents[3]
TEST = REPOSITORY / "test"


def registered_tests() -> Path:
    """The tree of registered tests: this clone's, or else that below the working directory; it need not exist."""
    own = TEST / "registered"
    return own if own.is_dir() else Path("test", "registered").absolute()


def default_test(name: Path) -> Path:
    """The file of that name below the directory `test`, of the tree above."""
    return registered_tests().parent / name


def cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Where environments, models, wheels and unpacked libraries are kept, as in scripts/env.sh."""
    base = environ.get("PDKIT_CACHE_DIR")
    return Path(base or Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sglang-pd-suite"))
