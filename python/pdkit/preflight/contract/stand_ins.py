"""Imports the sources of an SGLang whose dependencies are absent, by standing in for them.

Every third-party module but those in `REAL`, and SGLang's benchmarks, becomes an object that accepts whatever is done to
it while modules are imported: attribute access, calls, decoration, subclassing, arithmetic. A module of SGLang that
cannot be executed that way keeps what it had defined until then and is recorded in `Importer.assumed`, unless a
contract depends on it (`MUST_RUN`): then its error is raised. No answer is made of stand-ins: callers check with
`is_stand_in`.

To install before the first import of sglang, in a process of its own.
"""

import importlib.abc
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REAL = {"msgspec", "packaging", "typing_extensions", "sglang_router", "pdkit"}
ABSENT = {"habana_frameworks"}  # SGLang asks whether it is there, and then for what torch has with it
MUST_RUN = ("sglang.srt.server_args", "sglang.srt.arg_groups", "sglang.srt.environ", "sglang.test")
UNUSED = "sglang.benchmark.", "sglang.bench_serving."  # half of what SGLang's test helpers import: no answer needs it
ABSENT_ATTRIBUTES = {"torch": {"npu", "musa", "mlu", "hpu"}}
KNOWN_ATTRIBUTES = {"torch": {"version": SimpleNamespace(cuda="13.0", hip=None, xpu=None, musa=None)}}


class _Base:
    """What a class inherits instead of a stand-in."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __init_subclass__(cls, **kwargs: object) -> None:
        pass


class _StandIn:
    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def __getattr__(self, name: str) -> "_StandIn":
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        value = self.__dict__[name] = _StandIn(f"{self._name}.{name}")
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_bare_decorator = len(args) == 1 and not kwargs and isinstance(args[0], (types.FunctionType, type))
        return args[0] if is_bare_decorator else _StandIn(f"{self._name}()")

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        first = next(base for base in bases if isinstance(base, _StandIn))
        return (_Base,) if first is self else ()

    def __repr__(self) -> str:
        return f"<stand-in for {self._name}>"

    def _itself(self, *_: object) -> "_StandIn":
        return self

    def _false(self, *_: object) -> bool:
        return False

    def _zero(self) -> int:
        return 0

    def _ignore(self, *_: object) -> None:
        pass

    __enter__ = __getitem__ = __or__ = __ror__ = __and__ = __neg__ = __invert__ = _itself
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _itself
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __pow__ = __rpow__ = _itself
    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _false
    __instancecheck__ = __subclasscheck__ = __exit__ = _false
    __len__ = __int__ = __index__ = _zero
    __setitem__ = __delitem__ = _ignore

    def __iter__(self) -> Iterator[object]:
        return iter(())

    def __float__(self) -> float:
        return 0.0


class _StandInModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return "999.0.0"
        known = KNOWN_ATTRIBUTES.get(self.__name__, {})
        if name in known:
            return known[name]
        if name.startswith("__") or name in ABSENT_ATTRIBUTES.get(self.__name__, ()):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = _StandIn(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


def is_stand_in(value: object) -> bool:
    """Whether `value`, or something in it, comes from a module that is not there."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(is_stand_in, value))
    return isinstance(value, (_StandIn, _StandInModule))


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = _StandInModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _stand_in(name: str) -> ModuleSpec:
    return ModuleSpec(name, _Loader(), is_package=True)


class _LenientLoader(SourceFileLoader):
    def __init__(self, name: str, path: str, assumed: dict[str, str]) -> None:
        super().__init__(name, path)
        self.assumed = assumed

    def exec_module(self, module: types.ModuleType) -> None:
        try:
            super().exec_module(module)
        except Exception as error:
            if module.__name__.startswith(MUST_RUN):
                raise
            self.assumed[module.__name__] = f"{type(error).__name__}: {error}"
            module.__class__ = _StandInModule


class Importer(importlib.abc.MetaPathFinder):
    """Finds `sglang` below `root`, other modules in the standard library or what a test adds to sys.path, and stands
    in for the rest.

    `assumed` maps the modules of SGLang that were not executed to the end to the reason.
    """

    def __init__(self, root: Path, version: str) -> None:
        self.root, self.version, self.before = root, version, frozenset(sys.path)
        self.assumed: dict[str, str] = {}

    def install(self) -> None:
        package = _StandInModule("sglang")
        package.__spec__ = ModuleSpec("sglang", None, is_package=True)  # find_spec() of a test reads it
        package.__path__ = package.__spec__.submodule_search_locations = [str(self.root / "sglang")]
        vars(package)["__version__"] = self.version
        sys.modules["sglang"] = package
        sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if f"{name}.".startswith(UNUSED):
            return _stand_in(name)
        top = name.partition(".")[0]
        if top == "sglang":
            return self._sglang(name, path)
        if top in REAL or top in ABSENT or top in sys.stdlib_module_names:
            return None
        if PathFinder.find_spec(top, [folder for folder in sys.path if folder not in self.before]):
            return None
        return _stand_in(name)

    def _sglang(self, name: str, path: Sequence[str] | None) -> ModuleSpec:
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LenientLoader(spec.loader.name, spec.loader.path, self.assumed)
        return spec
