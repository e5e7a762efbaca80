"""The package in an environment of its own: without SGLang, torch and transformers, small, and its commands work."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
import zipfile
from importlib import metadata
from pathlib import Path

from pdkit.core import paths
from pdkit.core.ci_register import register_cpu_ci
from stub_server import StubServer

register_cpu_ci(est_time=13, suite="stage-a-test-cpu")

MEGABYTES = 300
REPORT = Path(__file__).with_name("report.tar.xz")


class TestLightInstall(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.uv = Path(sys.executable).with_name("uv")
        if not cls.uv.exists():
            raise unittest.SkipTest(f"no uv beside {sys.executable}: this is not the environment of scripts/env.sh")
        cls.root = Path(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="light-install-")))
        cls.python = cls.root / "venv" / "bin" / "python"
        source = cls.root / "source"
        shutil.copytree(paths.REPOSITORY / "python", source / "python", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(paths.REPOSITORY / name, source)
        began = time.monotonic()
        cls.use_uv("build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", cls.root, source)
        built = time.monotonic()
        cls.use_uv("venv", "--python", sys.executable, cls.root / "venv")
        (wheel,) = cls.root.glob("*.whl")
        install = ("pip", "install", "--python", cls.python, "-c", paths.REPOSITORY / "requirements.lock", wheel)
        try:
            cls.use_uv(*install, "--offline")  # the pinned environment left the same packages in uv's cache
        except AssertionError:
            cls.use_uv(*install)
        print(f"wheel built in {built - began:.1f} s, installed in {time.monotonic() - built:.1f} s", flush=True)

    @classmethod
    def use_uv(cls, *words):
        done = subprocess.run([cls.uv, *words], capture_output=True, text=True)
        assert done.returncode == 0, f"uv {' '.join(map(str, words))}: {done.stderr}"

    def pdkit(self, *words, code=0):
        """What the installed command prints, on both streams; its exit code must be `code`."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and "SGLANG" not in name}
        command = [self.python.with_name("pdkit"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=paths.REPOSITORY, env=kept)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def test_it_is_small(self):
        site = next((self.root / "venv" / "lib").glob("python3*/site-packages"))
        installed = {path.name for path in site.iterdir()}
        self.assertEqual(installed & {"sglang", "torch", "transformers", "openai", "matplotlib"}, set())
        megabytes = sum(path.stat().st_size for path in (self.root / "venv").rglob("*") if path.is_file()) / 1e6
        print(f"{len(list(site.glob('*.dist-info')))} distributions, {megabytes:.0f} MB", flush=True)
        self.assertLess(megabytes, MEGABYTES)

    def test_check(self):
        other = StubServer(self, reply=lambda path, body: (404, b""))  # HTTP, but nothing of SGLang's
        said = self.pdkit("check", other.url, code=3)
        self.assertIn("is not an SGLang server: it has no /v1/models", said)

    def test_list(self):
        self.assertIn("registered/unit/test_light_install.py", self.pdkit("list"))

    def test_lint(self):
        self.pdkit("lint", Path(__file__))

    def test_plan(self):
        needs = "sglang is not installed here: pip install sglang, or --sglang-wheel FILE"
        self.assertIn(needs, self.pdkit("plan", code=3))
        release = metadata.distribution("sglang")
        wheel = self.root / f"sglang-{release.version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            for path in release.files:
                if path.suffix == ".py" or path.parts[0].endswith(".dist-info"):
                    file.write(path.locate(), path)
        self.assertIn("prefill: tp 4 = 4 GPUs from GPU 0", self.pdkit("plan", "--sglang-wheel", wheel))

    def test_what_needs_more_says_so_in_a_line(self):
        for words, missing in ((("run",), "sglang, torch, transformers"), (("matrix", "--list"), "torch")):
            with self.subTest(words):
                line = f"pdkit {words[0]}: error: {missing}: not installed here; pip install 'sglang-pd-suite[suite]'\n"
                self.assertEqual(self.pdkit(*words, code=3), line)
        self.assertNotIn("runs here", self.pdkit("list", "--targets"))

    def test_report(self):
        directory = self.root / "report"
        shutil.unpack_archive(REPORT, directory)
        (results,) = directory.rglob("results.json")
        page = results.with_name("report.html")
        page.unlink(missing_ok=True)
        self.pdkit("report", results.parent)
        self.assertIn("<html", page.read_text())


if __name__ == "__main__":
    unittest.main()
