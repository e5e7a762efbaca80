"""`start_prefill` and `start_decode` of SGLang's PD fixture: what an override has to keep."""

import ast
from collections.abc import Iterator

from pdkit.core.source import Source, TestClass
from pdkit.preflight.lint.findings import Finding
from pdkit.preflight.lint.processes import starters

Method = tuple[TestClass, ast.FunctionDef]


def _reach(cls: TestClass, start: Method) -> tuple[list[ast.FunctionDef], set[str]]:
    """Methods that `start` gets to through self, cls and super(), and the names that only the fixture can answer."""
    reached, open_methods, outside = [], [start], set()
    while open_methods:
        owner, function = open_methods.pop()
        if function in reached:
            continue
        reached.append(function)
        for node in ast.walk(function):
            if not isinstance(node, ast.Attribute):
                continue
            is_super = isinstance(node.value, ast.Call) and owner.source.dotted(node.value.func) == "super"
            if is_super or owner.source.dotted(node.value) in ("self", "cls"):
                found = cls.method(node.attr, above=owner if is_super else None)
                if found:
                    open_methods.append(found)
                elif is_super:
                    outside.add(node.attr)
    return reached, outside


def pd_override(source: Source, _) -> Iterator[Finding]:
    """An override that starts the server itself pins its NCCL port and passes the NICs of its own GPUs."""
    known = starters(source)
    for cls in source.classes.values():
        for side in ("prefill", "decode"):
            if not cls.is_pd or f"start_{side}" not in cls.methods:
                continue
            reached, outside = _reach(cls, (cls, cls.methods[f"start_{side}"]))
            starts = any(isinstance(n, ast.Call) and known.starts(n) for f in reached for n in ast.walk(f))
            if f"start_{side}" in outside or not starts:
                continue
            line = cls.methods[f"start_{side}"].lineno
            if not any(_pins_nccl(function) for function in reached):
                message = (
                    f"start_{side} passes no --nccl-port, so that both servers may draw the same one; "
                    f'add ["--nccl-port", cls.{side}_nccl_port]'
                )
                yield Finding(source.path, line, "pd-override", message)
            if not any(_asks_for_nics(function) for function in reached):
                message = (
                    f"start_{side} does not choose NICs by its GPUs, so that the state may cross sockets; "
                    f"add cls.rdma_devices_for({side} GPUs)"
                )
                yield Finding(source.path, line, "pd-override", message)


def _pins_nccl(function: ast.FunctionDef) -> bool:
    words = [node.value for node in ast.walk(function) if isinstance(node, ast.Constant)]
    return any(isinstance(word, str) and word.startswith("--nccl-port") for word in words)


def _asks_for_nics(function: ast.FunctionDef) -> bool:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and node.args]
    return any(_last(call.func) in ("rdma_devices_for", "get_rdma_devices_args") for call in calls)


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
