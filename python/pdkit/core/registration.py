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
    suite: str | None
    nightly: bool
    disabled: str | None
    stage: str | None
    runner_config: str | None

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
        where = f"{self.filename}: "
        if any(isinstance(arg, ast.Starred) for arg in call.args) or any(word.arg is None for word in call.keywords):
            raise ValueError(f"{where}starred arguments are not supported in {name}()")
        given = [_constant(arg) for arg in call.args]
        try:
            bound = signature(register_cpu_ci).bind(*given, **{str(w.arg): _constant(w.value) for w in call.keywords})
        except TypeError as error:
            raise ValueError(f"{where}{error} in {name}()") from None
        values = {word: value for word, value in bound.arguments.items() if value is not _COMPUTED}
        if not isinstance(values.get("est_time"), (int, float)):
            raise ValueError(f"{where}est_time is a required constant in {name}()")
        for word, kind in (
            ("suite", str),
            ("stage", str),
            ("runner_config", str),
            ("nightly", bool),
            ("disabled", str),
        ):
            if not isinstance(values.get(word), (kind, type(None))):
                raise ValueError(f"{where}{word} must be a {kind.__name__} in {name}()")
        if {"suite", "stage", "runner_config"} & values.keys() not in ({"suite"}, {"stage", "runner_config"}):
            raise ValueError(f"{where}{name}() must specify exactly one of (stage, runner_config) pair or suite")
        return CIRegistry(
            backend=HWBackend[name.split("_")[1].upper()],
            filename=self.filename,
            est_time=float(values["est_time"]),
            suite=values.get("suite"),
            nightly=bool(values.get("nightly")),
            disabled=values.get("disabled"),
            stage=values.get("stage"),
            runner_config=values.get("runner_config"),
        )


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
