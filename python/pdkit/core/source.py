"""What a test file says without being run: names it imports, its classes, their ancestors and attributes."""

import ast
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import decode_source
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
PD_FIXTURE = "PDDisaggregationServerBase"
UNKNOWN = object()
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, eq=False)
class Source:
    """One parsed Python file."""

    path: Path
    text: str
    tree: ast.Module

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def calls(self) -> list[ast.Call]:
        return [node for node in self.nodes if isinstance(node, ast.Call)]

    @cached_property
    def imports(self) -> dict[str, str]:
        """Local name -> dotted name that it stands for, of all imports in the file."""
        names = {}
        for node in _statements(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.split(".")[0]
                    names[alias.asname or top] = alias.name if alias.asname else top
            elif isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                names.update({alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names})
        return names

    @cached_property
    def classes(self) -> dict[str, "TestClass"]:
        return {node.name: TestClass(self, node) for node in self.tree.body if isinstance(node, ast.ClassDef)}

    @cached_property
    def functions(self) -> dict[str, Function]:
        return {node.name: node for node in self.tree.body if isinstance(node, Function)}

    @cached_property
    def constants(self) -> dict[str, ast.expr]:
        """Names that the module assigns, with the last expression assigned."""
        return dict(_assignments(self.tree.body))

    def dotted(self, node: ast.AST) -> str:
        """Dotted name of what `node` refers to, imports resolved; empty where it is no name."""
        if isinstance(node, ast.Attribute):
            owner = self.dotted(node.value)
            return owner and f"{owner}.{node.attr}"
        if isinstance(node, ast.Name):
            return self.imports.get(node.id, node.id)
        return ""

    def value(self, node: ast.expr | None, environ: Mapping[str, str] = os.environ) -> object:
        """What an expression is where it is a literal, a constant of the module or a variable of `environ`."""
        if isinstance(node, ast.Name) and node.id in self.constants:
            return self.value(self.constants[node.id], environ)
        if isinstance(node, ast.Call) and self.dotted(node.func) in ("os.getenv", "os.environ.get"):
            name, *default = [self.value(arg, environ) for arg in node.args]
            return environ.get(str(name), default[0] if default else None)
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            values = [self.value(operand, environ) for operand in node.values]
            return UNKNOWN if UNKNOWN in values else next(filter(None, values), values[-1])
        if node is None:
            return UNKNOWN
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            return UNKNOWN


def _statements(block: ast.AST) -> Iterator[ast.stmt]:
    """Statements below a module or statement, nested ones included, expressions left alone."""
    for name in ("body", "orelse", "handlers", "finalbody", "cases"):
        for statement in getattr(block, name, ()):
            yield statement
            yield from _statements(statement)


def _assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for statement in body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    yield target.id, statement.value
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            yield statement.target.id, statement.value


@dataclass(frozen=True, eq=False)
class TestClass:
    """A class at the top level of a file."""

    source: Source
    node: ast.ClassDef

    __test__ = False

    @property
    def name(self) -> str:
        return self.node.name

    @cached_property
    def ancestry(self) -> tuple[tuple["TestClass", ...], tuple[str, ...]]:
        """This class and its ancestors, nearest first, and the dotted names of those whose source is elsewhere."""
        vars(self)["ancestry"] = (self,), ()  # meanwhile: names that are assigned again can lead back here
        classes, elsewhere = [self], []
        for base in self.node.bases:
            dotted = self.source.dotted(base)
            found = self.source.classes.get(dotted) or _find_class(self.source, dotted)
            if found is None or found is self:
                elsewhere.append(dotted)
                continue
            theirs, unknown = found.ancestry
            classes += theirs
            elsewhere += unknown
        return tuple(dict.fromkeys(classes)), tuple(dict.fromkeys(elsewhere))

    @property
    def mro(self) -> tuple["TestClass", ...]:
        return self.ancestry[0]

    @property
    def is_pd(self) -> bool:
        """Built on SGLang's PD fixture, directly or not."""
        return any(name.rpartition(".")[2] == PD_FIXTURE for name in self.ancestry[1])

    @property
    def stands_on_sglang(self) -> bool:
        """Built on that fixture without this package: what `pdkit.deployment.attach` supervises from outside."""
        return self.is_pd and not any(PACKAGE in each.source.path.parents for each in self.mro)

    @cached_property
    def methods(self) -> dict[str, Function]:
        return {node.name: node for node in self.node.body if isinstance(node, Function)}

    @cached_property
    def attributes(self) -> dict[str, ast.expr]:
        return dict(_assignments(self.node.body))

    def attribute(self, name: str) -> tuple["TestClass", ast.expr] | None:
        """The nearest class that assigns `name` in its body, and the expression."""
        return next(((cls, cls.attributes[name]) for cls in self.mro if name in cls.attributes), None)

    def method(self, name: str, above: "TestClass | None" = None) -> tuple["TestClass", Function] | None:
        """The nearest class that defines `name`, and the definition; with `above`, as super() there finds it."""
        classes = self.mro[self.mro.index(above) + 1 :] if above else self.mro
        return next(((cls, cls.methods[name]) for cls in classes if name in cls.methods), None)

    def value(self, name: str, environ: Mapping[str, str] = os.environ) -> object:
        """Value of a class attribute, or UNKNOWN."""
        found = self.attribute(name)
        return found[0].source.value(found[1], environ) if found else UNKNOWN


def _find_class(source: Source, dotted: str) -> TestClass | None:
    module, _, name = dotted.rpartition(".")
    path = _module_path(source.path.parent, module)
    return read(path).classes.get(name) if path else None


@lru_cache(maxsize=256)
def _module_path(directory: Path, module: str) -> Path | None:
    """File of a module beside the test, or else beside its directory, or of this package."""
    if not module or module.startswith("."):
        return None
    if module.startswith("pdkit."):
        candidates = [PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")]
    else:
        name = f"{module}.py"
        candidates = [directory / name, *directory.parent.glob(f"*/{name}")]
    return next((path for path in candidates if path.is_file()), None)


def read(path: Path) -> Source:
    """Parses a file. Raises OSError, and SyntaxError (also where the file is no text, or nested too deeply)."""
    return _parse(path, content_of(path))


def content_of(path: Path) -> bytes:
    """What is in a file. Raises OSError, also for a pipe or a device, which could be read for ever."""
    if not (stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "neither a file nor a link to one", str(path))
    return path.read_bytes()


@lru_cache(maxsize=256)
def _parse(path: Path, content: bytes) -> Source:
    try:
        text = decode_source(content)  # also with a byte order mark, or in the encoding that it names
    except (SyntaxError, UnicodeDecodeError) as error:
        reason = f"not text in UTF-8 or in the encoding that it names: {error}"
        raise SyntaxError(reason, (str(path), 1, None, None)) from None
    try:
        tree = ast.parse(text, filename=str(path))
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(str(error) or "nested too deeply", (str(path), 1, None, None)) from None
    return Source(path, text, tree)


def pd_classes(source: Source) -> list[TestClass]:
    """Classes with tests that the file itself defines on top of SGLang's PD fixture."""
    pd = [cls for cls in source.classes.values() if cls.is_pd]
    return [cls for cls in pd if any(name.startswith("test") for each in cls.mro for name in each.methods)]
