"""What is in flight where nothing can hold a KV transfer: long prompts queue for prefill, whose chunks leave one by one."""

import json
from pathlib import Path

from pdkit.checks.recovery.clients import Ask
from pdkit.checks.recovery.in_flight import BEFORE, DURING, IDLE, STREAMING


def few_shot_asks(questions: str | Path, long: int, streamed: int) -> dict[str, Ask]:
    """A request for each phase, of GSM8K `questions` (.jsonl).

    long: solved problems in front of the question of those that are to queue; streamed: tokens of the one that streams
    """
    with open(questions, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    shots = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows]
    question = f"Question: {rows[-1]['question']}\nAnswer:"
    return {
        BEFORE: Ask("".join(shots[:long]) + question, 8),
        DURING: Ask("".join(shots[long : 2 * long]) + question, 8),
        STREAMING: Ask("".join(shots[:5]) + question, streamed, stream=True),
        IDLE: Ask("".join(shots[:5]) + question, 8),
    }
