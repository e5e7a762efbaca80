"""SGLang's `run_eval`, recorded: a phase, the transcript, a score, and a heartbeat while it waits for answers."""

from types import SimpleNamespace
from typing import Any

from sglang.test import run_eval as sglang_run_eval

from pdkit.core import events
from pdkit.deployment.fixture import PDServers, current
from pdkit.deployment.transcript import EvalLost, Transcript

sglang_eval = sglang_run_eval.run_eval  # before `pdkit.deployment.attach` puts ours in its place


def run_eval(args: SimpleNamespace, gate: float | None = None) -> dict[str, Any]:
    """SGLang's own with the same `args`, recorded while a deployment is up; `gate` is what the score must exceed.

    Raises EvalLost as soon as it cannot any more. Recorded, the metrics also have "answered": (right,
    begin, end) of each request, in seconds.
    """
    servers = current()
    if servers is None:
        return sglang_eval(args)
    if getattr(args, "api", None) == "completion" and args.base_url not in servers.answering:
        servers.first_request(args.base_url, getattr(args, "model", None), getattr(args, "num_threads", 32))
    with (
        events.phase(args.eval_name),
        servers.heartbeat() as progressed,
        Transcript(servers.log_path(args.eval_name, "jsonl"), progressed, gate).open() as transcript,
    ):
        try:
            metrics = sglang_eval(args)
        except EvalLost:
            scores = transcript.scores
            _emit_score(servers, args.eval_name, {"score": sum(scores) / len(scores)}, len(scores), gate)
            raise
    _emit_score(servers, args.eval_name, metrics, len(transcript.scores) or args.num_examples, gate)
    return {**metrics, "answered": tuple(transcript.answered)} if isinstance(metrics, dict) else metrics


def _emit_score(servers: type[PDServers], name: str, metrics: Any, examples: int, gate: float | None) -> None:
    if isinstance(metrics, dict) and isinstance(metrics.get("score"), (int, float)):
        events.score(
            name,
            float(metrics["score"]),
            examples,
            gate=gate,
            target=getattr(servers, "target", None),
            engine=servers.engine,
            throughput=metrics.get("output_throughput"),
        )
