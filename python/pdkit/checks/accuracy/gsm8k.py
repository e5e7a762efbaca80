"""GSM8K by SGLang's `run_eval`: what it gets, and slice after slice until the accuracy gate is decided."""

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from pdkit.checks.accuracy.gate import AccuracyGate, GateOptions, PairedGate, ScoredSlice
from pdkit.core.gsm8k import SCORERS, Dataset, DatasetError, prompts_of, read_dataset

Run = Callable[[SimpleNamespace], dict[str, Any]]


class ScoreError(ValueError):
    """`run_eval` returned something that is not the mean of that many right or wrong answers."""


def default_dataset_path() -> str:
    """The file that the installed SGLang scores when no path is given, downloaded and cached as SGLang does it."""
    from sglang.utils import download_and_cache_file

    for name in SCORERS:
        try:
            url = import_module(name).GSM8K_URL
            break
        except ModuleNotFoundError:
            continue
    else:
        raise DatasetError("this SGLang names no GSM8K data set; set gsm8k_data_path")
    try:
        return download_and_cache_file(url)
    except OSError as error:
        raise DatasetError(f"cannot fetch {url} ({type(error).__name__}); set gsm8k_data_path") from None


def _dataset_of(args: SimpleNamespace) -> Dataset:
    return read_dataset(getattr(args, "gsm8k_data_path", None) or default_dataset_path(), getattr(args, "num_shots", 5))


def few_shot_prompts(path: str | Path | None, count: int, num_shots: int = 5) -> list[str]:
    """The first `count` prompts, shots included, as `run_eval` would send them with the completion API."""
    return prompts_of(read_dataset(path or default_dataset_path(), num_shots), count)


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


def gsm8k_metrics(base_url: str, model: str, data_path: str | None, examples: int) -> dict[str, Any]:
    """What run_eval measures at `base_url` on the first `examples` questions, where the score is only a means."""
    from sglang.test.run_eval import run_eval

    return run_eval(gsm8k_args(base_url, model, data_path, examples))


def recover_correct(score: Any, examples: int) -> int:
    """The count of right answers whose mean over `examples` is `score`. Raises ScoreError if there is none."""
    if score is None or not math.isfinite(score) or not 0 <= score <= 1:
        raise ScoreError(f"run_eval returned score {score!r} for {examples} examples, no share of right answers")
    correct = round(float(score) * examples)
    if abs(float(score) * examples - correct) > 1e-6:
        raise ScoreError(f"run_eval returned score {score!r}, no whole number of right answers among {examples}")
    return correct


def run_eval_with_outcomes(args: SimpleNamespace) -> dict[str, Any]:
    """SGLang's `run_eval`, with `metrics["outcomes"]`: whether each example was right, in the order of the data set.

    `run_eval` returns the mean only. All releases collect the scores of single examples through
    `simple_eval_common.aggregate_results`, which is watched meanwhile; without such a call there are no outcomes.
    """
    from sglang.test import simple_eval_common
    from sglang.test.run_eval import run_eval

    original = simple_eval_common.aggregate_results
    with mock.patch.object(simple_eval_common, "aggregate_results", wraps=original) as aggregate:
        metrics = run_eval(args)
    if aggregate.call_count != 1:
        return metrics
    return {**metrics, "outcomes": tuple(result.score == 1.0 for result in aggregate.call_args.args[0])}


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
    run: Run = run_eval_with_outcomes,
    progress: Callable[[str], None] = print,
) -> AccuracyGate:
    """Scores GSM8K, slice after slice, until the gate is decided; at most the whole data set, no example twice.

    args        as for `run_eval`; `gsm8k_data_path` and `num_shots` are read from it, what names a slice is set
    run         `run_eval`, or what behaves like it

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
    gate: AccuracyGate, args: SimpleNamespace, level: float = 0.01, run: Run = run_eval_with_outcomes
) -> PairedGate:
    """Scores the examples of a finished `gate` on a baseline, which `args` addresses, and pairs the outcomes.

    Raises ScoreError where either side says how many were right, but not which.
    """
    data = _dataset_of(args)
    baseline = score_rows(run, args, data, 0, gate.examples)
    if gate.outcomes is None or baseline.outcomes is None:
        raise ScoreError("no outcomes of single examples: this SGLang's run_eval does not let them be paired")
    return PairedGate(baseline.outcomes, gate.outcomes, level)
