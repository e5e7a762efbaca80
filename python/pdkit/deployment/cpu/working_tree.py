"""A working tree of SGLang: what in it is another than in the release, and copies of it with a bug planted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WATCHED = "srt/disaggregation", "srt/mem_cache", "srt/managers", "srt/models", "srt/layers"
"""What of SGLang decides how a request is served by a pair; a change elsewhere is told after these."""
MOST = 8


@dataclass(frozen=True)
class Bug:
    """A planted bug: in `file` (relative to SGLang's package) `old`, which is there once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    def plant(self, package: Path) -> None:
        """Change the copy `package`. Raises ValueError unless `old` is in the file exactly once."""
        path = package
        for part in Path(self.file).parts[:-1]:
            path /= part
            _open(path)
        path /= Path(self.file).name
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(
                f"bug {self.name}: {self.file} has {text.count(self.old)} places like {self.old!r}, not one"
            )
        path.unlink()  # a link to the original
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def copy(package: Path, directory: Path) -> Path:
    """A copy of the package `sglang` in the new `directory`, what is in it links to the original's; returns it.

    Change it by `Bug.plant` only: what is written below a folder that no bug is in is written to the original.
    """
    directory.mkdir(parents=True)
    target = directory / "sglang"
    target.symlink_to(package, target_is_directory=True)
    _open(target)
    return target


def _open(folder: Path) -> None:
    """Where `folder` is a link to one, make it a folder of its own, with links in it."""
    if not folder.is_symlink():
        return
    original = folder.resolve()
    folder.unlink()
    folder.mkdir()
    for each in original.iterdir():
        (folder / each.name).symlink_to(each)
    if (folder / "__pycache__").is_dir():
        _open(folder / "__pycache__")  # Python writes there


def changed(package: Path, release: Path) -> list[str]:
    """What differs in `package` from `release`, one line each: a file, and what in it; watched folders first."""
    found = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package)
        theirs = release / file
        if theirs.is_file() and (path.samefile(theirs) or path.read_bytes() == theirs.read_bytes()):
            continue
        names = list(_changed_names(path, theirs)) if theirs.is_file() else ["a new file"]
        found.append(f"{file}: {', '.join(names[:MOST])}{' ...' if len(names) > MOST else ''}")
    return sorted(found, key=lambda line: (not line.startswith(WATCHED), line))


def _changed_names(path: Path, theirs: Path) -> Iterator[str]:
    try:
        ours, old = (_definitions(ast.parse(each.read_text(encoding="utf-8"))) for each in (path, theirs))
    except SyntaxError as error:
        yield f"line {error.lineno}: {error.msg}"
        return
    names = [name for name in ours | old if ours.get(name) != old.get(name)]
    yield from [name for name in names if not any(other.startswith(f"{name}.") for other in names)] or ["comments"]


def _definitions(tree: ast.Module) -> dict[str, str]:
    """Code by the name of what it defines, methods by class; the rest of the module as "module level"."""
    found: dict[str, str] = {}
    rest = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
            found |= {f"{node.name}.{each.name}": ast.unparse(each) for each in methods}
            others = [each for each in node.body if each not in methods]
            found[f"{node.name}"] = "\n".join(ast.unparse(each) for each in others)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name] = ast.unparse(node)
        else:
            rest.append(ast.unparse(node))
    return found | {"module level": "\n".join(rest)}


def report(package: Path, release: Path) -> str:
    """The differences as the end of a failure's message; "" if there are none."""
    lines = changed(package, release)
    if not lines:
        return ""
    more = [f"  and {len(lines) - MOST} more files"] if len(lines) > MOST else []
    return "\n".join([f"{package.parent} differs from the release in:", *(f"  {line}" for line in lines[:MOST]), *more])
