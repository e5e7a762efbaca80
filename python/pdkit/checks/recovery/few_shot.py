"""What is in flight where nothing can hold a KV transfer: long prompts queue for prefill, whose chunks leave one by one."""

from pathlib import Path

from pdkit.checks.recovery.clients import Query
from pdkit.checks.recovery.in_flight import BEFORE, DURING, IDLE, STREAMING
from pdkit.core.gsm8k import question_text, read_lines, shot_text


def few_shot_asks(questions: str | Path, long: int, streamed: int) -> dict[str, Query]:
    """A request for each phase, of GSM8K `questions` (.jsonl).

    long: solved problems in front of the question of those that are to queue; streamed: tokens of the one that streams
    """
    lines = read_lines(questions)
    shots, question = [shot_text(line) for line in lines], question_text(lines[-1])
    return {
        BEFORE: Query("".join(shots[:long]) + question, 8),
        DURING: Query("".join(shots[long : 2 * long]) + question, 8),
        STREAMING: Query("".join(shots[:5]) + question, streamed, stream=True),
        IDLE: Query("".join(shots[:5]) + question, 8),
    }
