"""The list of what is replaced, for docs: `python3 -m pdkit.deployment.cpu.listing docs/sglang-cpu.md`."""

import sys
from pathlib import Path

from pdkit.deployment.cpu import shims  # noqa: F401  registers
from pdkit.deployment.cpu.registry import REPLACEMENTS


def table() -> str:
    """The list as Markdown, for docs/sglang-cpu.md."""
    rows = ["| replaced | by or because | imitates |", "| --- | --- | --- |"]
    for each in sorted(REPLACEMENTS, key=lambda each: (each.family != "any", each.family, each.target)):
        files = ", ".join(f"`{file.rpartition('/')[2]}`" for file in each.imitates)
        kind = " (added)" if each.adds else " (wrapped)" if each.wraps else ""
        rows.append(f"| `{each.target.removeprefix('sglang.')}`{kind} | {each.why} | {files} |")
    return "\n".join(rows)


BEGIN, END = "<!-- replaced -->", "<!-- end of replaced -->"


def main() -> None:
    """Write the list into the file that is named."""
    path = Path(sys.argv[1])
    head, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.write_text(f"{head}{BEGIN}\n{table()}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
