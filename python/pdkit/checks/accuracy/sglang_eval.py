"""SGLang's own `run_eval`, as the accuracy gate and the timings call it."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

from sglang.test import run_eval as sglang_run_eval
from sglang.test import simple_eval_common

from pdkit.checks.accuracy.gsm8k import gsm8k_args


def gsm8k_metrics(base_url: str, model: str, data_path: str | None, examples: int) -> dict[str, Any]:
    """What run_eval measures at `base_url` on the first `examples` questions, where the score is only a means."""
    return sglang_run_eval.run_eval(gsm8k_args(base_url, model, data_path, examples))


def run_eval_with_outcomes(args: SimpleNamespace) -> dict[str, Any]:
    """SGLang's `run_eval`, with `metrics["outcomes"]`: whether each example was right, in the order of the data set.

    `run_eval` returns the mean only. All releases collect the scores of single examples through
    `simple_eval_common.aggregate_results`, which is watched meanwhile; without such a call there are no outcomes.
    """
    original = simple_eval_common.aggregate_results
    with mock.patch.object(simple_eval_common, "aggregate_results", wraps=original) as aggregate:
        metrics = sglang_run_eval.run_eval(args)
    if aggregate.call_count != 1:
        return metrics
    return {**metrics, "outcomes": tuple(result.score == 1.0 for result in aggregate.call_args.args[0])}
