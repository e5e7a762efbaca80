"""How the commands of this project end where they cannot do what they are asked for."""

import argparse
import contextlib
import errno
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pdkit.core.errors import ExitCode, NotReady, UsageError
from pdkit.core.suggest import nearest, unknown

N = TypeVar("N", int, float)


def run_command(name: str, main: Callable[[Sequence[str]], ExitCode], argv: Sequence[str]) -> ExitCode:
    """What `main(argv)` returns; what it expects to go wrong becomes lines on standard error, and an exit code.

    UsageError and files that cannot be read or written: BAD_USAGE. NotReady: NOT_READY. Ctrl-C: INTERRUPTED. A reader
    who leaves before the end of our output: PASSED. Everything else is a bug, and is raised.
    """
    _open_streams()
    if os.path.expanduser("~") == "~":  # importing SGLang makes a directory of that name here, and then fails
        return _refuse(name, "this user has no home directory, and SGLang needs one: set HOME", ExitCode.NOT_READY)
    try:
        code = main(argv)
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _refuse(name, str(error), ExitCode.BAD_USAGE)
    except NotReady as error:
        return _refuse(name, str(error), ExitCode.NOT_READY)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        _leave_output()
        return ExitCode.PASSED
    except OSError as error:
        if error.filename is None and error.errno == errno.ENOSPC:  # of standard output, or of a file: it does not say
            _leave_output()
            return _refuse(name, f"output cannot be written: {error.strerror}", ExitCode.FAILED)
        if error.filename is None:
            raise
        return _refuse(name, f"{error.filename}: {error.strerror}", ExitCode.BAD_USAGE)


def _open_streams() -> None:
    """Standard streams that were closed lead nowhere; otherwise a file that is opened next would get their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))


def _leave_output() -> None:
    """Standard output gets what it takes of the rest, and the interpreter does not fail at it once more when it ends."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(name: str, message: str, code: ExitCode) -> ExitCode:
    print(*(f"{name}: error: {line}" for line in message.splitlines()), sep="\n", file=sys.stderr)
    return code


class _HelpFormatter(argparse.HelpFormatter):
    """Each line of a text is a paragraph; one that is indented stays as it is."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, max_help_position=30, **settings)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2  # argparse forgets that names of sub-commands stand further to the right

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n".join(line if line.startswith(" ") else fill(line, width, indent) for line in text.splitlines())


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print its usage and exit, and names what was probably meant.

    No option may be abbreviated; each line of description and epilog is a paragraph.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": _HelpFormatter, **settings})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's. Raises UsageError."""
        found, unknown_words = self.parse_known_args(args, namespace)
        if not unknown_words:
            return found
        word = unknown_words[0]
        if not word.startswith("-"):
            self.error(f"unexpected argument {word!r}")
        flag, known = word.split("=")[0], {name for name in self._options() if name.startswith("--")}
        raise UsageError(f"unknown option {flag}; nearest known: {', '.join(nearest(flag, known))}")

    def _options(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._options()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            if isinstance(action, argparse._SubParsersAction):
                raise UsageError(unknown("command", value, names))
            raise argparse.ArgumentError(action, f"{unknown('value', str(value), names)}")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the options)")


def _number(name: str, read: Callable[[str], N], fits: Callable[[N], bool]) -> Callable[[str], N]:
    """For argparse: reads a number that `fits`, or raises ValueError; a refusal calls it by its name."""

    def number(text: str) -> N:
        value = read(text)
        if not fits(value):
            raise ValueError(text)
        return value

    number.__name__ = name
    return number


seconds = _number("number of seconds", float, lambda value: 0 <= value < math.inf)
natural = _number("number", int, lambda value: value >= 0)
count = _number("number of at least 1", int, lambda value: value >= 1)
port = _number("port (1-65535)", int, lambda value: 0 < value < 65536)
positive = _number("positive number", float, lambda value: 0 < value < math.inf)


def text_path(text: str) -> Path:
    """For argparse: a path whose name can be printed and written into a report. Raises argparse.ArgumentTypeError."""
    path = Path(text)
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{ascii(text)} is not text in this locale; choose another name") from None
    return path
