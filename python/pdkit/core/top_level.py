"""The top-level statements of a test file that registration rules look at, without parsing the rest of it.

Parsing a whole file takes milliseconds, which is seconds for SGLang's tree. A registration at the start of a line
and an `if __name__ == "__main__":` block can be cut out first, provided that nothing else in the file looks like
one; wherever that is in doubt, the whole file is parsed.
"""

import ast
import re

_STRING_OR_COMMENT = re.compile(
    rb'''"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'''
    rb"""|'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"""
    rb'''|"[^"\\\n]*(?:\\.[^"\\\n]*)*"'''
    rb"""|'[^'\\\n]*(?:\\.[^'\\\n]*)*'"""
    rb"|\#[^\n]*",
    re.DOTALL,
)
_REGISTER = re.compile(rb"register_\w+_ci\s*\(")
_REGISTER_CALL = re.compile(
    rb"""\nregister_\w+_ci\((?:[^()"'\#]|"[^"\\\n]*"|'[^'\\\n]*')*\)[ \t]*(?:\#[^\n]*)?(?=\n|\Z)"""
)
_REGISTER_AT_MARGIN = re.compile(rb"\nregister_\w+_ci\(")
_MAIN_BLOCK = re.compile(rb"""\nif __name__ == ["']__main__["']:[^\n]*\n(?:[ \t]+[^\n]*\n?|\n)+""")
_MAIN_AT_MARGIN = re.compile(rb"\nif __name__ ==")
_BRACKETS = ((b"(", b")"), (b"[", b"]"), (b"{", b"}"))


def _excerpt(source: bytes) -> bytes | None:
    """The registrations and the main block of `source`; None where they cannot be told from strings or nested code."""
    source = b"\n" + source
    calls = [match.group() for match in _REGISTER_CALL.finditer(source)]
    mains = [match.group() for match in _MAIN_BLOCK.finditer(source)]
    if not calls or len(mains) != 1 or len(calls) != len(_REGISTER.findall(source)):
        return None
    code = _STRING_OR_COMMENT.sub(b"", source)
    outside_strings = len(_REGISTER_AT_MARGIN.findall(code)) == len(calls) and len(_MAIN_AT_MARGIN.findall(code)) == 1
    well_formed = not re.search(rb"[\"'\\]", code) and all(code.count(a) == code.count(b) for a, b in _BRACKETS)
    return b"".join(calls + mains) if outside_strings and well_formed else None


def parse(source: bytes, filename: str) -> ast.Module:
    """Syntax tree with the top-level expressions and `if` blocks of `source`, or those of them that can matter.

    Raises SyntaxError where the file has to be parsed as a whole and is not Python.
    """
    excerpt = _excerpt(source)
    try:
        tree = ast.parse(excerpt if excerpt is not None else source, filename=filename)
    except SyntaxError:
        tree = ast.parse(source, filename=filename)
    tree.body = [statement for statement in tree.body if isinstance(statement, (ast.Expr, ast.If))]
    return tree
