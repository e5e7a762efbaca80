"""What an argument parser says to a command line, flag by flag."""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from pdkit.core.suggest import nearest
from pdkit.preflight.finding import Finding, Level

_FLAG = re.compile(r"--?[A-Za-z]")
_DEPRECATED = re.compile(r"^\W*(note: )?.{0,60}?\bdeprecated\b", re.IGNORECASE)


class FlagsRefused(Exception):
    """The parser does not take these arguments; the message is the parser's."""


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that raises FlagsRefused where it would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise FlagsRefused(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise FlagsRefused(message or "ends before it serves")


def segments(argv: Iterable[str]) -> list[list[str]]:
    """`argv` cut before each flag: `[["--tp", "4"], ["--trust-remote-code"]]`."""
    cut: list[list[str]] = []
    for word in argv:
        if _FLAG.match(word) or not cut:
            cut.append([])
        cut[-1].append(word)
    return cut


def check(parser: FlagParser, argv: Sequence[str], required: Sequence[str] = ()) -> tuple[list[Finding], list[str]]:
    """Findings on `argv`, and the part of it that the parser takes.

    `required` are arguments without which the parser takes nothing; each segment is parsed with them alone, so that
    one refusal does not hide another.
    """
    findings, accepted = [], []
    for segment in segments(argv):
        try:
            parser.parse_args([*required, *segment])
        except FlagsRefused as refusal:
            findings.append(Finding(Level.ERROR, segment[0], _why(parser, segment, str(refusal))))
            continue
        accepted += segment
        findings += _remarks(parser, segment)
    try:
        parser.parse_args([*required, *accepted])
    except FlagsRefused as refusal:
        findings.append(Finding(Level.ERROR, "command line", str(refusal)))
    return findings, accepted


def by_name(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """`args` with each value under the names of its flags too: 0.5.12 keeps `--tp-size` as tensor_parallel_size."""
    named = {
        name.lstrip("-").replace("-", "_"): getattr(args, action.dest)
        for name, action in _options(parser).items()
        if hasattr(args, action.dest)
    }
    return argparse.Namespace(**named | vars(args))


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in parser._actions for name in action.option_strings}


def _why(parser: FlagParser, segment: Sequence[str], refusal: str) -> str:
    flag = segment[0].partition("=")[0]
    if flag.startswith("-") and not any(name.startswith(flag) for name in _options(parser)):
        return f"no such flag; nearest: {', '.join(nearest(flag, _options(parser)))}"
    if flag == segment[0] and refusal.startswith("unrecognized arguments"):
        return f"takes no value, given {' '.join(segment[1:])!r}"
    refusal = re.sub(r"^ambiguous option: \S+ ", "ambiguous, ", refusal)
    return " ".join(re.sub(r"^argument \S+: ", "", refusal).split())


def _remarks(parser: FlagParser, segment: Sequence[str]) -> list[Finding]:
    flag, _, attached = segment[0].partition("=")
    options = _options(parser)
    if not flag.startswith("-"):
        return []
    name = flag if flag in options else next(name for name in options if name.startswith(flag))
    action = options[name]
    remarks = []
    if name != flag:
        remarks.append(Finding(Level.WARNING, flag, f"abbreviates {name}: refused once another flag starts like that"))
    if successor := _successor(action):
        remarks.append(Finding(Level.WARNING, flag, successor))
    for value in [attached] * bool(attached) + list(segment[1:]):
        if value.startswith(("{", "[")):
            try:
                json.loads(value)
            except ValueError:
                remarks.append(Finding(Level.ERROR, flag, f"not valid JSON: {value}"))
    return remarks


def _successor(action: argparse.Action) -> str | None:
    """What to use instead of a deprecated flag, in the words of its release."""
    new_flag = getattr(action, "new_flag", None)
    if new_flag:
        return f"deprecated, use {new_flag}"
    text = " ".join((action.help or "").split())
    if type(action).__name__.startswith("Deprecated") or _DEPRECATED.match(text):
        return text if "deprecated" in text.lower() else f"deprecated: {text}"
    return None


def describe(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """Every flag by each of its names, as plain data, to compare two parsers."""
    return {
        name: {
            "dest": action.dest,
            "nargs": str(action.nargs),
            "choices": None if action.choices is None else sorted(map(str, action.choices)),
            "type": getattr(action.type, "__name__", None),
            "required": action.required,
            "default": repr(action.default),
            "action": type(action).__name__,
            "deprecated": _successor(action),
        }
        for name, action in _options(parser).items()
    }
