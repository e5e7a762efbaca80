"""On what the main job can run, and which of these targets this machine can run."""

import os
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from pdkit.core.console import columns
from pdkit.core.errors import NotReady, UsageError, not_installed
from pdkit.core.gpus import Gpu, found
from pdkit.core.suggest import unknown

QUESTIONS_VARIABLE = "SGLANG_PD_GSM8K"
PACKAGES = "sglang", "torch", "transformers"
DISTRIBUTED = Path("registered", "distributed")


TOPICS = {
    "protocol": "what clients meet",
    "recovery": "servers that die or freeze",
    "integrity": "corrupted transfers",
    "scale_out": "several servers of a kind",
    "stress": "load over minutes",
}


def _beside(*files: str) -> dict[str, str]:
    """{topic: name of its test file}"""
    topics = {file: next(topic for word, topic in TOPICS.items() if word in file) for file in files}
    names = {file: file if file.startswith("sglang") else f"dsv4_{file}" for file in files}
    return {topic: f"test_disaggregation_{names[file]}" for file, topic in topics.items()}


@dataclass(frozen=True)
class Target:
    """One way to run the main job.

    `name` is what the test itself prints as its target; `test_file` is relative to the directory `test`. `gpus` GPUs are
    needed, each of exactly `capability` and with at least `memory_mib` of memory; `needs` says the same in words.

    exercises   names of PARTS that its main job runs through
    beside      test files that ask more of the same servers: what -> name below DISTRIBUTED
    requires    "module:function" that raises NotReady with a line for each thing that the machine lacks, or None
    prepares    "module:function" that is called before it runs, with a working tree of SGLang to test, or None
    takes_questions  whether it scores the file that SGLANG_PD_GSM8K names
    """

    name: str
    engine: str
    test_file: Path
    needs: str = "no GPU"
    gpus: int = 0
    memory_mib: int = 0
    capability: tuple[int, int] = (0, 0)
    exercises: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)
    requires: str | None = None
    prepares: str | None = None
    takes_questions: bool = False

    def runs_on(self, gpus: Sequence[Gpu]) -> bool:
        suit = [gpu for gpu in gpus if gpu.memory_mib >= self.memory_mib and gpu.capability == self.capability]
        return len(suit) >= self.gpus

    def lacks(self) -> tuple[str, ...]:
        """What this machine lacks for it beside GPUs, a line for each thing."""
        try:
            _require_packages()
            if self.requires:
                pkgutil.resolve_name(self.requires)()
        except NotReady as reason:
            return tuple(str(reason).splitlines())
        return ()

    def prepare(self, sglang_source: str | None) -> None:
        """Raises NotReady where the machine lacks what only this target needs, UsageError for what it does not take."""
        if os.environ.get(QUESTIONS_VARIABLE) and not self.takes_questions:
            raise UsageError(f"{QUESTIONS_VARIABLE} is not for target {self.name}, whose model has its own; unset it")
        if self.prepares:
            pkgutil.resolve_name(self.prepares)(sglang_source)
        elif sglang_source:
            others = ", ".join(each.name for each in TARGETS if each.prepares)
            raise UsageError(f"--sglang-source is not for target {self.name}; a working tree is tested on {others}")


SCHEDULER, TRANSFER = "SGLang's scheduler and memory pools", "KV transfer by Mooncake or NIXL"
KERNELS, DRAFTS = "SGLang's GPU kernels and CUDA graphs", "speculative decoding (EAGLE)"
PARALLEL, WEIGHTS = "DP attention and DeepEP across GPUs", "the weights of DeepSeek-V4-Flash"
PARTS = (SCHEDULER, TRANSFER, KERNELS, DRAFTS, PARALLEL, WEIGHTS)

# Highest first: the first that the machine can run is run.
TARGETS = (
    Target(
        name="8xH200",
        engine="SGLang with DeepSeek-V4-Flash-FP8: prefill on GPUs 0-3, decode on GPUs 4-7",
        test_file=DISTRIBUTED / "test_disaggregation_dsv4.py",
        needs="8 Hopper GPUs of 141 GB",
        gpus=8,
        memory_mib=141_000,
        capability=(9, 0),
        takes_questions=True,
        exercises=PARTS,
        beside=_beside("protocol_8gpu", "recovery_8gpu", "integrity_8gpu"),
    ),
    Target(
        name="1xHopper",
        engine="SGLang with a kernel-sized nano DeepSeek-V4: prefill and decode share one GPU",
        test_file=DISTRIBUTED / "test_disaggregation_dsv4_1gpu.py",
        needs="1 Hopper GPU of 80 GB",
        gpus=1,
        memory_mib=80_000,
        capability=(9, 0),
        exercises=(SCHEDULER, TRANSFER, KERNELS, DRAFTS),
        beside=_beside("protocol_1gpu", "recovery_1gpu", "stress_1gpu"),
    ),
    Target(
        name="sglang-cpu",
        engine="SGLang on CPU, torch in place of its GPU kernels: a small trained DeepSeek-V4",
        test_file=DISTRIBUTED / "test_disaggregation_sglang_cpu.py",
        needs="no GPU, 5 GiB of memory, Mooncake and NIXL",
        exercises=(SCHEDULER, TRANSFER),
        beside=_beside("sglang_cpu_protocol", "sglang_cpu_recovery"),
        requires="pdkit.deployment.cpu.requirements:require_machine",
        prepares="pdkit.runner.sglang_cpu:prepare",
    ),
    Target(
        name="embedded",
        engine="pdkit.engine with a nano DeepSeek-V4 on CPU: prefill and decode in a process each",
        test_file=DISTRIBUTED / "test_disaggregation_dsv4_embedded.py",
        beside=_beside("protocol", "recovery", "integrity", "scale_out"),
    ),
)
assert not TARGETS[-1].gpus, "the last target runs wherever its packages are installed"


def left_out(name: str | None) -> tuple[str, ...]:
    """What a pass of the main job on the target `name` says nothing about, and the command that asks; () of no target."""
    target = next((each for each in TARGETS if each.name == name), None)
    if target is None:
        return ()
    found, known = [], {*target.exercises}
    for other in reversed(TARGETS):  # the nearest target that has it
        if news := [part for part in other.exercises if part not in known]:
            known.update(news)
            found.append(f"{', '.join(news)}: pdkit run --on {other.name} ({other.needs})")
    found.append(f"{', '.join(target.beside)}: pdkit test {' '.join(target.beside.values())}")
    return (*found, "several hosts: no target has more than one")


def _require_packages() -> None:
    """Raises NotReady where the extra that launches servers is not installed: nothing is imported for it."""
    if absent := [name for name in PACKAGES if not find_spec(name)]:
        raise NotReady(not_installed(", ".join(absent)))


def choose(gpus: Sequence[Gpu], wanted: str | None = None) -> Target:
    """The target `wanted`, or else the first that this machine with `gpus` can run.

    Raises UsageError where `wanted` is not a target, NotReady where it needs more than there is, or packages are missing.
    """
    _require_packages()
    if wanted is None:
        return next(target for target in TARGETS if target.runs_on(gpus) and not target.lacks())
    by_name = {target.name: target for target in TARGETS}
    if wanted not in by_name:
        raise UsageError(unknown("target", wanted, by_name))
    target = by_name[wanted]
    if not target.runs_on(gpus):
        has = f"this machine has {found(gpus)} and can run --on {choose(gpus).name}"
        raise NotReady(f"target {target.name} needs {target.needs}; {has}")
    return target


def why(target: Target, gpus: Sequence[Gpu]) -> str:
    """A line for each thing that keeps this machine with `gpus` from the targets that are tried before `target`."""
    lines: list[str] = []
    for each in TARGETS[: TARGETS.index(target)]:
        if each.runs_on(gpus):
            lines += each.lacks()
        else:
            lines.append(f"{each.name} needs {each.needs}; found {found(gpus)}")
    return "\n".join(lines)


def overview(gpus: Sequence[Gpu]) -> str:
    """One line per target, highest first: what it needs, and whether this machine can run it."""
    here = [target.runs_on(gpus) and not target.lacks() for target in TARGETS]
    rows = [(each.name, each.needs, "runs here" if runs else "not here") for each, runs in zip(TARGETS, here)]
    return f"{columns(rows)}\nthis machine has {found(gpus)}"
