"""The table of a detection matrix, as Markdown and as CSV, and its summary."""

import csv
from collections.abc import Sequence
from pathlib import Path

from pdkit.checks.accuracy.checks import FIRST_LOOK
from pdkit.faults.library import LIBRARY
from pdkit.faults.matrix.results import Results, Run, Shortfall

CAUGHT, MISSED, NOT_RUN = "●", "–", "·"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def markdown(results: Results, problems: Sequence[Shortfall]) -> str:
    """The table, with what the symbols mean and the summary above it."""
    heads = ["fault", *results.checks, "changes", "caught after (s)", "cost (s)"]
    table = [heads, ["---", *[":---:"] * (len(heads) - 3), "---:", "---:"]]
    failed = [sum(check in run.caught_by for run in results.clean) for check in results.checks]
    cost = _seconds(_mean(results.clean))
    table.append([f"no fault, {len(results.clean)} runs: failed", *map(str, failed), "", "", cost])
    for run in results.faulty:
        truth = results.truths.get(run.name)
        changes = "" if truth is None else "yes" if truth.changes else "no"
        found = (run.verdicts.get(check) for check in results.checks)
        cells = (NOT_RUN if each is None else CAUGHT if each.caught else MISSED for each in found)
        table.append([run.name, *cells, changes, _seconds(run.first_caught), _seconds(run.seconds)])
    lines = (
        summary(results, problems),
        "",
        f"{CAUGHT} caught, {MISSED} missed, {NOT_RUN} not run: not about this kind of fault, or the servers did not "
        "outlive an earlier check. "
        "Caught after: seconds to the end of the first test that failed. Cost: seconds of all checks.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in table),
        "",
        "## Faults",
        "",
        *(f"- {_about(results, run)}" for run in results.faulty),
    )
    return "\n".join(lines) + "\n"


def _mean(runs: Sequence[Run]) -> float | None:
    return sum(run.seconds for run in runs) / len(runs) if runs else None


def _about(results: Results, run: Run) -> str:
    fault, truth = LIBRARY[run.name], results.truths.get(run.name)
    parts = [f"**{fault.name}**: {fault.what} ({fault.where.value})"]
    parts += [f"resembles {fault.resembles}"] if fault.resembles else []
    parts += [f"met {run.met} requests"]
    parts += [f"effect: {truth.evidence}"] if truth else []
    parts += [f"headline: {run.headline[:160]}"] if fault.says and run.headline else []
    parts += [f"servers restarted: {run.restarted}"] if run.restarted else []
    return "; ".join(parts)


def summary(results: Results, problems: Sequence[Shortfall]) -> str:
    """What was caught, by the accuracy gate alone and by all checks, and whether the goal is met."""
    faulty, clean = results.faulty, results.clean
    changing = [run for run in faulty if run.fault in results.truths and results.truths[run.fault].changes]
    caught = sum(bool(run.caught_by) for run in changing)
    alone = sum(FIRST_LOOK in run.caught_by for run in changing)
    harmless = len(faulty) - len(changing)
    failed = sum(bool(run.caught_by) for run in clean)
    total = sum(run.seconds for run in results.runs.values())
    lines = [f"{caught} of {len(changing)} faults that change something were caught"]
    if FIRST_LOOK in results.checks:
        lines[0] += f", {alone} of them by the accuracy gate alone"
    lines += [
        f"{harmless} faults change no logit, token or status",
        f"{failed} of {len(clean)} clean runs failed",
        f"{total:.0f} s of runs: {_seconds(_mean(faulty)) or '-'} s a fault, "
        f"{_seconds(_mean(clean)) or '-'} s a clean run",
        f"goal {'missed' if problems else 'met'}",
    ]
    lines += [f"  {problem.what}: {problem.why}" for problem in problems]
    return "\n".join(lines)


def write_csv(results: Results, path: Path) -> None:
    """One line a run and check: fault, clean run's index, check, caught, seconds, message."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["fault", "index", "check", "caught", "seconds", "message"])
        for run in [*results.clean, *results.faulty]:
            for check, told in run.verdicts.items():
                cells = run.name, run.index, check, int(told.caught), f"{told.seconds:.2f}", told.message
                writer.writerow(cells)
