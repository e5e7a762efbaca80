"""Makes the mistakes that cost GPU time, one at a time, and shows what the checks say, how soon, and their exit code.

Result (docs/preflight.md): all six are reported, by their own check and by the runner, in 1.3 to 2.6 s of CPU each.

    scripts/env.sh python3 studies/bench_preflight.py

Each mistake is told by the check that looks for it, whose line is shown, and by `test/run_suite.py` before the first
file. What they say of this machine without the mistake is left out. Exit codes: 0 each mistake is told; 1 one is not.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy
from pdkit.core.errors import ExitCode
from pdkit.core.paths import ASSETS
from safetensors.numpy import save_file

REPO = Path(__file__).resolve().parents[1]
DSV4 = REPO / "test" / "registered" / "distributed" / "test_disaggregation_dsv4.py"
CHECK = ("-m", "pdkit", "preflight")
_ERROR, _NUMBER = re.compile(r"error |[\w. ]+: error: "), re.compile(r"[\d.]+")
SUITE = ("--hw", "cuda", "--suite", "stage-c-test-dsv4-8-gpu-h200")


@dataclass(frozen=True)
class Mistake:
    """Text of the test that is replaced, or a variable that is set; `check` is the command that looks for it."""

    name: str
    check: tuple[str, ...]
    replace: tuple[tuple[str, str], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def mistakes(folder: Path) -> list[Mistake]:
    contract, plan = (("-m", "pdkit", name) for name in ("contract", "plan"))
    here = CHECK
    ten = (("--tp 4 --dp 4", "--tp 5 --dp 5"), ("range(0, 4)", "range(0, 5)"), ("range(4, 8)", "range(5, 10)"))
    return [
        Mistake("wrong flag", contract, (("--mem-fraction-static ", "--mem-fraction-statik "),)),
        Mistake("typo in a variable", contract, (("SGLANG_DSV4_FP4_EXPERTS", "SGLANG_DSV4_FP4_EXPERT"),)),
        Mistake("10 GPUs", plan, ten),
        Mistake("port clash", plan, (("            nccl_port,\n", "            cls.lb_port,\n"),)),
        Mistake("missing shard", here, env={"SGLANG_PD_MODEL": model(folder / "torn", missing="shard2.safetensors")}),
        Mistake("missing data set", here, env={"SGLANG_PD_GSM8K": str(folder / "gsm8k.jsonl")}),
    ]


def model(folder: Path, missing: str | None = None) -> str:
    """A directory that has all that a model needs, but for one file."""
    folder.mkdir()
    shards = {f"shard{i}.safetensors": f"w{i}" for i in (1, 2)}
    for shard, tensor in shards.items():
        save_file({tensor: numpy.zeros(1, "float32")}, folder / shard)
    index = {"weight_map": {tensor: shard for shard, tensor in shards.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "deepseek_v4"}')
    (folder / "tokenizer.json").write_text("{}")
    if missing:
        (folder / missing).unlink()
    return str(folder)


@dataclass(frozen=True)
class Answer:
    """What a command said: its errors without its name, exit code, seconds by the clock and of CPU."""

    lines: tuple[str, ...]
    code: int
    seconds: float
    cpu_seconds: float

    def __str__(self):
        return f"exits {self.code} ({self.cpu_seconds:.1f} s of CPU)"


def run(command: tuple[str, ...], env: Mapping[str, str]) -> Answer:
    started, before = time.monotonic(), os.times()
    done = subprocess.run([sys.executable, *command], env={**os.environ, **env}, capture_output=True, text=True)
    seconds, after = time.monotonic() - started, os.times()
    cpu_seconds = sum(after[2:4]) - sum(before[2:4])
    lines = (done.stdout + done.stderr).splitlines()
    errors = [line.partition(": error: ")[2] or line[5:].strip() for line in lines if _ERROR.match(line)]
    return Answer(tuple(errors), done.returncode, seconds, cpu_seconds)


def tree(folder: Path, replace: tuple[tuple[str, str], ...]) -> Path:
    """A tree of registered tests with the main job's alone, its text changed."""
    text = DSV4.read_text()
    for old, new in replace:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "registered" / "distributed" / DSV4.name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def new_lines(answer: Answer, usual: Answer) -> list[str]:
    """What `usual` does not say too; numbers, as of free memory, may differ."""
    known = {_NUMBER.sub("", line) for line in usual.lines}
    return [line for line in answer.lines if _NUMBER.sub("", line) not in known]


def main() -> ExitCode:
    untold, slowest = 0, 0.0
    with tempfile.TemporaryDirectory(prefix="bench-preflight-") as name:
        folder = Path(name)
        sane = {"SGLANG_PD_MODEL": model(folder / "whole"), "SGLANG_PD_GSM8K": str(ASSETS / "gsm8k_nano.jsonl")}
        suite = (str(REPO / "test" / "run_suite.py"), *SUITE, "--test-root")
        path = tree(folder / "sane", ())
        usual = {"suite": run((*suite, str(path.parents[1])), sane), "check": run(CHECK, sane)}
        for mistake in mistakes(folder):
            path = tree(folder / mistake.name, mistake.replace)
            env = sane | dict(mistake.env)
            check = run((*mistake.check, *([] if mistake.env else [str(path)])), env)
            in_suite = run((*suite, str(path.parents[1])), env)
            told = new_lines(check, usual["check"])
            untold += not (told and check.code and new_lines(in_suite, usual["suite"]) and in_suite.code)
            slowest = max(slowest, check.seconds, in_suite.seconds)
            print(f"{mistake.name}: {Path(mistake.check[-1]).name} {check}, run_suite.py {in_suite}")
            print(*(f"    {line}".replace(name, "/tmp") for line in told), sep="\n", flush=True)
    print(f"the slowest took {slowest:.1f} s by the clock")
    return ExitCode.FAILED if untold else ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(main())
