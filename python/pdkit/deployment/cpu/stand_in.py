"""What an absent package's functions are: they import, and say so when they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def absent_from(package: str) -> Callable[[str], Any]:
    """A module's `__getattr__`, for a package that needs a GPU's libraries to be imported."""

    def missing(name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def function(*_: Any, **__: Any) -> NoReturn:
            raise RuntimeError(f"{package}.{name} was called: there is no GPU, and the CPU shims do not replace it")

        function.__name__ = name
        return function

    return missing
