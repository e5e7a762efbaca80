"""Registrations where no SGLang is installed: the calls `register_<hw>_ci(...)` in a test file, read without running it.

It has the names of SGLang's `ci_register` that `pdkit.core.registry` needs; where SGLang is installed, that is asked, not
this. Partitions of a suite are SGLang's own affair.
"""

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from inspect import signature
from typing import Any

HWBackend = Enum("HWBackend", "CPU CUDA AMD NPU XPU MUSA MLX MPS PPU")
_COMPUTED = object()


@dataclass
class CIRegistry:
    """One call; `est_time` in seconds."""

    backend: HWBackend
    filename: str
    est_time: float
    suite: str | None = None
    nightly: bool = False
    disabled: str | None = None
    stage: str | None = None
    runner_config: str | None = None

    @property
    def effective_suite(self) -> str | None:
        """The suite, also where it is named by stage and runner."""
        return self.suite if self.stage is None else f"{self.stage}-test-{self.runner_config}"


def register_cpu_ci(
    est_time: Any,
    suite: Any = None,
    nightly: Any = False,
    disabled: Any = None,
    *,
    stage: Any = None,
    runner_config: Any = None,
) -> None:
    """Marks a test file; there is one such function for each kind of hardware."""


globals().update({f"register_{hw.name.lower()}_ci": register_cpu_ci for hw in HWBackend})


class RegistryVisitor:
    """Finds the calls at the top level of a syntax tree, and whether the file runs something as a program."""

    def __init__(self, filename: str):
        self.filename = filename
        self.registries: list[CIRegistry] = []
        self.has_main_entry = False

    def visit_Module(self, tree: ast.Module) -> None:
        """Raises ValueError where a call is not one that SGLang's runner could read."""
        for statement in tree.body:
            match statement:
                case ast.Expr(value=ast.Call(func=ast.Name(id=name)) as call) if name in globals():
                    if name.startswith("register_"):
                        self.registries.append(self._read(name, call))
                case ast.If(test=ast.Compare(left=ast.Name(id="__name__"), comparators=[ast.Constant("__main__")])):
                    self.has_main_entry |= any(isinstance(each, ast.Call) for each in ast.walk(statement))

    visit = visit_Module

    def _read(self, name: str, call: ast.Call) -> CIRegistry:
        try:
            values = _values(call)
        except TypeError as error:
            raise ValueError(f"{self.filename}: {error} in {name}()") from None
        return CIRegistry(HWBackend[name.split("_")[1].upper()], self.filename, **values)


def _values(call: ast.Call) -> dict[str, Any]:
    """Its arguments by name, those that are computed left out. Raises TypeError."""
    if any(isinstance(arg, ast.Starred) for arg in call.args) or any(word.arg is None for word in call.keywords):
        raise TypeError("starred arguments are not supported")
    given = signature(register_cpu_ci).bind(
        *map(_constant, call.args), **{str(word.arg): _constant(word.value) for word in call.keywords}
    )
    values = {word: value for word, value in given.arguments.items() if value is not _COMPUTED}
    if not isinstance(values.get("est_time"), (int, float)):
        raise TypeError("est_time is a required constant")
    for word in values.keys() - {"est_time"}:
        if not isinstance(values[word], bool if word == "nightly" else (str, type(None))):
            raise TypeError(f"{word} must not be {values[word]!r}")
    if {"suite", "stage", "runner_config"} & values.keys() not in ({"suite"}, {"stage", "runner_config"}):
        raise TypeError("neither a suite nor a pair of stage and runner_config")
    return values | {"est_time": float(values["est_time"])}


def _constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else _COMPUTED


def ut_parse_one_file(filename: str) -> tuple[list[CIRegistry], bool]:
    """What a RegistryVisitor finds in a file."""
    visitor = RegistryVisitor(filename)
    with open(filename, "rb") as file:
        visitor.visit(ast.parse(file.read(), filename))
    return visitor.registries, visitor.has_main_entry


def collect_tests(files: Iterable[str]) -> list[CIRegistry]:
    """The registrations of `files`. Raises ValueError where one has none, or would run no test as a program."""
    found = []
    for file in files:
        registries, has_main_entry = ut_parse_one_file(file)
        if not registries:
            raise ValueError(f"No CI registry found in {file}")
        if not has_main_entry and any(each.disabled is None for each in registries):
            raise ValueError(f'{file}: missing `if __name__ == "__main__":` entry: `python3 FILE` would run no test')
        found += registries
    return found
