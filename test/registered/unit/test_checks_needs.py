"""Checks declare what they need, test classes stay small, and private names stay at home."""

import ast
import functools
import importlib
import inspect
import pkgutil
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path

import pdkit.checks
from pdkit.checks.base import Checks
from pdkit.core.ci_register import register_cpu_ci
from pdkit.faults import lb_faults, planted_bugs, servers
from pdkit.faults.real_engine import checks as transfer_kit

register_cpu_ci(est_time=7, suite="stage-a-test-cpu")

PACKAGE = Path(pdkit.checks.__file__).parents[1]
UNIT = Path(__file__).resolve().parent
REGISTERED = UNIT.parent
ALL_CHECKS = [
    *(importlib.import_module(m.name) for m in pkgutil.walk_packages(pdkit.checks.__path__, "pdkit.checks.")),
    *(lb_faults, planted_bugs, servers, transfer_kit),
]
MOST_BASES = 5


class Lone(Checks):
    """Needs one name."""

    needs = ("monolithic_url",)


class Both(Lone):
    """And two more."""

    needs = ("lb_url", "launch")


class TestNeeds(unittest.TestCase):
    def create(self, check: type, **attributes: object) -> type:
        return type("TestX", (check, unittest.TestCase), attributes)

    def test_a_class_that_lacks_one_is_not_created(self):
        with self.assertRaises(TypeError) as caught:
            self.create(Lone)
        remedy = "put a deployment that provides it, such as MonolithicBeside, among the bases"
        self.assertEqual(str(caught.exception), f"TestX: Lone needs monolithic_url; {remedy}")

    def test_each_check_and_each_name_is_named(self):
        both = "TestX: Both needs launch; .* them|it, .*; TestX: Lone needs monolithic"
        with self.assertRaisesRegex(TypeError, both):
            self.create(Both, lb_url=None)

    def test_attributes_methods_and_annotations_provide(self):
        class Servers:
            lb_url: str

            @classmethod
            def launch(cls) -> None:
                pass

        class TestX(Both, Servers, unittest.TestCase):
            monolithic_url = None

        self.assertTrue(issubclass(TestX, Checks))

    def test_only_a_test_class_must_provide(self):
        self.assertTrue(issubclass(type("Mixed", (Both,), {}), Checks))

    def test_a_check_takes_no_name_that_it_does_not_declare(self):
        taken = [f"{check.__module__}.{check.__name__}: {name}" for check in checks() for name in undeclared(check)]
        self.assertEqual(taken, [])

    def test_an_undeclared_name_is_found(self):
        class Careless(Lone):
            declared = 1

            @classmethod
            def start(cls):
                super().start()
                return cls.port

            def check(self):
                self.own = self.declared, self.monolithic_url
                self.assertTrue(self.url)
                return lambda: self.own, self.later

        self.assertEqual(sorted(undeclared(Careless)), ["later", "port", "start", "url"])


def checks() -> list[type[Checks]]:
    """All classes below Checks in the package."""
    found = {
        value: None
        for module in ALL_CHECKS
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Checks) and value.__module__ == module.__name__
    }
    return list(found)


def undeclared(check: type[Checks]) -> set[str]:
    """Names that the methods of `check` take of self, cls and super(), and that nobody below TestCase has or declares."""
    inherited = {name for base in check.__mro__[1:] for name in dir(base)} | set(dir(unittest.TestCase()))
    inherited |= {name for base in check.__mro__ for name in vars(base).get("needs", ())}
    inherited |= {name for base in check.__mro__[:-1] for name, context, _ in names(base) if context is ast.Store}
    return {
        name
        for name, context, of_super in names(check)
        if context is ast.Load and name not in inherited and (of_super or name not in dir(check))
    }


@functools.cache
def names(check: type) -> set[tuple[str, type[ast.expr_context], bool]]:
    """(name, context, whether it is taken of super()) of the attributes of self, cls and super() in a class's source."""
    found = set()
    classes = (node for node in ast.walk(tree_of(check.__module__)) if isinstance(node, ast.ClassDef))
    for node in ast.walk(next(node for node in classes if node.name == check.__name__)):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                found.add((node.attr, type(node.ctx), False))
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                found.add((node.attr, type(node.ctx), True))
    return found


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[module]))


class TestShape(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        paths = (path for folder in (REGISTERED, PACKAGE) for path in sorted(folder.rglob("*.py")))
        cls.trees = {path: ast.parse(path.read_text()) for path in paths}
        nodes = ((path, node) for path, tree in cls.trees.items() for node in ast.walk(tree))
        cls.classes = [(path, node) for path, node in nodes if isinstance(node, ast.ClassDef)]

    def test_no_test_class_has_more_than_five_bases(self):
        many = [f"{path.name}: {node.name}" for path, node in self.classes if len(node.bases) > MOST_BASES]
        self.assertEqual(many, [])

    def test_no_class_takes_a_test_away(self):
        taken = [
            f"{path.name}: {cls.name}.{target.id}"
            for path, cls in self.classes
            for node in cls.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value is None
            for target in node.targets
            if isinstance(target, ast.Name) and target.id.startswith("test_")
        ]
        self.assertEqual(taken, [])

    def test_no_module_uses_a_private_name_of_another(self):
        trees = {path: tree for path, tree in self.trees.items() if path.parent != UNIT}
        own = {path: set(private_names(tree)) for path, tree in trees.items()}
        everywhere = set().union(*own.values())
        uses = [
            f"{path.name}:{line}: {name}"
            for path, tree in trees.items()
            for name, line in private_uses(tree)
            if name not in own[path] and name in everywhere
        ]
        self.assertEqual(uses, [])

    def test_no_check_replaces_a_private_name_of_a_base_elsewhere(self):
        replaced = [
            f"{check.__name__}.{name} of {base.__module__}"
            for check in checks()
            for base in check.__mro__[1:]
            if base.__module__ != check.__module__
            for name in vars(check).keys() & vars(base).keys()
            if is_private(name) and name not in dir(unittest.TestCase)
        ]
        self.assertEqual(replaced, [])


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names(tree: ast.Module) -> Iterator[str]:
    """Private names that a module defines: functions, classes, variables, attributes that it sets, by __dict__ too."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name)
                | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store())
                | ast.Constant(value=str(name))
            ) if is_private(name):  # fmt: skip
                yield name


def private_uses(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, line) of private attributes that a module reads, and of private names that it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and is_private(node.attr):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.name, node.lineno) for alias in node.names if is_private(alias.name))


if __name__ == "__main__":
    unittest.main()
