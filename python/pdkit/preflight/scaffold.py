"""The next PD test: GSM8K asked of servers that another plan launches, checked before it is written."""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdkit.core.errors import UsageError
from pdkit.core.registry import PROJECT_SUITES, defined_suites, pair_of
from pdkit.core.suggest import unknown
from pdkit.engine import options as engine_options
from pdkit.preflight.contract.launches import Contract, ask
from pdkit.preflight.contract.release import installed
from pdkit.preflight.dsv4 import is_dsv4
from pdkit.preflight.lint.check import lint
from pdkit.preflight.plan import Runner, of_contract, span

MAIN_JOB = {"target": "8xH200", "memory_gb": 141, "gpus": 4}  # of EightGpuServers; GPUs of each of the two
WIDTH = 120
_WORD = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*|\d+")
TEMPLATE = '''"""{title} must still solve GSM8K."""

import unittest

from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.deployment.{module} import {servers}
from sglang.test.ci.ci_register import register_{hw}_ci

register_{hw}_ci(est_time={est_time}, {suite})


class {name}(GSM8KChecks, {servers}):
{body}


if __name__ == "__main__":
    unittest.main()
'''


@dataclass(frozen=True)
class NewTest:
    file_name: str
    suite: str
    source: str


def new_test(
    name: str, model: str | None, suite: str, gpus: str | None = None, flags: Sequence[str] = (),
    prefill_flags: Sequence[str] = (), decode_flags: Sequence[str] = (),
    min_score: float | None = None, est_time: int | None = None,
) -> NewTest:  # fmt: skip
    """Without `model`, on CPU, it serves what the embedded test serves. gpus: `4+4`, or `2` that both servers share.

    Raises UsageError where name, suite and GPUs do not make a test.
    """
    words = _WORD.findall(name)
    if not re.fullmatch(r"[A-Za-z]\w*", name) or "".join(words) != name.replace("_", ""):
        raise UsageError(f"{name!r} is not a name for a class; for example Qwen3NoPrefixCache")
    if name.lower().startswith("test"):
        raise UsageError(f"{name!r}: leave the word test out, it becomes TestDisaggregation{name[4:].lstrip('_')}")
    hw = _hardware(suite, model, gpus)
    lines = [f'    model_name = "{model}"'] if model else []
    lines += [] if min_score is None else [f"    min_score = {min_score:g}"]
    own = {"extra_prefill_args": list(prefill_flags), "extra_decode_args": list(decode_flags)}
    if hw == "cpu":
        title, module, servers = f"{model or 'The nano model'} on the embedded engine", "embedded", "EmbeddedServers"
        lines += _assigned("server_args", list(flags))
    else:
        module, servers = "multi_gpu", "EightGpuServers"
        prefill, decode = _gpus(gpus or "")
        placed = " and ".join(f"{side} on GPU{'s' * (len(of) > 1)} {span(of)}"
                              for side, of in (("prefill", prefill), ("decode", decode)))  # fmt: skip
        title = f"{model} with {placed}"
        inherits = model is not None and is_dsv4(model, None)  # the flags of the main job; other models get their own
        width = ["--tp-size", "{0}", *(["--dp-size", "{0}"] if inherits else [])]  # its attention is data parallel
        common = [] if inherits else ["--trust-remote-code"]
        if len(prefill) != len(decode):
            for args, of in zip(own.values(), (prefill, decode)):
                args[:0] = [word.format(len(of)) for word in width]
        elif not inherits or len(prefill) != MAIN_JOB["gpus"]:
            common += [word.format(len(prefill)) for word in width]
        common += ["--mem-fraction-static", "0.4"] if prefill == decode else []
        lines = [*_runner_lines(suite), *lines, f"    prefill_gpus = {prefill}", f"    decode_gpus = {decode}"]
        lines += _assigned("server_args", [*common, *flags], f"{servers}.server_args + " if inherits else "")
        lines += [] if inherits else ["    server_env = {}"]
    lines += [line for attribute, words_ in own.items() for line in _assigned(attribute, words_)]
    pair = pair_of(suite)
    source = TEMPLATE.format(
        title=title, module=module, servers=servers, hw=hw, est_time=est_time or {"cuda": 250, "cpu": 120}[hw],
        suite=f'stage="{pair[0]}", runner_config="{pair[1]}"' if pair else f'suite="{suite}"',
        name="TestDisaggregation" + "".join(word[0].upper() + word[1:] for word in words),
        body="\n".join(lines) or "    pass",
    )  # fmt: skip
    return NewTest(f"test_disaggregation_{'_'.join(words).lower()}.py", suite, source)


def _hardware(suite: str, model: str | None, gpus: str | None) -> str:
    suites = {hw: defined_suites(hw) for hw in PROJECT_SUITES}
    hw = next((hw for hw in suites if suite in suites[hw]), None)
    if hw is None:
        raise UsageError(unknown("suite", suite, set().union(*suites.values())))
    if model is not None and not re.fullmatch(r"[^\s\"'\\]+", model):
        raise UsageError(f"--model {model!r}: expected a repository or a directory without blanks and quotes")
    if hw == "cuda" and model is None:
        raise UsageError(f"suite {suite} runs on GPUs: say what to serve with --model")
    if hw == "cpu" and model is not None and not Path(model).is_dir():
        raise UsageError(f"--model {model}: no such directory; the embedded engine serves directories only")
    if (hw == "cpu") != (gpus is None):
        need = "runs on CPU: leave --gpus out" if gpus else "runs on GPUs: say which with --gpus, for example 4+4"
        raise UsageError(f"suite {suite} {need}")
    return hw


def _gpus(text: str) -> tuple[range, range]:
    match = re.fullmatch(r"([1-9]\d*)(?:\+([1-9]\d*))?", text)
    if not match:
        raise UsageError(f"--gpus {text}: expected PREFILL+DECODE, for example 4+4, or N for N that both share")
    prefill = range(int(match[1]))
    return prefill, range(len(prefill), len(prefill) + int(match[2])) if match[2] else prefill


def _runner_lines(suite: str) -> list[str]:
    runner = Runner.of_suite(suite)
    assert runner, f"{suite} names no GPUs"
    kind = runner.name.rpartition("-")[2]
    target = f"{runner.gpus}x{kind.upper()}" if kind[-1].isdigit() else runner.name
    lines = [f'    target = "{target}"'] if target != MAIN_JOB["target"] else []
    return lines + ([f"    gpu_memory_gb = {runner.memory_gb}"] if runner.memory_gb not in (None, MAIN_JOB["memory_gb"]) else [])  # fmt: skip


def _assigned(name: str, flags: list[str], before: str = "") -> list[str]:
    """`name = before[flags]`, on one line if it fits; nothing where there are no flags."""
    words = [json.dumps(word) if '"' not in word and "\\" not in word else repr(word) for word in flags]
    line = f"    {name} = {before}[{', '.join(words)}]"
    if len(line) > WIDTH:
        line = "\n".join([f"    {name} = {before}[", *(f"        {word}," for word in words), "    ]"])
    return [line] if flags else []


def check(test: NewTest, directory: Path) -> Contract:
    """What the test would launch if it lay in `directory`. Raises UsageError, one line for each objection."""
    with tempfile.TemporaryDirectory(prefix="new-pd-test-") as folder:
        place = Path(folder).resolve() / "registered" / directory.name
        place.mkdir(parents=True)
        for sibling in directory.glob("*.py"):
            (place / sibling.name).symlink_to(sibling.resolve())
        path = place / test.file_name
        path.write_text(test.source)
        problems = [str(finding).replace(str(path), test.file_name) for finding in lint([path])]
        contract = ask(installed(), path)
    problems += contract.errors or _engine_problems(contract)
    problems += [line for plan in of_contract(contract, test.suite) for line in plan.problems()]
    if problems:
        raise UsageError("\n".join(problems))
    return contract


def _engine_problems(contract: Contract) -> list[str]:
    """What the embedded engine says to its command lines; the contract asks SGLang only."""
    said: dict[str, None] = {}
    for process in (process for test in contract.tests for process in test.processes):
        if process.module == "pdkit.engine":
            try:
                engine_options.parse(process.argv)
            except UsageError as error:
                said[f"{contract.tests[0].test}: {error}"] = None
    return list(said)
