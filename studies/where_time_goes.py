"""Where the time of a suite goes: `where_time_goes.py DIR`, the --report-dir of a run of test/run_suite.py.

One line per file, the longest first, in seconds:

    total    the file's process, from its start to its end
    CPU      what all its processes computed; imports that a warm process did before are not in it
    waits    total - CPU: another core's turn, a server, a timer; negative where more than one core was busy
    start    until the first phase or test begins: imports
    servers  phases that launch and stop servers, and how many were launched
    tests    phases of an eval and tests, and how many
    rest     between them, and after the last
"""

import argparse
import json
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
from pdkit.core import events  # noqa: E402
from pdkit.core.events import Events  # noqa: E402
from pdkit.runner.report.evidence import directory_of  # noqa: E402

SERVERS = ("launch ", "start ", "teardown")


def overlap(spans: list[tuple[float, float]]) -> float:
    """Seconds that are in at least one of (begin, end)."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def spans_of(happened: Events) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(begin, end) of what belongs to servers, and of tests."""
    servers, tests = [], []
    for event in happened.of("phase", "test"):
        if event.get("seconds"):
            span = (event["ts"] - event["seconds"], event["ts"])
            is_server = event["kind"] == "phase" and event["name"].startswith(SERVERS)
            (servers if is_server else tests).append(span)
    return servers, tests


def row(file: dict, directory: Path) -> tuple[float, list[str]]:
    """(total, cells) of a file of results.json."""
    attempt = file["attempts"][-1]
    happened = events.read(directory_of(directory / attempt["log"]))
    servers, tests = spans_of(happened)
    total, cpu = attempt["seconds"], attempt["cpu_seconds"]
    began = next((event["ts"] for event in happened.of("started")), None)
    first = min((begin for begin, _ in servers + tests), default=None)
    start = max(0.0, first - began) if began and first else total
    in_servers = overlap(servers)
    in_tests = overlap(servers + tests) - in_servers
    seconds = (total, cpu, total - cpu, start, in_servers, in_tests, max(0.0, total - start - in_servers - in_tests))
    cells = [f"{value:.1f}" for value in seconds]
    cells[4] += f" ({len(happened.of('launch'))})"
    cells[5] += f" ({len(happened.of('test'))})"
    return total, [Path(file["file"]).name, *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="of --report-dir")
    directory = parser.parse_args().directory
    results = json.loads((directory / "results.json").read_text())
    ran = [file for file in results["files"] if file["attempts"]]
    rows = sorted((row(file, directory) for file in ran), reverse=True)
    table = Table(box=box.SIMPLE_HEAD, title=f"{len(rows)} files in {results['seconds']:.0f} s", title_justify="left")
    table.add_column("file")
    for name in ("total", "CPU", "waits", "start", "servers", "tests", "rest"):
        table.add_column(name, justify="right")
    for _, cells in rows:
        table.add_row(*cells)
    sums = [sum(float(cells[column].split()[0]) for _, cells in rows) for column in range(1, 8)]
    table.add_section()
    table.add_row("all", *(f"{value:.0f}" for value in sums))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
