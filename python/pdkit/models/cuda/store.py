"""Where kernel-sized checkpoints are kept: the user's cache directory, or PDKIT_CACHE_DIR."""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from pdkit.core import paths
from pdkit.models.cuda.config import DEEPEP_HIDDEN, HIDDEN

WEIGHTS = "model.safetensors"
RECORD = "training.json"


class DamagedCheckpoint(Exception):
    """The trained checkpoint is not the one that its record speaks of; the message is one line."""


FEW_HEADS = "trained-few-heads"


def cached(kind: str, hidden_size: int = HIDDEN) -> Path:
    """Where the checkpoint of a `kind`, "random", "trained" or `FEW_HEADS`, is kept."""
    name = kind if hidden_size == HIDDEN else f"{kind}-{hidden_size}"
    return paths.cache() / "kernel-nano" / name


def add_hidden_size(parser: argparse.ArgumentParser) -> None:
    """`--hidden-size` of what writes a checkpoint."""
    parser.add_argument(
        "--hidden-size", type=int, choices=(HIDDEN, DEEPEP_HIDDEN), default=HIDDEN,
        help=f"{DEEPEP_HIDDEN} is the least that DeepEP moves (default: %(default)s)",
    )  # fmt: skip


def digest(path: str | Path) -> str:
    """SHA-256 of a checkpoint's configuration and weights, the first 16 digits."""
    found = hashlib.sha256()
    for name in ("config.json", WEIGHTS):
        found.update((Path(path) / name).read_bytes())
    return found.hexdigest()[:16]


def is_trained(path: str | Path) -> bool:
    """Whether the checkpoint has a record of its training. Raises DamagedCheckpoint where it speaks of another."""
    record = Path(path) / RECORD
    if not record.is_file():
        return False
    stated = json.loads(record.read_text())["sha256"]
    if (found := digest(path)) != stated:
        raise DamagedCheckpoint(f"{path}: {RECORD} states hash {stated}, it is {found}; remove it and train again")
    return True


def best(hidden_size: int = HIDDEN) -> Path:
    """The trained checkpoint, or else the random one, which may be yet to be written."""
    path = cached("trained", hidden_size)
    return path if (path / RECORD).is_file() else cached("random", hidden_size)


def to_be_made(path: str | Path) -> int | None:
    """Hidden size of the random checkpoint that `path` names and that is not there yet; None for any other path."""
    for hidden_size in (HIDDEN, DEEPEP_HIDDEN):
        if Path(path) == cached("random", hidden_size) and not (Path(path) / WEIGHTS).is_file():
            return hidden_size
    return None


def provide(path: str | Path) -> None:
    """Write the random checkpoint, in seconds, if it is what `path` names and is not there."""
    if hidden_size := to_be_made(path):
        command = [sys.executable, "-m", "pdkit", "model", "kernel-random", "--hidden-size", str(hidden_size)]
        subprocess.run(command, check=True)
