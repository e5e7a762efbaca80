"""Grade-school word problems in GSM8K's format, generated from a seed.

A problem is a template with names, things and numbers filled in; its answer works the
steps and ends in ``#### N``. Arithmetic is 2-digit ± 1-digit, or 1-digit × 1-digit, with
every result in 2..99. The numbers of a question sit more than a sliding window away from
the end of its answer, so a model has to carry them in its compressed state.

Training and evaluation never share a problem: a template together with its numbers
belongs to one split, whatever names and things are filled in (:func:`is_held_out`).
"""

from __future__ import annotations

import json
import operator
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 1 / 8
EVALUATION_ROWS = 1319
"""Rows of the evaluation file, as many as GSM8K's test split has."""

_GIRLS = ("Anna", "Clara", "Emma", "Julia", "Lena", "Maria", "Nina", "Sara")
_BOYS = ("Adam", "Ben", "David", "Felix", "Jonas", "Leo", "Max", "Paul")
_THINGS = (
    "apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "marbles",
    "pears", "pencils", "plums", "shells", "stamps", "stickers", "stones", "tickets",
)  # fmt: skip
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_TWO_DIGITS, _ONE_DIGIT = (11, 98), (2, 9)


@dataclass(frozen=True)
class Template:
    """One kind of problem.

    `question` and `answer` are format strings over ``{N} {M}`` (two people), ``{he}``
    (pronoun of N), ``{i}`` (things), the numbers drawn (``A`` has two digits, ``a b c``
    one) and the results of `steps`, each ``"r=A+b"``; the last step is the answer.
    """

    name: str
    question: str
    steps: tuple[str, ...]
    answer: str

    @property
    def numbers(self) -> str:
        """Letters of the numbers to draw, in order of their first use."""
        letters = (letter for step in self.steps for letter in step[2::2])
        return "".join(dict.fromkeys(letter for letter in letters if letter in "Aabc"))


TEMPLATES = (
    Template(
        "find-give",
        "{N} has {A} {i}. On the way home {he} finds {a} more {i}, and then {he} gives {b} {i} to {M}. "
        "How many {i} does {N} have now?",
        ("r=A+a", "s=r-b"),
        "{N} first has {A}+{a}={r} {i}. Then {N} has {r}-{b}={s} {i}.",
    ),
    Template(
        "give-buy",
        "{N} has {A} {i} and gives {a} of them to {M}. After school {N} buys {b} new {i}. "
        "How many {i} does {N} have now?",
        ("r=A-a", "s=r+b"),
        "{N} first has {A}-{a}={r} {i}. Then {N} has {r}+{b}={s} {i}.",
    ),
    Template(
        "boxes-loose",
        "{N} has {a} boxes with {b} {i} in each box. On the table there are {c} more {i}. "
        "How many {i} are there in all?",
        ("r=a*b", "s=r+c"),
        "The boxes have {a}*{b}={r} {i}. In all there are {r}+{c}={s} {i}.",
    ),
    Template(
        "boxes-lost",
        "{N} fills {a} boxes with {b} {i} in each box. On the way home {he} loses {c} {i}. "
        "How many {i} does {N} have now?",
        ("r=a*b", "s=r-c"),
        "The boxes have {a}*{b}={r} {i}. Then {N} has {r}-{c}={s} {i}.",
    ),
    Template(
        "more-than",
        "{M} has {A} {i}. {N} has {a} more {i} than {M}, but after school {he} loses {b} of them. "
        "How many {i} does {N} have now?",
        ("r=A+a", "s=r-b"),
        "{N} first has {A}+{a}={r} {i}. Then {N} has {r}-{b}={s} {i}.",
    ),
    Template(
        "fewer-than",
        "{M} has {A} {i}. {N} has {a} fewer {i} than {M}, but on the way home {he} finds {b} new {i}. "
        "How many {i} does {N} have now?",
        ("r=A-a", "s=r+b"),
        "{N} first has {A}-{a}={r} {i}. Then {N} has {r}+{b}={s} {i}.",
    ),
    Template(
        "give-two",
        "{N} has {A} {i}. After school {he} gives {a} {i} to {M} and puts {b} {i} in a box. How many {i} are left?",
        ("r=A-a", "s=r-b"),
        "{N} first has {A}-{a}={r} {i}. Then {r}-{b}={s} {i} are left.",
    ),
    Template(
        "get-two",
        "{N} has {A} {i} in a box. In the morning {M} puts {a} {i} in the box, and in the evening {b} more. "
        "How many {i} are in the box now?",
        ("r=A+a", "s=r+b"),
        "The box first has {A}+{a}={r} {i}. Then the box has {r}+{b}={s} {i}.",
    ),
    Template(
        "sell",
        "In the shop {N} sells {a} {i} for {b} dollars each, and then {he} pays {c} dollars for a bag. "
        "How many dollars does {N} have now?",
        ("r=a*b", "s=r-c"),
        "The {i} cost {a}*{b}={r} dollars. Then {N} has {r}-{c}={s} dollars.",
    ),
    Template(
        "price-more",
        "In the shop {N} buys {a} {i} for {b} dollars each and a bag for {c} dollars. "
        "How many dollars does {N} pay in all?",
        ("r=a*b", "s=r+c"),
        "The {i} cost {a}*{b}={r} dollars. In all {N} pays {r}+{c}={s} dollars.",
    ),
    Template(
        "days",
        "{N} makes {a} {i} each day for {b} days. After that {he} gives {c} {i} to {M}. How many {i} are left?",
        ("r=a*b", "s=r-c"),
        "{N} makes {a}*{b}={r} {i}. Then {r}-{c}={s} {i} are left.",
    ),
    Template(
        "bag",
        "There are {A} {i} in a bag. {N} takes {a} {i} in the morning and {M} takes {b} {i} in the evening. "
        "How many {i} are left?",
        ("r=A-a", "s=r-b"),
        "The bag first has {A}-{a}={r} {i}. Then {r}-{b}={s} {i} are left.",
    ),
    Template(
        "trade",
        "{N} has {A} {i}. In the morning {he} buys {a} more, in the evening {he} finds {b} more, "
        "and then {he} gives {c} {i} to {M}. How many {i} does {N} have now?",
        ("r=A+a", "s=r+b", "t=s-c"),
        "{N} first has {A}+{a}={r} {i}. Then {N} has {r}+{b}={s} {i}. After that {N} has {s}-{c}={t} {i}.",
    ),
    Template(
        "shelf",
        "There are {A} {i} on a table. {M} takes {a} of them, and after that {N} puts {b} {i} on the table. "
        "How many {i} are on the table now?",
        ("r=A-a", "s=r+b"),
        "The table first has {A}-{a}={r} {i}. Then the table has {r}+{b}={s} {i}.",
    ),
)


@dataclass(frozen=True)
class Problem:
    """A question, its worked answer ending in ``#### N``, and the template and numbers behind them."""

    question: str
    answer: str
    key: tuple[str, tuple[int, ...]]


def is_held_out(key: tuple[str, tuple[int, ...]]) -> bool:
    """Whether a template with these numbers belongs to the evaluation split."""
    return zlib.crc32(repr(key).encode()) < HELD_OUT_SHARE * 2**32


def draw(rng: random.Random, *, held_out: bool) -> Problem:
    """Draw one problem from one split."""
    while True:
        template = rng.choice(TEMPLATES)
        numbers = {
            letter: rng.randint(*(_TWO_DIGITS if letter.isupper() else _ONE_DIGIT)) for letter in template.numbers
        }
        values = dict(numbers)
        for step in template.steps:
            values[step[0]] = _OPERATORS[step[3]](values[step[2]], values[step[4]])
        key = (template.name, tuple(numbers.values()))
        in_range = all(2 <= values[step[0]] <= 99 for step in template.steps)
        if in_range and is_held_out(key) == held_out:
            break
    girl = rng.random() < 0.5
    name = rng.choice(_GIRLS if girl else _BOYS)
    other = rng.choice([each for each in _GIRLS + _BOYS if each != name])
    words = {"N": name, "M": other, "he": "she" if girl else "he", "i": rng.choice(_THINGS)} | values
    result = values[template.steps[-1][0]]
    return Problem(template.question.format(**words), template.answer.format(**words) + f"\n#### {result}", key)


def stream(seed: int | str) -> Iterator[Problem]:
    """Endless training problems."""
    rng = random.Random(f"train-{seed}")
    while True:
        yield draw(rng, held_out=False)


def evaluation_set(count: int, seed: int | str = 0) -> list[Problem]:
    """`count` held-out problems, no two with the same template and numbers."""
    rng = random.Random(f"eval-{seed}")
    chosen: dict[tuple, Problem] = {}
    while len(chosen) < count:
        problem = draw(rng, held_out=True)
        chosen.setdefault(problem.key, problem)
    return list(chosen.values())


def write_jsonl(problems: list[Problem], path: Path) -> None:
    """Write ``{"question", "answer"}`` rows, as GSM8K's files have them."""
    rows = (json.dumps({"question": each.question, "answer": each.answer}) for each in problems)
    path.write_text("".join(row + "\n" for row in rows))


def few_shot(problems: list[Problem]) -> str:
    """The problems as SGLang's GSM8K eval writes shots, each ending in a blank line."""
    return "".join(f"Question: {each.question}\nAnswer: {each.answer}\n\n" for each in problems)
