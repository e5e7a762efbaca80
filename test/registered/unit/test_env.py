"""scripts/env.sh: which environment it makes, keeps and uses; pip and uv are stubs that note how they were called."""

import os
import shutil
import subprocess
import unittest
from pathlib import Path

from cases import FolderCase
from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

REPO = Path(__file__).parents[3]
LOCKS = ["requirements.lock", "requirements-dev.lock"]

PYTHON3 = """\
#!/bin/bash
here=$(cd "$(dirname "$0")" && pwd)
case "$*" in
    --version) echo "Python 3.11.0" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/python3" ;;
    *"pip install"*)
        printf '#!/bin/bash\\necho "$@" >> "$ROOT/calls"; [[ ! -e "$ROOT/refuse" ]]\\n' > "$here/uv"
        chmod +x "$here/uv" ;;
esac
"""


class TestEnvironment(FolderCase):
    def setUp(self):
        super().setUp()
        for name in ("scripts/env.sh", *LOCKS, "requirements-cpu.lock", "requirements-gpu.lock"):
            (self.root / name).parent.mkdir(exist_ok=True)
            shutil.copy(REPO / name, self.root / name)
        self.write("bin/python3", PYTHON3).chmod(0o755)

    def env(self, *words, **variables):
        """Path of the environment that it prints, and the lock files that uv was told to install for it."""
        kept = {"HOME": str(self.root), "ROOT": str(self.root), "PDKIT_CACHE_DIR": str(self.root / "cache")}
        kept["PATH"] = f"{self.root}/bin:{os.environ['PATH']}"
        calls = self.write("calls")
        command = [self.root / "scripts" / "env.sh", *words]
        self.done = subprocess.run(command, env=kept | variables, capture_output=True, text=True)
        locks = [w.rpartition("/")[2] for w in calls.read_text().split() if w.startswith("--requirement=")]
        return self.done.stdout.strip(), locks

    def test_what_only_gpus_need_has_an_environment_of_its_own(self):
        cpu, locks = self.env(PDKIT_GPU="0")
        self.assertEqual((self.done.returncode, locks), (0, [*LOCKS, "requirements-cpu.lock"]), self.done.stderr)
        gpu, locks = self.env(PDKIT_GPU="1")
        self.assertEqual(locks, [*LOCKS, "requirements-gpu.lock"])
        self.assertNotEqual(cpu, gpu)
        (self.root / "requirements-gpu.lock").write_text("mooncake-transfer-engine-cuda13==9\n")
        self.assertEqual(self.env(PDKIT_GPU="0"), (cpu, []))
        self.assertNotIn(self.env(PDKIT_GPU="1")[0], (cpu, gpu))

    @unittest.skipIf(os.path.exists("/dev/nvidiactl"), "this machine has a driver")
    def test_a_machine_without_driver_gets_none_of_it(self):
        self.assertEqual(self.env()[1], [*LOCKS, "requirements-cpu.lock"])

    def test_made_once_and_again_after_a_failure(self):
        (self.root / "refuse").touch()
        self.env()
        self.assertEqual(self.done.returncode, 3)
        self.assertIn("uv could not install", self.done.stderr)
        (self.root / "refuse").unlink()
        path, locks = self.env()
        self.assertTrue(locks)
        (self.root / "requirements.lock").write_text("# a comment\n" + (REPO / "requirements.lock").read_text())
        self.assertEqual(self.env(), (path, []))

    def test_commands_find_its_python(self):
        path, _ = self.env()
        found, _ = self.env("bash", "-c", "command -v python3; exit 7")
        self.assertEqual((found, self.done.returncode), (f"{path}/bin/python3", 7))

    def test_what_cannot_be_used(self):
        for variables, says in (
            ({"PDKIT_GPU": "yes"}, "environment: PDKIT_GPU=yes: expected 1 or 0"),
            ({"PDKIT_PYTHON": "/no/python"}, "environment: PDKIT_PYTHON=/no/python: no such program"),
            ({"PDKIT_CACHE_DIR": "/proc/none"}, "environment: cannot write to /proc/none; set PDKIT_CACHE_DIR"),
        ):
            self.assertEqual(self.env(**variables), ("", []))
            self.assertEqual(self.done.returncode, 3)
            self.assertEqual(self.done.stderr.splitlines()[-1], says)


if __name__ == "__main__":
    unittest.main()
