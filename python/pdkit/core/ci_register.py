"""SGLang's `sglang.test.ci.ci_register`, without importing SGLang.

`import sglang` takes seconds and a gigabyte, yet the registration module needs the standard library
only. It is loaded by path; every name in it can be imported from here:

    from pdkit.core.ci_register import register_cpu_ci

Where SGLang is not installed, `pdkit.core.registration` takes its place: it reads registrations, and partitions nothing.
"""

import sys
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from pdkit.core import registration
from pdkit.core.errors import NotReady

MODULE_NAME = "pdkit._sglang_ci_register"
RELATIVE_PATH = Path("test", "ci", "ci_register.py")


class CIRegisterNotFound(NotReady, ImportError):
    """The interpreter has no SGLang, or one without `sglang.test.ci`."""


def locate() -> Path:
    """Path of the installed `ci_register.py`."""
    spec = find_spec("sglang")
    packages = spec.submodule_search_locations if spec else ()
    for package in packages or ():
        path = Path(package) / RELATIVE_PATH
        if path.is_file():
            return path
    raise CIRegisterNotFound(f"sglang.test.ci.ci_register is not installed for {sys.executable}: pip install sglang")


@cache
def load() -> ModuleType:
    """The module, executed once and apart from any `sglang` that is imported later; or what takes its place."""
    try:
        path = locate()
    except CIRegisterNotFound:
        return registration
    spec = spec_from_file_location(MODULE_NAME, path)
    assert spec is not None and spec.loader is not None, "a path ending in .py has a loader"
    module = module_from_spec(spec)
    sys.modules[MODULE_NAME] = module
    spec.loader.exec_module(module)
    return module


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if not hasattr(load(), name):
        locate()  # raises where it is only missing because SGLang is not installed
    return getattr(load(), name)
