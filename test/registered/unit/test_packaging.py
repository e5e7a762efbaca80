"""pyproject.toml and the lock files say what the code needs, and the package has all of its files."""

import ast
import re
import sys
import unittest
from pathlib import Path

import tomllib
from pdkit.core.ci_register import register_cpu_ci
from pdkit.preflight.environment.packages import BACKENDS

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

REPO = Path(__file__).parents[3]
OUR_MODULES = {"pdkit"} | {path.stem for folder in ("test", "studies") for path in (REPO / folder).rglob("*.py")}
DISTRIBUTION = {
    "sglang_router": "sglang-router",
    "huggingface_hub": "huggingface-hub",
    "pynvml": "nvidia-ml-py",
    "deep_gemm": "sgl-deep-gemm",
    "cuda": "cuda-python",
    "yaml": "pyyaml",
}


# What requirements.lock is made of: pip install 'sglang-pd-suite[suite,pictures,browser,studies]'.
LOCKED = ("suite", "pictures", "browser", "studies")


def requirement_names(*extras):
    """Names of what `extras` require; of what the package itself requires where there are none."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines = [line for extra in extras for line in optional[extra]] if extras else project["dependencies"]
    return [re.match(r"[\w-]+", line)[0] for line in lines]


def pins(name):
    """Versions that a lock file pins, by distribution."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (REPO / name).read_text(), re.MULTILINE))


def imported_distributions():
    names = set()
    for folder in ("python", "studies", "test"):
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
        declared = {*requirement_names(), *requirement_names(*LOCKED)}
        self.assertEqual(imported_distributions() - declared, set())

    def test_the_package_itself_requires_little(self):
        heavy = {"sglang", "torch", "transformers", "openai", "matplotlib"}
        self.assertLessEqual(len(requirement_names()), 14)
        self.assertEqual(heavy & set(requirement_names()), set())

    def test_each_is_justified_in_the_line_above(self):
        lines = (REPO / "pyproject.toml").read_text().splitlines()
        for name in requirement_names() + requirement_names(*LOCKED, "gpu", "cpu", "dev", "docs"):
            number, *_ = (i for i, line in enumerate(lines) if re.match(rf'    "{re.escape(name)}(?![\w-])', line))
            self.assertRegex(lines[number - 1], r"^    # \w+", name)

    def test_each_is_pinned(self):
        self.assertEqual({*requirement_names(), *requirement_names(*LOCKED)} - set(pins("requirements.lock")), set())

    def test_what_only_some_need_is_pinned_on_top(self):
        for lock, extras in (
            ("requirements-gpu.lock", ("gpu",)),
            ("requirements-cpu.lock", ("cpu",)),
            ("requirements-dev.lock", ("dev", "docs")),
        ):
            on_top = pins(lock)
            self.assertEqual(set(requirement_names(*extras)) - set(on_top), set())
            self.assertEqual(set(on_top) & set(pins("requirements.lock")), set())

    def test_the_lock_names_the_command_that_makes_it(self):
        with open(REPO / "requirements.lock") as file:
            command = file.read().splitlines()[1]
        self.assertEqual(re.findall(r"--extra (\w+)", command), list(LOCKED))

    def test_each_transfer_backend_of_a_file_for_gpus_is_among_them(self):
        files = (REPO / "test" / "registered" / "distributed").glob("*gpu*.py")
        named = (re.findall(r'^ +backend = "(\w+)"', file.read_text(), re.MULTILINE) for file in files)
        backends = {name for names in named for name in names}
        self.assertIn("nixl", backends)
        for backend in backends:
            _, install = BACKENDS[backend]
            self.assertTrue(set(re.findall(r"[\w-]+", install)) & set(requirement_names("gpu")), backend)


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
