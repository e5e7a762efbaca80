"""New `est_time` literals for registrations, from how long their files took, as a patch."""

import ast
import difflib
import io
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdkit.core import ci_register
from pdkit.core.errors import UsageError
from pdkit.core.quantile import quantile
from pdkit.core.registry import Registration

QUANTILE = 0.9


@dataclass(frozen=True)
class Proposal:
    """Another estimate for a registration: `seconds`, from the 90th percentile `p90` of `runs` runs."""

    registration: Registration
    seconds: int
    p90: float
    runs: int

    def __str__(self) -> str:
        return (
            f"{self.registration.name} ({self.registration.suite}): est_time {self.registration.est_time:g} -> "
            f"{self.seconds}, p90 of {self.runs} runs is {self.p90:.1f} s"
        )


def rounded(seconds: float) -> int:
    """Up to a number that people would write: whole seconds to 10, then steps of 5, from 100 on 10, from 1000 on 50."""
    steps = ((10, 1), (100, 5), (1000, 10))
    step = next((step for limit, step in steps if seconds <= limit), 50)
    return max(1, int(-(-seconds // step)) * step)


def propose(
    registrations: Iterable[Registration],
    seconds: Mapping[tuple[str, str, str], Sequence[float]],
    root_name: str,
    fewest: int = 5,
    tolerance: float = 0.1,
) -> list[Proposal]:
    """A proposal for each registration with `fewest` runs whose p90 differs from its estimate by more than `tolerance`.

    `seconds`: by (file below `root_name`, hardware, suite). What is rounded to the estimate that stands is left alone.
    """
    proposals = []
    for registration in registrations:
        values = seconds.get((os.path.join(root_name, registration.name), registration.hw, registration.suite), ())
        if len(values) < fewest:
            continue
        at_p90 = quantile(values, QUANTILE)
        proposal = Proposal(registration, rounded(at_p90), at_p90, len(values))
        if abs(proposal.seconds - registration.est_time) > tolerance * max(registration.est_time, 1):
            proposals.append(proposal)
    return proposals


def _literal(source: bytes, registration: Registration) -> ast.Constant:
    """The est_time of the call in `source` that made `registration`. Raises UsageError where there is none, or two."""
    found = []
    for statement in ast.parse(source).body:
        visitor = ci_register.load().RegistryVisitor(registration.filename)
        visitor.visit_Module(ast.Module(body=[statement], type_ignores=[]))
        for entry in visitor.registries:
            which = entry.backend.name.lower(), entry.effective_suite, entry.nightly
            if which == (registration.hw, registration.suite, registration.nightly):
                assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call), "it registers"
                named = [keyword.value for keyword in statement.value.keywords if keyword.arg == "est_time"]
                found += named or statement.value.args[:1]
    if len(found) != 1:
        raise UsageError(f"{registration.filename} registers {len(found)} times for {registration.suite}")
    literal = found[0]
    assert isinstance(literal, ast.Constant), "SGLang takes literals only"
    return literal


def rewrite(source: bytes, proposals: Sequence[Proposal]) -> bytes:
    """`source` with the literals of these proposals replaced, each in its place, nothing else changed."""
    lines = source.split(b"\n")
    literals = [(_literal(source, proposal.registration), proposal.seconds) for proposal in proposals]
    for literal, seconds in sorted(literals, key=lambda pair: (pair[0].lineno, pair[0].col_offset), reverse=True):
        line, text = lines[literal.lineno - 1], f"{seconds}{'.0' * isinstance(literal.value, float)}"
        lines[literal.lineno - 1] = line[: literal.col_offset] + text.encode() + line[literal.end_col_offset :]
    return b"\n".join(lines)


def _diff(name: str, old: bytes, new: bytes) -> str:
    before, after = (io.StringIO(content.decode(), newline="\n").readlines() for content in (old, new))
    diff = difflib.unified_diff(before, after, f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in diff)


def patch(proposals: Iterable[Proposal], repository: Path) -> str:
    """A unified diff of all proposals that `git apply` takes at `repository`."""
    by_file: dict[str, list[Proposal]] = {}
    for proposal in proposals:
        by_file.setdefault(proposal.registration.filename, []).append(proposal)
    diffs = []
    for filename, of_file in sorted(by_file.items()):
        old = Path(filename).read_bytes()
        diffs.append(_diff(os.path.relpath(filename, repository), old, rewrite(old, of_file)))
    return "".join(diffs)


def estimates(seconds: Mapping[tuple[str, str, str], Sequence[float]]) -> dict[str, float]:
    """File -> median seconds, for `--partition-model-file`; of a file in several suites, that which takes longest."""
    medians: dict[str, float] = {}
    for (file, _, _), values in sorted(seconds.items()):
        medians[file] = max(medians.get(file, 0.0), round(statistics.median(values), 1))
    return medians
