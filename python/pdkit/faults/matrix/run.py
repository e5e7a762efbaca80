"""Runs a detection matrix into a directory: results.jsonl, matrix.md, matrix.csv and the logs of all servers."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pdkit.core.errors import ExitCode
from pdkit.core.paths import ASSETS
from pdkit.faults.kinds import families
from pdkit.faults.library import LIBRARY
from pdkit.faults.matrix import report
from pdkit.faults.matrix.results import Results, Run, Shortfall, planned
from pdkit.faults.matrix.session import Session, Subject
from pdkit.faults.matrix.truth import TriedModel, truths_of
from pdkit.faults.matrix.verdicts import checks_of
from pdkit.faults.switch import find

SUBJECTS = Path(__file__).with_name("subjects.py")

KINDS = "kinds"
# A few faults, each with the test that it is put before; without a fault all of these tests run.
QUICK_FAULTS = {
    "128x-compressed-zeroed": "test_parity_alone",
    "indexer-compressed-zeroed": "test_parity_alone",
    "rooms-swapped": "test_parity_rooms",
    "compressed-aliased": "test_parity_shared_prefix",
    "seed-lost": "test_parity_request_parameters",
    "transfer-fails-one-in-ten": "test_parity_alone",
}


def chosen_faults(names: str | None, quick: bool) -> list[str]:
    """Those named, separated by commas, or else a few or all of the library; KINDS stands for all families.

    Raises UnknownFault.
    """
    if names == KINDS:
        return [fault.name for fault in families()]
    if names:
        return [find(name.strip()).name for name in names.split(",")]
    return list(QUICK_FAULTS if quick else LIBRARY)


def subjects_of(quick: bool, faults: Sequence[str] = ()) -> list[Subject]:
    """Those that `faults` are put before; without faults, all."""
    if quick:
        tests = tuple(dict.fromkeys(QUICK_FAULTS.values()))
        return [Subject("random", SUBJECTS, "RandomWeights", tests, test_of=QUICK_FAULTS)]
    kinds = Subject("kinds", SUBJECTS, "Kinds", by_request=True)
    of_state = [Subject("trained", SUBJECTS, "Trained"), Subject("random", SUBJECTS, "RandomWeights")]
    asking = [bool(LIBRARY[fault].asks) for fault in faults]
    return (of_state if not all(asking) or not asking else []) + ([kinds] if any(asking) or not asking else [])


def models_of(quick: bool) -> list[TriedModel]:
    random = TriedModel("random", ASSETS / "random-dsv4", "dummy", 1)
    return [random] if quick else [TriedModel("trained", ASSETS / "nano-dsv4", "auto", 0), random]


def run_matrix(out: Path, faults: list[str], clean_runs: int, quick: bool = False, resume: bool = False) -> ExitCode:
    """Runs what is not in `out` yet, and writes the table; FAILED where a fault went unseen or a clean run failed.

    Raises ResultsError where `out` holds results and `resume` is not set, WorkerFailed where servers do not start.
    """

    wanted = planned(faults, clean_runs)
    out.mkdir(parents=True, exist_ok=True)
    results = Results.open(out / "results.jsonl", resume)
    todo = [key for key in wanted if key not in results.runs]
    console = Console()
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("ground truth", total=len(wanted), completed=len(wanted) - len(todo))

        def show(text: str) -> None:
            progress.update(task, description=f"{text:60.60s}")

        results.add_truths(truths_of([name for name in faults if name not in results.truths], models_of(quick), show))
        if todo:
            with Session(subjects_of(quick, faults), out / "logs", show) as session:
                results.set_checks(checks_of([test for tests in session.tests.values() for test in tests]))
                for fault, index in todo:
                    run = session.run(fault, index)
                    results.add(run)
                    progress.advance(task)
                    console.print(line_of(run), highlight=False)
    problems = results.problems(wanted)
    write(results, problems, out)
    return ExitCode.FAILED if problems else ExitCode.PASSED


def write(results: Results, problems: Sequence[Shortfall], out: Path) -> None:
    """The table into `out`; prints the summary."""

    (out / "matrix.md").write_text(f"# Detection matrix\n\n{report.markdown(results, problems)}", encoding="utf-8")
    report.write_csv(results, out / "matrix.csv")
    print(f"\n{report.summary(results, problems)}\nwritten: {out}/matrix.md, matrix.csv")


def line_of(run: Run) -> str:
    name = run.fault or f"no fault, run {run.index}"
    caught = f"caught by {', '.join(run.caught_by)}" if run.caught_by else "not caught" if run.fault else "passed"
    return f"{run.seconds:6.1f} s  {name}: {caught}" + (f"; restarted: {run.restarted}" if run.restarted else "")
