"""Counts the names that pdkit's mixins take from self or cls without defining, declaring or inheriting them.

    python3 test/undeclared.py [FOLDER]

A name is declared by an assignment or annotation in the class, by an assignment to an attribute of self or cls in one
of its methods, or by the tuple `needs` of the class. A mixin is a class whose name ends in Mixin or Checks.
"""

import ast
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path

PDKIT = Path(__file__).resolve().parents[1] / "python" / "pdkit"
SUFFIXES = ("Mixin", "Checks")
KNOWN_TO_EVERY_TEST = frozenset(dir(unittest.TestCase)) | {"_callTestMethod", "_testMethodName"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def _last_name(node: ast.expr) -> str:
    """`Base` for `Base`, `module.Base` and `Base[...]`."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _methods(cls: ast.ClassDef) -> Iterator[tuple[Function, str]]:
    """Methods with a first parameter, and the name of that."""
    for node in cls.body:
        if isinstance(node, Function) and not any(_last_name(d) == "staticmethod" for d in node.decorator_list):
            parameters = node.args.posonlyargs + node.args.args
            if parameters:
                yield node, parameters[0].arg


def _attributes(cls: ast.ClassDef) -> Iterator[ast.Attribute]:
    """`self.x` and `cls.x`, nested functions and `super().x` included."""
    for method, first in _methods(cls):
        for node in ast.walk(method):
            if isinstance(node, ast.Attribute):
                of = node.value
                is_super = isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "super"
                if is_super or (isinstance(of, ast.Name) and of.id == first):
                    yield node


def _defined(cls: ast.ClassDef) -> set[str]:
    names = {node.attr for node in _attributes(cls) if isinstance(node.ctx, ast.Store)}
    for node in cls.body:
        if isinstance(node, Function | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            names |= found
            if "needs" in found and node.value is not None:
                names |= set(ast.literal_eval(node.value))
    return names


def undeclared(folder: Path = PDKIT) -> dict[str, list[str]]:
    """Sorted names by mixin, over all modules below `folder`; a mixin that declares everything has an empty list."""
    trees = [ast.parse(path.read_text(), str(path)) for path in sorted(folder.rglob("*.py"))]
    classes = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def available(name: str) -> set[str]:
        if name not in classes:
            return set()
        return _defined(classes[name]).union(*(available(_last_name(base)) for base in classes[name].bases))

    found = {}
    for name, cls in sorted(classes.items()):
        if name.endswith(SUFFIXES):
            taken = {node.attr for node in _attributes(cls) if isinstance(node.ctx, ast.Load)}
            dunder = {attr for attr in taken if attr.startswith("__")}
            found[name] = sorted(taken - dunder - available(name) - KNOWN_TO_EVERY_TEST)
    return found


def main(arguments: list[str]) -> None:
    found = undeclared(Path(arguments[0]) if arguments else PDKIT)
    for name, names in sorted(found.items(), key=lambda each: (-len(each[1]), each[0])):
        print(f"{len(names):>4}  {name}: {', '.join(names)}")
    print(f"{sum(map(len, found.values())):>4}  in {sum(map(bool, found.values()))} of {len(found)} mixins")


if __name__ == "__main__":
    main(sys.argv[1:])
