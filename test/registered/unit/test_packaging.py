"""setup.cfg and the lock file say what the code needs, and the package has all of its files."""

import ast
import configparser
import re
import sys
import unittest
from pathlib import Path

from pdkit.core.ci_register import register_cpu_ci
from pdkit.preflight.environment.packages import BACKENDS

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

REPO = Path(__file__).parents[3]
OUR_MODULES = {"pdkit"} | {path.stem for path in (REPO / "test").rglob("*.py")}
DISTRIBUTION = {
    "sglang_router": "sglang-router",
    "pynvml": "nvidia-ml-py",
    "deep_gemm": "sgl-deep-gemm",
    "cuda": "cuda-python",
}


def requirement_lines(section="options", field="install_requires"):
    config = configparser.ConfigParser()
    config.read(REPO / "setup.cfg")
    return re.findall(r"^[\w-]+", config[section][field], re.MULTILINE)


def gpu_requirements():
    return requirement_lines("options.extras_require", "gpu")


def dev_requirements():
    return requirement_lines("options.extras_require", "dev")


def cpu_requirements():
    return requirement_lines("options.extras_require", "cpu")


def pins(name):
    """Versions that a lock file pins, by distribution."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (REPO / name).read_text(), re.MULTILINE))


def imported_distributions():
    names = set()
    for folder in ("python", "scripts", "test"):
        for path in (REPO / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(), str(path))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names.add(node.module.split(".")[0])
    third_party = names - OUR_MODULES - set(sys.stdlib_module_names)
    return {DISTRIBUTION.get(name, name) for name in third_party}


class TestDependencies(unittest.TestCase):
    def test_what_is_imported_is_declared(self):
        self.assertEqual(imported_distributions() - set(requirement_lines()), set())

    def test_each_is_justified_in_the_line_above(self):
        lines = (REPO / "setup.cfg").read_text().splitlines()
        for name in requirement_lines() + gpu_requirements() + cpu_requirements() + dev_requirements():
            number, *_ = (i for i, line in enumerate(lines) if re.match(rf"    {re.escape(name)}(?![\w-])", line))
            self.assertRegex(lines[number - 1], r"^    # \w+", name)

    def test_each_is_pinned(self):
        self.assertEqual(set(requirement_lines()) - set(pins("requirements.lock")), set())

    def test_what_only_some_need_is_pinned_on_top(self):
        for lock, requirements in (
            ("requirements-gpu.lock", gpu_requirements()),
            ("requirements-cpu.lock", cpu_requirements()),
            ("requirements-dev.lock", dev_requirements()),
        ):
            on_top = pins(lock)
            self.assertTrue(requirements)
            self.assertEqual(set(requirements) - set(on_top), set())
            self.assertEqual(set(on_top) & set(pins("requirements.lock")), set())

    def test_each_transfer_backend_of_a_file_for_gpus_is_among_them(self):
        files = (REPO / "test" / "registered" / "distributed").glob("*gpu*.py")
        named = (re.findall(r'^ +backend = "(\w+)"', file.read_text(), re.MULTILINE) for file in files)
        backends = {name for names in named for name in names}
        self.assertIn("nixl", backends)
        for backend in backends:
            _, install = BACKENDS[backend]
            self.assertTrue(set(re.findall(r"[\w-]+", install)) & set(gpu_requirements()), backend)


class TestPackage(unittest.TestCase):
    def test_every_directory_of_modules_is_a_package(self):
        for path in (REPO / "python").rglob("*.py"):
            self.assertTrue((path.parent / "__init__.py").exists(), path.parent)

    def test_every_other_file_is_package_data(self):
        for path in (REPO / "python" / "pdkit").rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                self.assertTrue(path.is_relative_to(REPO / "python" / "pdkit" / "assets"), path)


if __name__ == "__main__":
    unittest.main()
