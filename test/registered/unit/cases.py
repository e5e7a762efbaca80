"""What many tests need: a folder of their own, an environment without settings, and what a call or command prints."""

import contextlib
import io
import os
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pdkit.cli.main import main


class FolderCase(unittest.TestCase):
    """Each test has a new directory, `self.root`."""

    def setUp(self) -> None:
        super().setUp()
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self, name: str, text: str = "") -> Path:
        """A file below `self.root`, with the directories that it needs."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


def without(*prefixes: str) -> dict[str, str]:
    """This environment without the variables whose names start so."""
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


class Printed(NamedTuple):
    """What a call returned and printed; of one that ended in SystemExit, its code."""

    returned: Any
    out: str
    err: str


def printed(call: Callable, *args: Any, **options: Any) -> Printed:
    """`call(*args, **options)`, with what it prints kept back."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            returned = call(*args, **options)
        except SystemExit as end:
            returned = end.code
    return Printed(returned, out.getvalue(), err.getvalue())


def pdkit(*words: object) -> Printed:
    """The command `pdkit` with `words`, run in this process; `returned` is its exit code."""
    return printed(main, [str(word) for word in words])
