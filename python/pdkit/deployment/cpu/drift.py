"""Whether an SGLang still is what the shims were written for: `python3 -m pdkit.deployment.cpu.drift [record]`.

Reads source files and imports nothing of SGLang. Of each name that is replaced, and of each file that a replacement
imitates, `assets/sglang-cpu-drift.txt` has a digest of the code (comments and layout left out, of Python at least) as it is in
RELEASE; of a name that is wrapped it says that there is one. The code of a file whose bytes are those of RELEASE is not
read. A name that is absent or another digest means that the replacements may
be wrong: the servers are not started.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from pdkit.core.errors import ExitCode, NotReady
from pdkit.core.paths import ASSETS
from pdkit.deployment.cpu import plan
from pdkit.deployment.cpu.registry import REPLACEMENTS

RELEASE = "0.5.23"
RECORD = ASSETS / "sglang-cpu-drift.txt"
WHOLE, BYTES = "-", "="
ABSENT, PRESENT = "absent", "present"


def entries() -> dict[tuple[str, str], bool]:
    """(file relative to SGLang's package, name in it, WHOLE or BYTES) of all that is to be recorded -> whether any code
    will do."""
    from pdkit.deployment.cpu import shims  # noqa: F401  registers; torch: only who records it pays for it

    found = {}
    for each in REPLACEMENTS:
        if each.module.startswith("sglang."):
            found[each.module.removeprefix("sglang.").replace(".", "/") + ".py", each.attribute] = each.wraps
        found |= {(file, WHOLE): False for file in each.imitates}
    return found | {(file, BYTES): False for file, _ in found}


def digest(package: Path, file: str, name: str, any_code: bool) -> str:
    """12 hexadecimal digits of what defines `name`, or ABSENT, or with `any_code` PRESENT. What is set on `self` counts."""
    path = package / file
    if not path.is_file():
        return ABSENT
    text = path.read_text(encoding="utf-8")
    if file.endswith(".py") and name != BYTES:
        tree: ast.AST = ast.parse(text)
        nodes = [tree] if name == WHOLE else list(_definitions(tree, name.split(".")))
        if not nodes:
            return ABSENT
        if any_code:
            return PRESENT
        text = "\n".join(ast.unparse(node) for node in nodes)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _definitions(tree: ast.AST, path: list[str]) -> Iterator[ast.AST]:
    """Statements that define the name, in a class if the path has two parts, wherever in it."""
    for node in ast.walk(tree):
        if path[0] not in _names(node):
            continue
        if len(path) == 1:
            yield node
        else:
            yield from _definitions(node, path[1:])


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [
        target.id if isinstance(target, ast.Name) else target.attr
        for target in targets
        if isinstance(target, ast.Name)
        or (isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self")
    ]


def recorded() -> dict[tuple[str, str], str]:
    """What RELEASE has: (file, name) -> digest."""
    rows = (line.split() for line in RECORD.read_text(encoding="utf-8").splitlines())
    return {(file, name): value for file, name, value in rows}


def differences(package: Path) -> list[str]:
    """One phrase for each name or file that is not as in RELEASE."""
    known, found = recorded(), []
    unchanged = {
        file for (file, name), then in known.items() if name == BYTES and digest(package, file, name, False) == then
    }
    for (file, name), then in known.items():
        if file in unchanged or name == BYTES:  # reading the code of a file takes long, and most are as they were
            continue
        now = digest(package, file, name, any_code=then == PRESENT)
        if now != then:
            what = file if name == WHOLE else f"{name} of {file}"
            found.append(f"{what} is absent" if now == ABSENT else f"{what} is another")
    return found


def installed_package() -> Path:
    """The package of the installed release. Raises NotReady."""
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:
        raise NotReady("SGLang is not installed; scripts/env.sh makes an environment that has it")
    return Path(found.origin).parent


def require_fit() -> None:
    """Raises NotReady, in one line, unless the SGLang under test is one that the shims fit."""
    tree = plan.source()
    if tree is None:
        version = importlib.metadata.version("sglang")
        if version != RELEASE:
            raise NotReady(
                f"target sglang-cpu needs SGLang {RELEASE}, found {version}: its CPU shims were written for {RELEASE}; "
                "use the pinned environment (scripts/env.sh), or another target"
            )
        package, where = installed_package(), f"SGLang {version}"
    else:
        package, where = tree / "sglang", f"the working tree {tree}"
        if not package.is_dir():
            raise NotReady(f"{tree} has no package sglang: --sglang-source takes a checkout of SGLang, or its python/")
    found = differences(package)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise NotReady(
            f"the CPU shims do not fit {where}: {'; '.join(found[:3])}{more}; what they replace or imitate must be as in "
            f"SGLang {RELEASE}, or a change there goes unseen on this target: use one with a GPU"
        )


def main() -> int:
    if sys.argv[1:] == ["record"]:
        package = installed_package()
        lines = (f"{file} {name} {digest(package, file, name, any_)}\n" for (file, name), any_ in entries().items())
        RECORD.write_text("".join(sorted(lines)), encoding="utf-8")
        return ExitCode.PASSED
    try:
        require_fit()
    except NotReady as reason:
        print(f"sglang-cpu: {reason}", file=sys.stderr)
        return ExitCode.NOT_READY
    print(
        f"the CPU shims fit: {sum(name != BYTES for _, name in recorded())} names and files are as in SGLang {RELEASE}"
    )
    return ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(main())
