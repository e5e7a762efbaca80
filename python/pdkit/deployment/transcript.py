"""What an eval asked and was answered, as it goes: one JSON line per example."""

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any
from unittest import mock

from sglang.test import simple_eval_common

from pdkit.core import events

PROGRESS_VARIABLE = "SGLANG_PD_PROGRESS_S"
SECONDS_BETWEEN_LINES = 15.0
WORTH_STOPPING = 16  # examples without an answer; fewer are waited for

ANSWERS = re.compile(r"<p>(Correct|Extracted) Answer: (.*?)</p>")  # in the HTML that SGLang's evals make of an example


class EvalLost(AssertionError):
    """So many answers are wrong that the score cannot exceed its gate any more."""


class Transcript:
    """While open, each example that SGLang's `run_eval` scores becomes a line of JSON at `path`; emits progress.

    All releases hand their examples to `simple_eval_common.map_with_progress`, and their prompts to the OpenAI client.
    progressed: called after each example. gate: what the score must exceed; once it cannot, and at least WORTH_STOPPING
    examples have no answer yet, EvalLost is raised.
    """

    def __init__(self, path: str, progressed: Callable[[], None] = lambda: None, gate: float | None = None) -> None:
        self.path, self._gate = path, gate
        self._lost: Future[str] = Future()
        self.scores: list[float] = []
        self.answered: list[tuple[bool, float, float]] = []  # right, begin and end in seconds; in the order of ends
        self._progressed = progressed
        self._seconds_between_lines = float(os.getenv(PROGRESS_VARIABLE) or SECONDS_BETWEEN_LINES)
        self._opened_at = self._printed_at = time.monotonic()
        self._lock = threading.Lock()
        self._request = threading.local()

    @contextlib.contextmanager
    def open(self) -> Iterator["Transcript"]:
        completions = simple_eval_common.openai.resources.Completions
        create, map_with_progress = completions.create, simple_eval_common.map_with_progress

        def create_and_count(*args: Any, **kwargs: Any) -> Any:
            completion = create(*args, **kwargs)
            self._request.tokens = completion.usage and completion.usage.completion_tokens
            return completion

        def map_and_keep(score: Callable[[Any], Any], examples: Sequence[Any], num_threads: int) -> Any:
            total = len(examples)

            def run() -> Any:
                return map_with_progress(lambda example: self._keep(example, score, total), examples, num_threads)

            return run() if self._gate is None else self._unless_lost(run)

        with (
            open(self.path, "w", encoding="utf-8") as self._file,
            mock.patch.object(completions, "create", create_and_count),
            mock.patch.object(simple_eval_common, "map_with_progress", map_and_keep),
        ):
            yield self

    def _unless_lost(self, run: Callable[[], Any]) -> Any:
        """What `run` returns. Raises EvalLost at once, while threads still wait for answers."""
        done: Future[Any] = Future()

        def work() -> None:
            try:
                done.set_result(run())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        wait([done, self._lost], return_when=FIRST_COMPLETED)
        if self._lost.done() and not done.done():
            raise EvalLost(self._lost.result())
        return done.result()

    def _look(self, total: int) -> None:
        """Whether it is lost by now; the lock is held."""
        if self._gate is None or self._lost.done():
            return
        answered = len(self.scores)
        most = (total - answered + sum(self.scores)) / total
        if total - answered >= WORTH_STOPPING and most <= self._gate:
            self._lost.set_result(
                f"score at most {most:.3f} of {total} examples, must be greater than {self._gate:g}: stopped after "
                f"{answered}, of which {sum(score < 1 for score in self.scores)} are wrong"
            )

    def _keep(self, example: Any, score: Callable[[Any], Any], total: int) -> Any:
        if self._lost.done():
            raise EvalLost(self._lost.result())
        self._request.tokens, start = None, time.monotonic()
        result = score(example)
        seconds = time.monotonic() - start
        *prompt, answer = (message["content"] for message in result.convo or [{"content": ""}])
        line = {"example": example if isinstance(example, (int, str)) else None, "score": result.score}
        line |= {"began": round(start - self._opened_at, 3)}
        line |= {"seconds": round(seconds, 3), "completion_tokens": self._request.tokens}
        line |= {"prompt": "\n".join(map(str, prompt)), "answer": answer}
        line |= {f"{kind.lower()}_answer": value for kind, value in ANSWERS.findall(result.html or "")}
        with self._lock:
            if self._file.closed:  # it was lost meanwhile
                return result
            with contextlib.suppress(OSError):  # a full disk changes no score
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
            self.scores.append(result.score)
            self.answered.append((result.score == 1.0, start, start + seconds))
            self._look(total)
            if time.monotonic() - self._printed_at >= self._seconds_between_lines:
                self._printed_at = time.monotonic()
                done = len(self.scores)
                events.progress(done, total, sum(self.scores) / done)  # in order: the lock is held
        self._progressed()
        return result
