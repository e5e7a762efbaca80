"""Versions of what is installed."""

from importlib.metadata import PackageNotFoundError, version


def installed(distribution: str) -> str | None:
    """The installed version of a distribution; None where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
