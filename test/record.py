"""What must not change unnoticed, recorded in test/data: compares it with what is so now, or records it again.

scripts/env.sh python3 test/record.py                          compare all records; exit code 1 where one differs
scripts/env.sh python3 test/record.py --update [NAME...]       record again
python3 test/record.py --sglang-wheel WHEEL [--update]         the launch contract with another release of SGLang
"""

import argparse
import difflib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from unittest import mock

TEST = Path(__file__).resolve().parent
REPO = TEST.parent
DATA = TEST / "data"
REGISTERED = TEST / "registered"
sys.path[:0] = [str(REPO / "python"), str(TEST), str(REGISTERED / "unit")]

SHAPES_WHAT_IS_LAUNCHED = re.compile("SGLANG_|SGL_|PDKIT_|CUDA_|XDG_CACHE_HOME$|GITHUB_")
CLAIMED = range(22000, 32000)  # pdkit.core.ports.BLOCKS; SGLang's fixture has 21000 to 21599


def clean_environment(cache: str) -> dict[str, str]:
    """This environment without what changes a launch, and with an empty cache: no trained checkpoint is found."""
    kept = {name: value for name, value in os.environ.items() if not SHAPES_WHAT_IS_LAUNCHED.match(name)}
    return kept | {"PDKIT_CACHE_DIR": cache}


# The launch contract


class PortNames:
    """Names for ports that were claimed at run time, in the order in which a test first mentions them."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}

    def in_text(self, text: str) -> str:
        def name(match: re.Match) -> str:
            port = int(match[0])
            if port not in CLAIMED or port % 1000 < 600:
                return match[0]
            return self.names.setdefault(port, f"<port {len(self.names) + 1}>")

        return re.sub(r"(?<![\d.])\d{5}(?![\d.])", name, text)

    def derived(self, port: int) -> str:
        """A port that follows one with a name, as those of DP attention do."""
        if self.in_text(str(port)) == str(port):
            return str(port)
        del self.names[port]
        base = max((known for known in self.names if known <= port), default=port)
        return f"{self.names[base]} + {port - base}" if base in self.names else "<port unnamed>"


def flag_lines(argv: Sequence[str]) -> list[str]:
    """One line for each flag and its values, in the order given."""
    lines: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(word)
    return [shlex.join(line) for line in lines]


def normalised_process(process: Mapping, ports: PortNames, paths: Mapping[str, str]) -> dict:
    """A process of `launch_contract.as_data` with names for claimed ports and for directories."""

    def stable(text: str) -> str:
        for path, name in paths.items():
            text = text.replace(path, name)
        text = re.sub(r"/\S*?/contract-\w+", "<temporary>", text)
        return ports.in_text(re.sub(r"(<temporary>/\S+?-)[a-z0-9_]{8}(?=/|$)", r"\1<random>", text))

    argv = [stable(line) for line in flag_lines(process["argv"])]
    known = {what: ports.names.get(port) for what, port in process["ports"].items()}
    return {
        "name": process["name"],
        "module": process["module"],
        "argv": argv,
        "env": {name: stable(value) for name, value in sorted(process["env"].items())},
        "ports": {what: known[what] or ports.derived(port) for what, port in sorted(process["ports"].items())},
        "findings": [f"{f['level']}: {f['subject']}: {f['message']}" for f in process["findings"]],
    }


def launch_contract_of(wheel: Path | None = None) -> tuple[str, dict]:
    """(Version, what each distributed test launches on that release), of the wheel or else of the installed SGLang.

    A file that the release cannot import has the reason instead of its tests.
    """
    from pdkit.preflight.contract import launches

    # Servers on CPU are forked from a process that has torch and transformers, for which there are stand-ins here.
    files = sorted((REGISTERED / "distributed").glob("test_*.py"))
    files = [file for file in files if not file.name.startswith("test_disaggregation_sglang_cpu")]
    with tempfile.TemporaryDirectory(prefix="record-") as cache, launches.release_of(wheel) as release:
        paths = {cache: "<cache>", str(REPO): "<repository>", str(release.root): "<site-packages>"}
        with mock.patch.dict(os.environ, clean_environment(cache), clear=True):
            contracts = list(launches.ask_each(release, files))
    data: dict[str, dict | str] = {}
    for file, contract in zip(files, contracts, strict=True):
        if not isinstance(contract, launches.Contract):
            data[file.name] = str(contract).partition(": cannot be imported: ")[2] or str(contract)
            continue
        data[file.name] = tests = {}
        for test in launches.as_data(contract)["tests"]:
            ports = PortNames()
            processes = [normalised_process(process, ports, paths) for process in test["processes"]]
            tests[test["test"]] = {"problem": test["problem"], "processes": processes}
    return release.version, data


# The names of the tests


def loaded_tests() -> dict:
    """`Class.method` of the tests in each registered file, as unittest loads them; imports all files."""
    import importlib
    import unittest

    from pdkit.core.registry import collect

    def names(suite: Iterable) -> Iterable[str]:
        for test in suite:
            yield from names(test) if isinstance(test, unittest.TestSuite) else [test]

    collection = collect(REGISTERED)
    assert not collection.errors, collection.errors
    found = {}
    for registration in collection.registrations:
        path = Path(registration.filename)
        where = f"{registration.hw} {registration.suite}" + " nightly" * registration.nightly
        where += " disabled" * (not registration.is_enabled)
        if registration.name in found:
            found[registration.name]["registered"].append(where)
            continue
        sys.path.insert(0, str(path.parent))
        module = importlib.import_module(path.stem)
        assert Path(module.__file__) == path, f"two modules are called {path.stem}: {module.__file__}, {path}"
        loader = unittest.TestLoader()
        tests = list(names(loader.loadTestsFromModule(module)))
        assert not loader.errors, loader.errors
        described = sorted(f"{type(test).__qualname__}.{test._testMethodName}" for test in tests)
        found[registration.name] = {"registered": [where], "tests": described}
    return dict(sorted(found.items()))


def test_names() -> dict:
    """`loaded_tests()` of a process of its own, since what test files import and change would stay."""
    from pdkit.core import forked

    with tempfile.TemporaryDirectory(prefix="record-") as folder:
        answer = Path(folder, "answer.json")
        path = os.pathsep.join(map(str, (REPO / "python", TEST)))
        environment = clean_environment(folder) | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        run = forked.run([sys.executable, "-m", "record", "--loaded-tests", str(answer)], env=environment)
        if run.returncode:
            raise RuntimeError(f"the test files cannot be loaded:\n{run.stdout}{run.stderr}")
        return json.loads(answer.read_text())


# The runner: its lines, files and exit codes

SUITE = ("--hw", "cpu", "--suite", "stage-a-test-cpu", "--no-history", "--jobs", "1")


def stub_files() -> dict[str, str]:
    from suite_trees import source_of

    off = 'register_cpu_ci(est_time=5, suite="stage-a-test-cpu", disabled="see #7")'
    return {
        "test_1_pass.py": source_of(),
        "test_2_fail.py": source_of("def test_it(self): self.fail('a reason')"),
        "test_3_skip.py": source_of("def test_it(self): self.skipTest('no GPU')"),
        "test_4_timeout.py": source_of("def test_it(self):\n    import time\n    time.sleep(300)"),
        "test_5_disabled.py": source_of(registration=off),
        "test_6_retried.py": source_of(
            """
            def test_it(self):
                from pathlib import Path
                seen = Path(__file__ + ".seen")
                was_seen = seen.exists()
                seen.touch()
                self.assertGreater(0.96 if was_seen else 0.94, 0.95)
            """
        ),
    }


def normalised_output(text: str, root: Path) -> list[str]:
    """Lines of the runner itself, without what the test files print (indented), times, and where things are."""
    joined = "\n".join(line for line in text.splitlines() if not line.startswith("  "))
    joined = joined.replace(sys.executable, "<python>").replace(str(root), "<root>")
    joined = joined.replace(f'"{root.name}/', '"<root>/')
    joined = re.sub(r"<root>/pdkit-logs-\w+", "<logs>", joined)
    joined = re.sub(r"Python [\d.]+\w*", "Python <version>", joined)
    joined = re.sub(r"(?m)(; |in |after )[\d.]+ s\b", r"\1<seconds> s", joined)
    return re.sub(r'("elapsed"|"duration"): [\d.]+', r"\1: <seconds>", joined).splitlines()


def run_suite(files: Iterable[str], *words: str) -> dict:
    """What the runner returns, prints and leaves for a tree of the stub files named."""
    from suite_trees import run_tree

    sources = stub_files()
    with tempfile.TemporaryDirectory(prefix="record-") as folder:
        root = Path(folder)
        metrics, summary = root / "metrics.jsonl", root / "summary.md"
        told = {"TMPDIR": folder, "SGLANG_TEST_METRICS_FILE": str(metrics), "GITHUB_STEP_SUMMARY": str(summary)}
        chosen = {name: sources[name] for name in files}
        run = run_tree(root, chosen, *SUITE, *words, environment=clean_environment(folder) | told)
        return {
            "words": list(words),
            "exit code": run.returncode,
            "stdout": normalised_output(run.stdout, root),
            "stderr": normalised_output(run.stderr, root),
            "SGLANG_TEST_METRICS_FILE": normalised_output(metrics.read_text() if metrics.exists() else "", root),
            "GITHUB_STEP_SUMMARY": summary.read_text().splitlines() if summary.exists() else None,
        }


def runner_output() -> dict:
    all_files = list(stub_files())
    retry = ("--enable-retry", "--retry-wait-seconds", "0")
    return {
        "all kinds of files": run_suite(all_files, "--continue-on-error", "--timeout-per-file", "4"),
        "all pass": run_suite(all_files[:1]),
        "the first failure ends it": run_suite(all_files[:3]),
        "retried": run_suite(all_files[-1:], *retry),
        "all skip": run_suite(all_files[2:3]),
        "nothing is registered": run_suite([]),
        "unknown suite": run_suite(all_files[:1], "--suite", "stage-a-test-cpus"),
    }


def exit_codes() -> dict:
    """Names and numbers, and what the commands return that end before they start anything."""
    from pdkit.core.errors import MEANINGS, ExitCode

    commands = {
        "run_suite.py --no-such-flag": [sys.executable, TEST / "run_suite.py", "--no-such-flag"],
        "run_suite.py --list": [sys.executable, TEST / "run_suite.py", "--list"],
        "run.sh --no-such-flag": [REPO / "scripts" / "run.sh", "--no-such-flag"],
        "run.sh on a target that this machine lacks the GPUs for": [REPO / "scripts" / "run.sh", "--on", "8xH200"],
        "test.sh --no-such-flag": [REPO / "scripts" / "test.sh", "--no-such-flag"],
        "env.sh without the Python that it is given": ["env", "PDKIT_PYTHON=/none", REPO / "scripts" / "env.sh"],
    }
    with tempfile.TemporaryDirectory(prefix="record-") as folder:
        environment = clean_environment(folder) | {"PDKIT_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        seen = {
            name: subprocess.run([*map(str, command)], env=environment, capture_output=True).returncode
            for name, command in commands.items()
        }
    return {
        "codes": {code.name: int(code) for code in ExitCode},
        "meanings": {code.name: meaning for code, meaning in MEANINGS.items()},
        "seen": seen,
    }


# The detection matrix


def detection_matrix() -> dict:
    """What the library injects, and what caught it in the run that docs/detection-matrix.md shows."""
    from pdkit.faults.library import LIBRARY

    text = (REPO / "docs" / "detection-matrix.md").read_text()
    checks: list[str] = []
    failed: dict[str, int] = {}
    caught: dict[str, str] = {}
    changes: dict[str, bool] = {}
    for table in re.findall(r"(?m)(?:^\|.*\n)+", text):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        if head[-3:] != ["changes", "caught after (s)", "cost (s)"]:
            continue
        clean, *faulty = rows
        checks += head[1:-3]
        failed |= dict(zip(head[1:-3], map(int, clean[1:-3]), strict=True))
        for row in faulty:
            caught[row[0]] = ", ".join(check for check, cell in zip(head[1:-3], row[1:], strict=False) if cell == "●")
            changes[row[0]] = row[-3] == "yes"
    faults = {
        fault.name: {"where": fault.where.name, "changes": changes.get(fault.name), "caught by": caught.get(fault.name)}
        for fault in LIBRARY.values()
    }
    not_in_library = sorted(set(caught) - set(faults))
    return {
        "checks": checks,
        "failed of the runs without a fault": failed,
        "faults": dict(sorted(faults.items())),
        "in the documents alone": not_in_library,
    }


INSTALLED_CONTRACT = "launch_contract-0.5.23"
RECORDS: dict[str, Callable[[], dict]] = {
    INSTALLED_CONTRACT: lambda: launch_contract_of()[1],
    "test_names": test_names,
    "runner_output": runner_output,
    "exit_codes": exit_codes,
    "detection_matrix": detection_matrix,
}


def path_of(name: str) -> Path:
    return DATA / f"{name}.json"


def as_text(data: dict) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def difference(name: str, data: dict) -> str:
    """A unified diff from the record to `data`, empty where they are equal."""
    recorded = path_of(name).read_text() if path_of(name).exists() else ""
    lines = recorded.splitlines(), as_text(data).splitlines()
    return "\n".join(difflib.unified_diff(*lines, f"recorded {name}", f"{name} now", lineterm="", n=6))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"records: {', '.join(RECORDS)} (default: all)")
    parser.add_argument("--update", action="store_true", help="write what is so now instead of comparing")
    parser.add_argument("--sglang-wheel", type=Path, action="append", default=[], metavar="WHEEL")
    parser.add_argument("--loaded-tests", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - set(RECORDS):
        parser.error(f"no record is named {', '.join(sorted(unknown))}; choose from {', '.join(RECORDS)}")
    if args.loaded_tests:
        args.loaded_tests.write_text(json.dumps(loaded_tests()))
        return 0
    current: dict[str, dict] = {}
    for wheel in args.sglang_wheel:
        version, data = launch_contract_of(wheel)
        current[f"launch_contract-{version}"] = data
    names = args.names or (() if args.sglang_wheel else RECORDS)
    current |= {name: RECORDS[name]() for name in names}
    differs = 0
    for name, data in current.items():
        text = difference(name, data)
        print(f"{path_of(name).relative_to(REPO)}: {'differs' if text else 'as recorded'}")
        if text and args.update:
            DATA.mkdir(exist_ok=True)
            path_of(name).write_text(as_text(data))
        elif text:
            differs = 1
            print(text)
    return differs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
