"""Registered the way SGLang's runner reads it, for a suite that exists, and honest about failure."""

import ast
import re
from collections.abc import Iterator

from pdkit.core.registry import Collection, defined_suites
from pdkit.core.source import Source
from pdkit.core.suggest import unknown
from pdkit.preflight.finding import Finding, broken

ADVICE = 'write register_cpu_ci(est_time=60, suite="stage-a-test-cpu"), all literal, at the top level, and a main block'
_REGISTER = re.compile(r"register_\w+_ci")


def _calls(source: Source) -> list[ast.Call]:
    return [call for call in source.calls if _REGISTER.fullmatch(source.dotted(call.func).rpartition(".")[2])]


def registration(source: Source, collection: Collection) -> Iterator[Finding]:
    """A literal `register_<hw>_ci(...)` at the top level and a main block, by SGLang's own `ci_register`."""
    name = str(source.path)
    for error in collection.errors:
        if error.startswith((f"{name}:", f"{name} ")) or error.endswith(name):
            what = error.removeprefix(f"{name}:").replace(f" in {name}", "").strip()
            line = next((call.lineno for call in _calls(source)), 1)
            yield broken(source.path, line, "registration", f"{what}; {ADVICE}")


def suite(source: Source, collection: Collection) -> Iterator[Finding]:
    """The suite is one of the project's, or one that another file registers for the same hardware."""
    mine = [r for r in collection.registrations if r.filename == str(source.path)]
    known = {hw: defined_suites(hw) for hw in collection.hardware}
    for registration in collection.registrations:
        if registration.suite and registration not in mine:
            known[registration.hw].add(registration.suite)
    for registration in mine:
        if registration.suite in known[registration.hw]:
            continue
        owners = [hw for hw, names in known.items() if registration.suite in names]
        if owners:
            message = f"{registration.suite!r} is a suite for {', '.join(owners)}; use register_{owners[0]}_ci"
        else:
            message = unknown(f"{registration.hw} suite", registration.suite, known[registration.hw])
            message += "; use one of these, or add it to PROJECT_SUITES in pdkit/core/registry.py"
        line = next((c.lineno for c in _calls(source) if _mentions(c, registration.suite)), 1)
        yield broken(source.path, line, "suite", message)


def _mentions(call: ast.Call, suite_name: str) -> bool:
    nodes = (node.value for node in ast.walk(call) if isinstance(node, ast.Constant))
    words = [value for value in nodes if isinstance(value, str)]
    return suite_name in [*words, "-test-".join(words)] or not words


def silent_main(source: Source, _: object) -> Iterator[Finding]:
    """What the main block runs must tell the shell that it failed."""
    for node in source.nodes:
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
            continue
        call = node.value
        name = source.dotted(call.func)
        if name == "pytest.main":
            message = "pytest.main() returns its exit code and the file ends with 0; write sys.exit(pytest.main(...))"
            yield broken(source.path, node.lineno, "silent-main", message)
        exits = {keyword.arg: source.value(keyword.value) for keyword in call.keywords}.get("exit", True)
        if name == "unittest.main" and exits is False:
            message = "unittest.main(exit=False) ends with 0 when tests fail; write unittest.main()"
            yield broken(source.path, node.lineno, "silent-main", message)
