"""Ports that are written down collide with whoever else runs on the machine."""

import ast
import re
from collections.abc import Iterator

from pdkit.core.source import Source
from pdkit.preflight.lint.findings import Finding
from pdkit.preflight.lint.processes import launches

ADVICE = "a second run collides with it; take the fixture's (cls.lb_port, ...) or pdkit.core.ports.claim()"
_URL = re.compile(r"(?:^|//)(?:127\.\d+\.\d+\.\d+|localhost|0\.0\.0\.0|\[::1?\]):(\d{4,5})\b")
_HOSTS = {"", "127.0.0.1", "localhost", "0.0.0.0", "::", "::1"}
_NAME = re.compile(r"(.*_)?port", re.IGNORECASE)
_FLAG = re.compile(r"--(.*-)?port")
_PORTS = range(1024, 65536)


def fixed_port(source: Source, _) -> Iterator[Finding]:
    """In a file that launches or listens: no port is a number in the source."""
    if not launches(source):
        return
    for node in source.nodes:
        for line, port in _written(node):
            yield Finding(source.path, line, "fixed-port", f"port {port} is fixed, {ADVICE}")


def _written(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and (match := _URL.search(node.value)):
        if _is_port(match[1]):
            yield node.lineno, match[1]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from _in_words(node)
    elif isinstance(node, ast.keyword) and node.arg and _NAME.fullmatch(node.arg):
        yield from _number(node.value)
    elif isinstance(node, ast.Assign) and any(_NAME.fullmatch(_target(target)) for target in node.targets):
        yield from _number(node.value)
    elif isinstance(node, (ast.List, ast.Tuple)):
        yield from _in_sequence(node.elts)


def _in_words(node: ast.Constant) -> Iterator[tuple[int, str]]:
    words = node.value.replace("=", " ").split()
    for flag, value in zip(words, words[1:]):
        if _FLAG.fullmatch(flag) and _is_port(value):
            yield node.lineno, value


def _in_sequence(elements: list[ast.expr]) -> Iterator[tuple[int, str]]:
    for before, element in zip(elements, elements[1:]):
        word = before.value if isinstance(before, ast.Constant) else None
        if isinstance(word, str) and (_FLAG.fullmatch(word) or (word in _HOSTS and len(elements) == 2)):
            yield from _number(element)


def _number(node: ast.expr) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Constant) and _is_port(str(node.value)):
        yield node.lineno, str(node.value)


def _is_port(text: str) -> bool:
    return text.isdecimal() and int(text) in _PORTS


def _target(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
