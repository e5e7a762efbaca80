"""Runs a suite's two halves side by side: `halves.py OPTIONS`, which go to test/run_suite.py.

What the second printed follows the first. A signal is told to both. The exit code is the first half's, unless it passed:
then the second's.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNNER = Path(__file__).resolve().parents[1] / "test" / "run_suite.py"


def main() -> int:
    halves: list[subprocess.Popen] = []
    told = False

    def tell(*_):
        nonlocal told
        told = True
        for half in halves:
            half.terminate()

    signal.signal(signal.SIGINT, tell)
    signal.signal(signal.SIGTERM, tell)
    with tempfile.TemporaryFile() as printed:
        for half, streams in enumerate(({}, {"stdout": printed, "stderr": subprocess.STDOUT})):
            part = ["--auto-partition-id", str(half), "--auto-partition-size", "2"]
            halves.append(subprocess.Popen([sys.executable, RUNNER, *sys.argv[1:], *part], **streams))
        if told:
            tell()
        while any(half.poll() is None for half in halves):
            time.sleep(0.1)  # never one long wait: a signal that arrives just before it would be seen only after it
        codes = [half.returncode for half in halves]
        printed.seek(0)
        shutil.copyfileobj(printed, sys.stdout.buffer)
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
