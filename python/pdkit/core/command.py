"""How the commands of this project end where they cannot do what they are asked for."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from pdkit.core.errors import ExitCode, NotReady, UsageError


def run_command(name: str, main: Callable[[Sequence[str]], ExitCode], argv: Sequence[str]) -> ExitCode:
    """What `main(argv)` returns; what it expects to go wrong becomes lines on standard error, and an exit code.

    UsageError and files that cannot be read or written: BAD_USAGE. NotReady: NOT_READY. Ctrl-C: INTERRUPTED. A reader
    who leaves before the end of our output: PASSED. Everything else is a bug, and is raised.
    """
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.PASSED
    except OSError as error:
        if error.filename is None:
            raise
        return _refuse(name, f"{error.filename}: {error.strerror}", ExitCode.BAD_USAGE)


def _refuse(name: str, message: str, code: ExitCode) -> ExitCode:
    print(*(f"{name}: error: {line}" for line in message.splitlines()), sep="\n", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Raises UsageError, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the options)")


def seconds(text: str) -> float:
    """For argparse: a number of seconds, not negative. Raises ValueError."""
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(text)
    return value


def natural(text: str) -> int:
    """For argparse: a whole number, not negative. Raises ValueError."""
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def positive(text: str) -> float:
    """For argparse: a finite number, greater than 0. Raises ValueError."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


seconds.__name__ = "number of seconds"


natural.__name__ = "number"


positive.__name__ = "positive number"
