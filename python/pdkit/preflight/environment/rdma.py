"""RDMA devices by the rules of SGLang's PD fixture: its own functions are taken from its source, and nothing else."""

import __future__

import ast
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdkit.core.source import read

SYSFS = "/sys/class/infiniband"
FIXTURE = Path("test", "server_fixtures", "disaggregation_fixture.py")
USABLE, GID_OF_ONE, GID_OF_ALL = "_get_available_ib_devices", "_roce_v2_gid_index", "_detect_roce_gid_index"


@dataclass(frozen=True)
class _Log:
    lines: list[str]

    def warning(self, text: str, *args: object) -> None:
        self.lines.append(text % args)


@dataclass(frozen=True)
class Rules:
    """What the fixture of one release says about the devices below one root."""

    functions: dict[str, Callable[..., Any]]
    log: _Log
    sysfs: Path

    @property
    def devices(self) -> list[str]:
        return sorted(path.name for path in self.sysfs.iterdir()) if self.sysfs.is_dir() else []

    def usable(self) -> tuple[str, ...]:
        """Devices that the fixture hands to the servers."""
        return tuple(self.functions[USABLE]() or ())

    def why_not(self) -> dict[str, str]:
        """For each device that is not usable, the fixture's reason."""
        del self.log.lines[:]
        self.usable()
        skipped = [line for line in self.log.lines if "SKIPPED" in line]
        return {line.split()[1].rstrip(":"): line.partition("SKIPPED")[2].strip(" ()") for line in skipped}

    def is_roce(self, device: str) -> bool:
        try:
            return (self.sysfs / device / "ports" / "1" / "link_layer").read_text().strip() == "Ethernet"
        except OSError:
            return False

    def gid_index(self, devices: Sequence[str]) -> int | None:
        """GID index that the fixture sets for Mooncake, None where it sets none."""
        return self.functions[GID_OF_ALL](devices)

    def without_gid(self, devices: Sequence[str]) -> list[str]:
        """Devices without a RoCE v2 GID."""
        return [device for device in devices if self.functions[GID_OF_ONE](device) is None]

    @property
    def knows_gids(self) -> bool:
        """From 0.5.16 on."""
        return GID_OF_ALL in self.functions


def rules(fixture: Path, root: Path) -> Rules:
    """The rules of the fixture in that file, for the devices below `root`. Raises OSError, SyntaxError, KeyError."""
    wanted = {USABLE, GID_OF_ONE, GID_OF_ALL}
    sysfs = root / SYSFS.lstrip("/")
    body = []
    for node in read(fixture).tree.body:
        is_constant = isinstance(node, ast.Assign) and ast.unparse(node.value) == repr(SYSFS)
        if is_constant or (isinstance(node, ast.FunctionDef) and node.name in wanted):
            body.append(_with_constant(node, str(sysfs)))
    log = _Log([])
    namespace: dict[str, Any] = {"os": os, "logger": log, "__name__": "fixture"}
    module = ast.fix_missing_locations(ast.Module(body, type_ignores=[]))
    flags = __future__.annotations.compiler_flag
    exec(compile(module, str(fixture), "exec", flags=flags, dont_inherit=True), namespace)
    functions = {name: namespace[name] for name in wanted if name in namespace}
    if USABLE not in functions:
        raise KeyError(USABLE)
    return Rules(functions, log, sysfs)


def _with_constant(node: ast.stmt, sysfs: str) -> ast.stmt:
    class Replace(ast.NodeTransformer):
        def visit_Constant(self, constant: ast.Constant) -> ast.Constant:
            return ast.Constant(sysfs) if constant.value == SYSFS else constant

    copy = ast.parse(ast.unparse(node)).body[0]
    return Replace().visit(copy)
