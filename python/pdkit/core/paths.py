"""Where this clone keeps what is not part of the package; an installed package has none of it."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
TEST = REPOSITORY / "test"


def registered_tests() -> Path:
    """The tree of registered tests: this clone's, or else that below the working directory; it need not exist."""
    own = TEST / "registered"
    return own if own.is_dir() else Path("test", "registered").absolute()
