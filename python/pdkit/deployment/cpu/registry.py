"""What is replaced in SGLang: a list that installs itself, is checked against a release, and is written into the docs."""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Family = Literal["any", "dsv4", "speculative", "nixl"]
Made = TypeVar("Made", bound=Callable[..., Any])


class SglangChanged(RuntimeError):
    """SGLang lacks a name that is to be replaced."""


@dataclass(frozen=True)
class Replacement:
    """A name of SGLang, or of a package that it calls, and what stands in its place.

    target    "module:attribute" or "module:Class.attribute"
    make      makes the new value of the old one
    family    "dsv4" and "speculative" only where such a model is served, "nixl" where that is installed
    why       one line
    imitates  files of SGLang, relative to its package, whose results or byte layout the replacement reproduces
    adds      SGLang sets the name on GPUs only, so that it may be absent
    wraps     the old value is called by the new one, so that it may be any
    """

    target: str
    make: Callable[[Any], Any]
    family: Family
    why: str
    imitates: tuple[str, ...] = ()
    adds: bool = False
    wraps: bool = False

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def attribute(self) -> str:
        return self.target.partition(":")[2]

    def install(self) -> None:
        """Import the module and replace the name. Raises SglangChanged if it is absent, ImportError."""
        owner = importlib.import_module(self.module)
        *path, name = self.attribute.split(".")
        try:
            owner = operator.attrgetter(".".join(path))(owner) if path else owner
            old = None if self.adds else getattr(owner, name)
        except AttributeError:
            raise SglangChanged(
                f"{self.module} has no {self.attribute}: the CPU shims do not fit this SGLang"
            ) from None
        new = self.make(old)
        is_static = isinstance(inspect.getattr_static(owner, name, None), staticmethod)
        setattr(owner, name, staticmethod(new) if is_static else new)


REPLACEMENTS: list[Replacement] = []
_installed: set[str] = set()  # the targets


def replaces(
    target: str, *, family: Family = "dsv4", imitates: tuple[str, ...] = (), why: str | None = None
) -> Callable[[Made], Made]:
    """The decorated function stands in place of `target`; its docstring's first line is the reason unless `why` is."""

    def register(function: Made) -> Made:
        _register(target, lambda old: function, family, why or _first_line(function), imitates)
        return function

    return register


def remakes(target: str, *, family: Family = "dsv4", adds: bool = False, wraps: bool = False) -> Callable[[Made], Made]:
    """The decorated function is called with the old value of `target` (None if `adds`) and returns the new one."""

    def register(make: Made) -> Made:
        _register(target, make, family, _first_line(make), adds=adds, wraps=wraps)
        return make

    return register


def _register(
    target: str,
    make: Callable[[Any], Any],
    family: Family,
    why: str,
    imitates: tuple[str, ...] = (),
    **options: bool,
) -> None:
    assert all(each.target != target for each in REPLACEMENTS), f"{target} is replaced twice"
    REPLACEMENTS.append(Replacement(target, make, family, why, imitates, **options))


def _first_line(function: Callable[..., Any]) -> str:
    assert function.__doc__, f"{function.__qualname__} replaces something without a reason in its docstring"
    return function.__doc__.splitlines()[0].rstrip(".")


def install(families: Collection[str]) -> list[Replacement]:
    """Install what belongs to `families`, in the order of registration; returns what is now. Raises SglangChanged."""
    chosen = [each for each in REPLACEMENTS if each.family in families]
    for each in chosen:
        if each.target not in _installed:
            each.install()
            _installed.add(each.target)
    return chosen
