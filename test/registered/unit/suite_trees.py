"""Small trees of test files for the tests of the runner."""

import textwrap
from pathlib import Path

MAIN = '\n\nif __name__ == "__main__":\n    unittest.main()\n'
IMPORTS = "import unittest\n\nfrom pdkit.core.ci_register import register_cpu_ci, register_cuda_ci\n\n"
CPU = 'register_cpu_ci(est_time=5, suite="stage-a-test-cpu")'


def source_of(methods: str = "def test_it(self): pass", registration: str = CPU, main: str = MAIN) -> str:
    """Source of a test file with one test class that has `methods`."""
    body = textwrap.indent(textwrap.dedent(methods), "    ")
    return f"{IMPORTS}{registration}\n\n\nclass T(unittest.TestCase):\n{body}\n{main}"


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Writes `files` below `root`/registered and returns that directory."""
    registered = root / "registered"
    registered.mkdir(exist_ok=True)
    for name, source in files.items():
        path = registered / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return registered
