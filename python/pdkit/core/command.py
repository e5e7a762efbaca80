"""How the commands of this project end where they cannot do what they are asked for."""

import os
import sys
from collections.abc import Callable, Sequence

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
