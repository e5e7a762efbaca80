"""`start_prefill` and `start_decode` of SGLang's PD fixture: what an override has to keep."""

import ast
import re
from collections.abc import Iterator

from pdkit.core.source import Function, Source, TestClass
from pdkit.preflight.finding import Finding, broken

STARTERS = re.compile(r"(subprocess|psutil)\.Popen|sglang\.test\.test_utils\.popen_\w+")


def _reach(cls: TestClass, start: tuple[TestClass, Function]) -> tuple[list[tuple[Source, Function]], set[str]]:
    """Functions that `start` gets to through self, cls, super() and its file, and names that only the fixture has."""
    reached: list[tuple[Source, Function]] = []
    open_functions, outside = [start], set()
    while open_functions:
        owner, function = open_functions.pop()
        if (owner.source, function) in reached:
            continue
        reached.append((owner.source, function))
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id in owner.source.functions:
                open_functions.append((owner, owner.source.functions[node.id]))
            if not isinstance(node, ast.Attribute):
                continue
            is_super = isinstance(node.value, ast.Call) and owner.source.dotted(node.value.func) == "super"
            if is_super or owner.source.dotted(node.value) in ("self", "cls"):
                found = cls.method(node.attr, above=owner if is_super else None)
                if found:
                    open_functions.append(found)
                elif is_super:
                    outside.add(node.attr)
    return reached, outside


def pd_override(source: Source, _: object) -> Iterator[Finding]:
    """An override that starts the server itself pins its NCCL port and passes the NICs of its own GPUs."""
    for cls in source.classes.values():
        for side in ("prefill", "decode"):
            if not cls.is_pd or f"start_{side}" not in cls.methods:
                continue
            reached, outside = _reach(cls, (cls, cls.methods[f"start_{side}"]))
            nodes = [(owner, node) for owner, function in reached for node in ast.walk(function)]
            calls = [(owner, node) for owner, node in nodes if isinstance(node, ast.Call)]
            starts = any(STARTERS.fullmatch(owner.dotted(call.func)) for owner, call in calls)
            if f"start_{side}" in outside or not starts:
                continue
            line = cls.methods[f"start_{side}"].lineno
            words = [str(node.value) for _, node in nodes if isinstance(node, ast.Constant)]
            if not any(word.startswith("--nccl-port") for word in words):
                message = (
                    f"start_{side} passes no --nccl-port, so that both servers may draw the same one; "
                    f'add ["--nccl-port", cls.{side}_nccl_port]'
                )
                yield broken(source.path, line, "pd-override", message)
            asked = {ast.unparse(call.func).rpartition(".")[2] for _, call in calls if call.args}
            if not asked & {"rdma_devices_for", "get_rdma_devices_args"}:
                message = (
                    f"start_{side} does not choose NICs by its GPUs, so that the state may cross sockets; "
                    f"add cls.rdma_devices_for({side} GPUs)"
                )
                yield broken(source.path, line, "pd-override", message)
