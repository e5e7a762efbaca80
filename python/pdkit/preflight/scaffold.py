"""The next PD test: GSM8K asked of servers that another plan launches, checked before it is written."""

import contextlib
import io
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdkit.core.errors import UsageError
from pdkit.core.registry import PROJECT_SUITES, defined_suites, pair_of
from pdkit.core.suggest import unknown
from pdkit.engine import options as engine_options
from pdkit.preflight.contract.launches import Contract, ask
from pdkit.preflight.contract.release import installed
from pdkit.preflight.dsv4 import is_dsv4
from pdkit.preflight.lint.check import lint
from pdkit.preflight.plan import Runner, of_contract, span

SERVERS = {
    "cuda": ("pdkit.deployment.multi_gpu", "EightGpuServers"),
    "cpu": ("pdkit.deployment.embedded", "EmbeddedServers"),
}
EST_TIME_S = {"cuda": 250, "cpu": 120}
SHARED_FRACTION = 0.4
INHERITED = {"width": 4, "target": "8xH200", "memory_gb": 141}  # of the main job's servers
WIDTH = 120
_GPUS = re.compile(r"(\d+)(?:\+(\d+))?")
_WORD = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*|\d+")
TEMPLATE = '''"""{title} must still solve GSM8K."""

import unittest

from pdkit.checks.accuracy.checks import GSM8KChecks
from {module} import {servers}
from sglang.test.ci.ci_register import register_{hw}_ci

register_{hw}_ci(est_time={est_time}, {suite})


class {name}(GSM8KChecks, {servers}):
{body}


if __name__ == "__main__":
    unittest.main()
'''


class Refused(UsageError):
    """The test would not keep the rules; the message has one line for each reason."""


@dataclass(frozen=True)
class NewTest:
    """What the new test states; `prefill_gpus` and `decode_gpus` are the same where both servers share them.

    Without `model` it serves what the embedded test serves.
    """

    name: str
    model: str | None
    suite: str
    hw: str
    prefill_gpus: range = range(0)
    decode_gpus: range = range(0)
    flags: tuple[str, ...] = ()
    prefill_flags: tuple[str, ...] = ()
    decode_flags: tuple[str, ...] = ()
    min_score: float | None = None
    est_time: int | None = None

    @property
    def words(self) -> list[str]:
        return _WORD.findall(self.name)

    @property
    def file_name(self) -> str:
        return f"test_disaggregation_{'_'.join(self.words).lower()}.py"

    @property
    def class_name(self) -> str:
        return "TestDisaggregation" + "".join(word[0].upper() + word[1:] for word in self.words)

    @property
    def runner(self) -> Runner:
        found = Runner.of_suite(self.suite)
        assert found, f"{self.suite} names no GPUs"
        return found

    @property
    def target(self) -> str:
        kind = self.runner.name.rpartition("-")[2]
        return f"{self.runner.gpus}x{kind.upper()}" if kind[-1].isdigit() else self.runner.name

    def side_flags(self, side: str) -> tuple[str, ...]:
        """Flags of one server that the other does not get, its width included where the widths differ."""
        given = self.prefill_flags if side == "prefill" else self.decode_flags
        own = self.prefill_gpus if side == "prefill" else self.decode_gpus
        both = self.flags if self.hw == "cpu" else ()
        return (() if self.is_symmetric else self._width(own)) + both + given

    @property
    def is_symmetric(self) -> bool:
        return len(self.prefill_gpus) == len(self.decode_gpus)

    @property
    def inherits_flags(self) -> bool:
        """DeepSeek-V4 is served with the flags of the main job, other models with their own."""
        return self.model is not None and is_dsv4(self.model, None)

    def _width(self, gpus: range) -> tuple[str, ...]:
        """Flags that spread a server over its GPUs; the main job's attention is data parallel."""
        count = str(len(gpus))
        return ("--tp-size", count, *(("--dp-size", count) if self.inherits_flags else ()))

    @property
    def common_flags(self) -> tuple[str, ...]:
        """Flags of both servers on GPUs, on top of what they inherit."""
        trust = () if self.inherits_flags else ("--trust-remote-code",)
        inherited_width = self.inherits_flags and len(self.prefill_gpus) == INHERITED["width"]
        width = self._width(self.prefill_gpus) if self.is_symmetric and not inherited_width else ()
        shared = ("--mem-fraction-static", str(SHARED_FRACTION)) if self.prefill_gpus == self.decode_gpus else ()
        return trust + width + shared + self.flags


def parse_gpus(text: str) -> tuple[range, range]:
    """`4+4`: GPUs 0-3 prefill, 4-7 decode; `2`: both servers on GPUs 0-1. Raises UsageError."""
    match = _GPUS.fullmatch(text)
    counts = [int(count) for count in match.groups() if count] if match else [0]
    if not all(counts):
        raise UsageError(f"--gpus {text}: expected PREFILL+DECODE, for example 4+4, or N for N that both share")
    prefill = range(counts[0])
    return prefill, range(counts[0], sum(counts)) if len(counts) == 2 else prefill


def new_test(name: str, model: str | None, suite: str, gpus: str | None = None, **stated: Any) -> NewTest:
    """Raises UsageError where name, suite and GPUs do not make a test."""
    if not re.fullmatch(r"[A-Za-z]\w*", name) or "".join(_WORD.findall(name)) != name.replace("_", ""):
        raise UsageError(f"{name!r} is no name for a class; for example Qwen3NoPrefixCache")
    if name.lower().startswith("test"):
        raise UsageError(f"{name!r}: leave the word test out, it becomes TestDisaggregation{name[4:].lstrip('_')}")
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
    prefill, decode = parse_gpus(gpus) if gpus else (range(0), range(0))
    return NewTest(name, model, suite, hw, prefill, decode, **stated)


def _list(flags: tuple[str, ...], before: str) -> str:
    """Flags as a list, on the line that `before` begins or below it."""
    words = [json.dumps(word) if '"' not in word and "\\" not in word else repr(word) for word in flags]
    line = f"{before}[{', '.join(words)}]"
    indent = " " * (len(before) - len(before.lstrip()))
    return line if len(line) <= WIDTH else f"{before}[\n" + "".join(f"{indent}    {w},\n" for w in words) + f"{indent}]"


def _attributes(test: NewTest) -> list[str]:
    """Statements of the class that say what it does not inherit."""
    lines = [f'    model_name = "{test.model}"'] if test.model else []
    if test.min_score is not None:
        lines.append(f"    min_score = {test.min_score:g}")
    if test.hw != "cuda":
        return lines
    if test.target != INHERITED["target"]:
        lines.insert(0, f'    target = "{test.target}"')
    lines += [f"    prefill_gpus = {test.prefill_gpus}", f"    decode_gpus = {test.decode_gpus}"]
    if test.runner.memory_gb not in (None, INHERITED["memory_gb"]):
        lines.append(f"    gpu_memory_gb = {test.runner.memory_gb}")
    if not test.inherits_flags:
        lines += [_list(test.common_flags, "    server_args = "), "    server_env = {}"]
    elif test.common_flags:
        lines.append(_list(test.common_flags, f"    server_args = {SERVERS[test.hw][1]}.server_args + "))
    return lines


def render(test: NewTest) -> str:
    """Source of the test."""
    module, servers = SERVERS[test.hw]
    where = "on the embedded engine"
    if test.hw == "cuda":
        prefill, decode = (f"GPU{'s' * (len(g) > 1)} {span(g)}" for g in (test.prefill_gpus, test.decode_gpus))
        where = f"with prefill on {prefill} and decode on {decode}"
    methods = [
        f"    @classmethod\n    def {side}_args(cls):\n" + _list(flags, f"        return super().{side}_args() + ")
        for side in ("prefill", "decode")
        if (flags := test.side_flags(side))
    ]
    pair = pair_of(test.suite)
    return TEMPLATE.format(
        title=f"{test.model or 'The nano model'} {where}",
        module=module,
        servers=servers,
        hw=test.hw,
        est_time=test.est_time or EST_TIME_S[test.hw],
        suite=f'stage="{pair[0]}", runner_config="{pair[1]}"' if pair else f'suite="{test.suite}"',
        name=test.class_name,
        body="\n\n".join(filter(None, ["\n".join(_attributes(test)), *methods])) or "    pass",
    )


def check(test: NewTest, directory: Path) -> Contract:
    """What the test would launch if it lay in `directory`. Raises Refused where lint, SGLang or the plan objects."""
    with tempfile.TemporaryDirectory(prefix="new-pd-test-") as folder:
        place = Path(folder).resolve() / "registered" / directory.name
        place.mkdir(parents=True)
        for sibling in directory.glob("*.py"):
            (place / sibling.name).symlink_to(sibling.resolve())
        path = place / test.file_name
        path.write_text(render(test))
        problems = [str(finding).replace(str(path), test.file_name) for finding in lint([path])]
        contract = ask(installed(), path)
        problems += contract.errors or _engine_problems(contract)
        problems += [line for plan in of_contract(contract, test.suite) for line in plan.problems()]
    if problems:
        raise Refused("\n".join(problems))
    return contract


def _engine_problems(contract: Contract) -> list[str]:
    """What the embedded engine says to its command lines; the contract asks SGLang only."""
    said = []
    for test in contract.tests:
        for process in test.processes:
            output = io.StringIO()
            with contextlib.suppress(SystemExit), contextlib.redirect_stderr(output):
                if process.module == "pdkit.engine":
                    engine_options.parse(process.argv)
            said += output.getvalue().splitlines()[-1:]
    return list(dict.fromkeys(f"{contract.tests[0].test}: {line}" for line in said))
