"""Questions in GSM8K's format, one JSON object per line with texts "question" and "answer": the one reader of them."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Where the releases of SGLang keep their GSM8K scorer, newest first: in 0.5.12 and 0.5.13 there is only the second.
SCORERS = ("sglang.test.simple_eval_mixed_prefix_gsm8k", "sglang.test.simple_eval_gsm8k")


class DatasetError(ValueError):
    """The data set cannot be scored; the message names the file and the line."""


@dataclass(frozen=True)
class Dataset:
    """Lines of a GSM8K .jsonl file as they stand: the first `num_shots` make the prompt, the others are scored."""

    path: Path
    shots: tuple[str, ...]
    rows: tuple[str, ...]

    @contextmanager
    def file_of(self, start: int, stop: int) -> Iterator[str]:
        """Path of a temporary .jsonl from which `run_eval` scores rows [start, stop), shots unchanged."""
        with tempfile.NamedTemporaryFile("w", prefix="gsm8k-slice-", suffix=".jsonl", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in (*self.shots, *self.rows[start:stop]))
            file.flush()
            yield file.name


def read_lines(path: str | Path) -> tuple[str, ...]:
    """The lines that `run_eval` would see in `path`, which skips those that start with '#'. Raises DatasetError."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DatasetError(f"{path}: {reason}") from None
    rows = [(number, line) for number, line in enumerate(lines, start=1) if not line.startswith("#")]
    if not any(line for _, line in rows):
        raise DatasetError(f"{path}: no questions")
    for number, line in rows:
        _check_row(path, number, line)
    return tuple(line for _, line in rows)


def _check_row(path: Path, number: int, line: str) -> None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}, line {number} is not JSON ({error.msg}); is the file complete?") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        raise DatasetError(f"{path}, line {number} has no texts 'question' and 'answer'; is this GSM8K's format?")


def read_dataset(path: str | Path, num_shots: int = 5) -> Dataset:
    """`read_lines`, of which at least one is left to score. Raises DatasetError."""
    texts = read_lines(path)
    if len(texts) <= num_shots:
        raise DatasetError(f"{path} has {len(texts)} rows, of which {num_shots} are shots: nothing is left to score")
    return Dataset(Path(path), texts[:num_shots], texts[num_shots:])


def question_text(line: str) -> str:
    """The question of one line as `run_eval` asks it."""
    return f"Question: {json.loads(line)['question']}\nAnswer:"


def shot_text(line: str) -> str:
    """One line with its answer, as `run_eval` puts it before a question."""
    return f"{question_text(line)} {json.loads(line)['answer']}\n\n"


def prompts_of(data: Dataset, count: int) -> list[str]:
    """The first `count` prompts, shots included, as `run_eval` sends them with the completion API."""
    prefix = "".join(map(shot_text, data.shots))
    return [prefix + question_text(line) for line in data.rows[:count]]


def running_text(lines: Sequence[str]) -> str:
    """Questions and answers of `lines` one after the other, as a natural text."""
    return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines))
