"""GSM8K: its questions, and slice after slice by SGLang's `run_eval` or the like until the accuracy gate is decided."""

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import requests

from pdkit.checks.accuracy.gate import AccuracyGate, GateOptions, ScoredSlice
from pdkit.checks.accuracy.paired import PairedGate, PairedOptions
from pdkit.core.gsm8k import Dataset, DatasetError, prompts_of, read_dataset

# What every release of SGLang downloads; `pdkit.preflight.environment.dataset` reads it in the installed one.
GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl"
DOWNLOAD_S = 20

Run = Callable[[SimpleNamespace], dict[str, Any]]


class ScoreError(ValueError):
    """`run_eval` returned something that is not the mean of that many right or wrong answers."""


def default_dataset_path() -> str:
    """The file that SGLang scores when no path is given, downloaded to where SGLang keeps it. Raises DatasetError."""
    path = Path("/tmp", GSM8K_URL.rpartition("/")[2])
    if path.exists():
        return str(path)
    try:
        answer = requests.get(GSM8K_URL, timeout=DOWNLOAD_S)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise DatasetError(f"cannot fetch {GSM8K_URL} ({type(error).__name__}); name a file of questions") from None
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(answer.content)
    os.replace(file.name, path)
    return str(path)


def _dataset_of(args: SimpleNamespace) -> Dataset:
    return read_dataset(getattr(args, "gsm8k_data_path", None) or default_dataset_path(), getattr(args, "num_shots", 5))


def few_shot_prompts(path: str | Path | None, count: int) -> list[str]:
    """The first `count` prompts, shots included, as `run_eval` would send them with the completion API."""
    return prompts_of(read_dataset(path or default_dataset_path()), count)


def gsm8k_args(
    base_url: str, model: str, data_path: str | None, num_examples: int | None = None, **more: Any
) -> SimpleNamespace:
    """What `run_eval` gets for GSM8K, as test_disaggregation_dsv4.py states it, too.

    data_path     a .jsonl file; None for the one that SGLang downloads
    num_examples  how many are scored; left out where a gate sets them slice by slice
    """
    count = {} if num_examples is None else {"num_examples": num_examples}
    return SimpleNamespace(
        base_url=base_url, model=model, eval_name="gsm8k", api="completion", max_tokens=512, num_threads=128,
        gsm8k_data_path=data_path, **count, **more,
    )  # fmt: skip


def recover_correct(score: Any, examples: int) -> int:
    """The count of right answers whose mean over `examples` is `score`. Raises ScoreError if there is none."""
    if score is None or not math.isfinite(score) or not 0 <= score <= 1:
        raise ScoreError(f"run_eval returned score {score!r} for {examples} examples, no share of right answers")
    correct = round(float(score) * examples)
    if abs(float(score) * examples - correct) > 1e-6:
        raise ScoreError(f"run_eval returned score {score!r}, no whole number of right answers among {examples}")
    return correct


def score_rows(run: Run, args: SimpleNamespace, data: Dataset, start: int, stop: int) -> ScoredSlice:
    """Scores rows [start, stop) of `data`. Raises ScoreError when what `run` returns does not add up."""
    with data.file_of(start, stop) as path:
        settings = {
            "eval_name": "gsm8k",
            "gsm8k_data_path": path,
            "num_shots": len(data.shots),
            "num_examples": stop - start,
            "repeat": 1,
            "return_latency": False,
        }
        metrics = run(SimpleNamespace(**{**vars(args), **settings}))
    correct = recover_correct(metrics.get("score"), stop - start)
    outcomes = metrics.get("outcomes")
    if outcomes is not None and (len(outcomes), sum(outcomes)) != (stop - start, correct):
        raise ScoreError(
            f"run_eval returned score {metrics['score']!r}, {correct} of {stop - start}, but scored "
            f"{len(outcomes)} examples, {sum(outcomes)} of them right"
        )
    return ScoredSlice(stop - start, correct, outcomes)


def gsm8k_gate(
    args: SimpleNamespace,
    options: GateOptions | None = None,
    *,
    run: Run,
    progress: Callable[[str], None] = print,
) -> AccuracyGate:
    """Scores GSM8K, slice after slice, until the gate is decided; at most the whole data set, no example twice.

    args        as for `run_eval`; `gsm8k_data_path` and `num_shots` are read from it, what names a slice is set
    run         SGLang's `run_eval`, or what behaves like it

    Raises DatasetError, ScoreError, or ValueError where the data set is too small for what `options` promise.
    """
    data = _dataset_of(args)
    gate = AccuracyGate(options or GateOptions(), len(data.rows))
    while count := gate.next_examples:
        gate = gate.record(score_rows(run, args, data, gate.examples, gate.examples + count))
        progress(
            f"accuracy gate: {gate.correct} of {gate.examples} correct, {gate.verdict.value}"
            + (f", scoring {gate.next_examples} more" if gate.next_examples else "")
        )
    return gate


def paired_gate(
    args: SimpleNamespace,
    baseline_args: SimpleNamespace,
    options: PairedOptions | None = None,
    *,
    run: Run,
    progress: Callable[[str], None] = print,
) -> PairedGate:
    """Scores the same examples on a baseline and on a candidate, slice after slice, until the gate is decided.

    args, baseline_args  as for `run_eval`: of the candidate, and of a monolithic server of the same model
    run                  SGLang's `run_eval`, or what behaves like it

    Raises ScoreError where either side reports how many were right, but not which; DatasetError, or ValueError where
    the data set is too small.
    """
    data = _dataset_of(args)
    gate = PairedGate(options or PairedOptions(), len(data.rows))
    while count := gate.next_examples:
        start, stop = gate.examples, gate.examples + count
        theirs, ours = (score_rows(run, each, data, start, stop).outcomes for each in (baseline_args, args))
        if theirs is None or ours is None:
            raise ScoreError("no outcomes of single examples: this SGLang's run_eval does not let them be paired")
        gate = gate.record(theirs, ours)
        more = f", scoring {gate.next_examples} more on both" if gate.next_examples else ""
        progress(f"paired gate: {gate.lost} lost and {gate.gained} gained of {gate.examples}{more}")
    return gate
