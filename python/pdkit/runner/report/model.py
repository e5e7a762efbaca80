"""A run as its report directory tells it, in frozen dataclasses; times in seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdkit.checks.hints import Evidence
from pdkit.core.quantile import quantile
from pdkit.runner.targets import left_out

PASSED, FAILED, UNFINISHED = "passed", "failed", "unfinished"
PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
ROWS = 40
BINS = 16


@dataclass(frozen=True)
class ReportRow:
    """A test method, or a check of all of them: what came of it, in a sentence; `seconds` None where nobody knows."""

    name: str
    state: str
    sentence: str
    seconds: float | None = None


@dataclass(frozen=True)
class Phase:
    """`start` counts from the start of the file; an unfinished phase lasts until the file ended."""

    name: str
    state: str
    start: float
    seconds: float

    @property
    def is_bad(self) -> bool:
        return self.state != PASSED


@dataclass(frozen=True)
class Example:
    """One example of an eval; `seconds` are those of its request, retries included, from `began` after the eval's begin."""

    number: int
    score: float
    seconds: float
    completion_tokens: int | None
    prompt: str
    answer: str
    correct_answer: str | None = None
    extracted_answer: str | None = None
    began: float | None = None

    @property
    def is_right(self) -> bool:
        return self.score == 1.0

    @property
    def question(self) -> str:
        """The prompt without its shots."""
        return "Question:" + self.prompt.rpartition("Question:")[2] if "Question:" in self.prompt else self.prompt

    @property
    def tokens_per_s(self) -> float | None:
        return self.completion_tokens / self.seconds if self.completion_tokens and self.seconds else None

    @property
    def reason(self) -> str:
        """Why it counts as wrong."""
        if not self.answer:
            return "no answer: its request failed, or the model said nothing"
        if self.extracted_answer in (None, "-9999999"):
            return f"no number in the answer, {self.correct_answer} is right"
        return f"answered {self.extracted_answer}, {self.correct_answer} is right"


@dataclass(frozen=True)
class Score:
    """What the gate was asked about: `threshold` must be exceeded, `throughput` is in output tokens/s. None stands for what the test did not name."""

    target: str | None
    engine: str | None
    correct: int
    examples: int
    threshold: float | None
    throughput: float | None = None

    @property
    def value(self) -> float:
        return self.correct / self.examples

    @property
    def passed(self) -> bool:
        return self.threshold is None or self.value > self.threshold

    @property
    def gate(self) -> str:
        return "no gate" if self.threshold is None else f"gate >{self.threshold:g}"

    def __str__(self) -> str:
        low, high = self.interval
        share = f"score {self.value:.3f} ({self.correct} of {self.examples})"
        return f"{share}, exact 95 % interval {low:.3f} to {high:.3f}, {self.gate}"

    @property
    def where(self) -> str:
        """`target embedded (pdkit.engine)`, as far as it is known."""
        return f"target {self.target or 'unknown'}" + (f" ({self.engine})" if self.engine else "")

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval (Clopper-Pearson) of the accuracy that this score is a sample of."""
        from pdkit.core.stats import exact_interval  # scipy: only a run with a score pays for it

        return exact_interval(self.correct, self.examples)


@dataclass(frozen=True)
class Table:
    """A table that a test made; the first cell of a row is its heading."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Log:
    """The end of the log of one process."""

    name: str
    path: str
    lines: tuple[str, ...]
    died: bool = False


@dataclass(frozen=True)
class Death:
    """The process that died first: `cause` on one line, `excerpt` the lines of `log` that show why."""

    name: str
    cause: str
    excerpt: tuple[str, ...] = ()
    log: str | None = None


@dataclass(frozen=True)
class ComparedRound:
    """A round of requests compared with a monolithic server's answers.

    further  of each request: 1 where the candidate is visibly further off than the control arm, -1 where it is nearer, 0;
             () where no control arm was taken, None where that was not recorded
    """

    evidence: Evidence
    further: tuple[int, ...] | None


@dataclass(frozen=True)
class FileRun:
    """One test file, by its last attempt. The log of the process that died is the first of `logs`.

    hint      where to look, by the pattern of what was compared
    launched  (name, command) of each process that the test started
    """

    file: str
    state: str
    reason: str
    seconds: float
    attempts: int
    counts: Mapping[str, int]
    command: str
    log: str
    launched: tuple[tuple[str, str], ...] = ()
    phases: tuple[Phase, ...] = ()
    score: Score | None = None
    acceptance_lengths: tuple[float, ...] = ()
    decode_rates: tuple[float, ...] = ()
    examples: tuple[Example, ...] = ()
    tables: tuple[Table, ...] = ()
    metrics: tuple[tuple[str, str], ...] = ()
    logs: tuple[Log, ...] = ()
    failure: str = ""
    death: Death | None = None
    notes: tuple[str, ...] = ()
    rows: tuple[ReportRow, ...] = ()
    hint: str | None = None
    compared: tuple[ComparedRound, ...] = ()

    @property
    def is_bad(self) -> bool:
        return self.state in ("failed", "timed out", "interrupted")

    @property
    def wrong(self) -> tuple[Example, ...]:
        return tuple(example for example in self.examples if not example.is_right)

    @property
    def in_phase(self) -> str:
        """` in phase launch decode`, if it failed in one."""
        return f" in phase {self.failed_phase}" if self.failed_phase else ""

    @property
    def failed_phase(self) -> str | None:
        """Where it went wrong. Both servers load at once: one that died while they did failed in its own launch."""
        bad = next((phase.name for phase in self.phases if phase.is_bad), None)
        victim = self.death.name if self.death else None
        if bad and bad.startswith("launch ") and victim in ("prefill", "decode"):
            return f"launch {victim}"
        return bad

    def shown(self, is_whole: bool) -> tuple[list[ReportRow], int]:
        """(rows, how many others passed): all of a few, but of many, or where `is_whole` is False, what did not pass."""
        rows = [row for row in self.rows if (is_whole and len(self.rows) <= ROWS) or row.state != PASS]
        return rows, len(self.rows) - len(rows)

    @property
    def first_failure(self) -> str:
        return next((row.sentence for row in self.rows if row.state == FAIL), "")

    @property
    def is_plain(self) -> bool:
        """Whether it started no servers and measured nothing."""
        return not (self.phases or self.score or self.tables or self.examples)

    @property
    def has_details(self) -> bool:
        return bool(self.is_bad or self.rows or not self.is_plain)


@dataclass(frozen=True)
class Report:
    """One run of a suite; `result` is the name of its exit code, None where it did not come to its end."""

    title: str
    result: str | None
    exit_code: int | None
    seconds: float
    suite: str
    hw: str
    files: tuple[FileRun, ...]
    surroundings: Mapping[str, Any]
    gpu_plans: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    target: str | None = None

    @property
    def not_exercised(self) -> tuple[str, ...]:
        """What a pass on this target says nothing about, one text each; none where there is no target."""
        return left_out(self.target)

    @property
    def passed(self) -> bool:
        return self.result == "passed"

    @property
    def verdict(self) -> str:
        return (self.result or "did not end").replace("_", " ")

    @property
    def scored(self) -> tuple[FileRun, ...]:
        return tuple(run for run in self.files if run.score)

    @property
    def first_bad(self) -> FileRun | None:
        return next((run for run in self.files if run.is_bad), None)


@dataclass(frozen=True)
class Distribution:
    """Quantiles and a histogram of at most BINS equal bins: (from, to, count)."""

    values: tuple[float, ...]

    def quantile(self, share: float) -> float:
        return quantile(self.values, share)

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def histogram(self) -> tuple[tuple[float, float, int], ...]:
        low, high = min(self.values), max(self.values)
        if low == high:
            return ((low, high, len(self.values)),)
        width = (high - low) / BINS
        counts = [0] * BINS
        for value in self.values:
            counts[min(int((value - low) / width), BINS - 1)] += 1
        return tuple((low + i * width, low + (i + 1) * width, count) for i, count in enumerate(counts))
