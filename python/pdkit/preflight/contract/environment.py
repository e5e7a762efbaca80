"""What the environment registry of a release (`sglang/srt/environ.py`, standard library only) says to variables."""

import os
import re
import warnings
from collections.abc import Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from unittest import mock

from pdkit.core.suggest import nearest
from pdkit.preflight.finding import Finding, Level

PREFIXES = ("SGLANG_", "SGL_")


def load(path: Path) -> Any:
    """A fresh copy of the registry: it looks at os.environ while it is executed."""
    spec = spec_from_file_location("pdkit_environ_of_release", path)
    assert spec is not None and spec.loader is not None, path
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _said_of(path: Path, name: str, value: str) -> list[str]:
    """What the registry warns of when it is executed with that one variable set."""
    others = {key: text for key, text in os.environ.items() if not key.startswith(PREFIXES)}
    with mock.patch.dict(os.environ, {**others, name: value}, clear=True), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(path)
    return [" ".join(str(warning.message).split()) for warning in said if name in str(warning.message)]


def known(registry: Any) -> dict[str, Any]:
    """The fields of a registry by the name of their variable."""
    return {name: field for name, field in vars(registry.Envs).items() if isinstance(field, registry.EnvField)}


def _unregistered(path: Path, name: str, value: str, fields: Mapping[str, object]) -> list[Finding]:
    if said := _said_of(path, name, value):
        return [Finding(Level.WARNING, name, text) for text in said]
    package = path.parents[1]
    if reader := _reader(package, name):
        return [Finding(Level.WARNING, name, f"not in the registry, yet read by {reader.relative_to(package.parent)}")]
    return [
        Finding(Level.ERROR, name, f"no such variable, nobody reads it; nearest: {', '.join(nearest(name, fields))}")
    ]


def _reader(package: Path, name: str) -> Path | None:
    """The first source file that has `name` as a string."""
    quoted = re.compile(rb"""["']%s["']""" % name.encode())
    return next((path for path in sorted(package.rglob("*.py")) if quoted.search(path.read_bytes())), None)


def check(path: Path, env: Mapping[str, str]) -> list[Finding]:
    """Findings on those variables of `env` that are SGLang's, by the registry at `path`."""
    registry = load(path)
    fields = known(registry)
    aliases = {field.deprecated_name: name for name, field in fields.items() if hasattr(field, "deprecated_name")}
    findings = []
    for name, value in env.items():
        if not name.startswith(PREFIXES):
            continue
        if name in aliases:
            findings.append(Finding(Level.WARNING, name, f"deprecated, use {aliases[name]}"))
        field = fields.get(aliases.get(name, name))
        if field is None:
            findings += _unregistered(path, name, value, fields)
            continue
        try:
            field.parse(value)
        except ValueError as error:
            findings.append(Finding(Level.ERROR, name, f"{error}; the server would warn and take its default"))
    return findings
