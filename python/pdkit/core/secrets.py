"""Keeping secrets of the environment out of what is written: logs, records, reports."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

REMOVED = "(removed)"
SHORTEST = 6  # a shorter value would be found in innocent text

_WORDS = {"KEY", "KEYS", "SECRETS", "PASS", "PWD", "PAT", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "AUTH", "COOKIE"}
_ENDS = ("TOKEN", "APIKEY", "SECRET", "PASSWORD", "PASSWD")
_NOT_SECRET = {"EMPTY", "none", "None", "dummy"}  # what clients of local servers say that need no key
_USERINFO = re.compile(r"""(?<=://)[^/?#\s"'<>,]+(?=@)""")


def is_secret(name: str) -> bool:
    """Whether a variable is one to hide, by the words of its name: HF_TOKEN is, ..._TOKENS_PER_RANK is not."""
    words = re.split(r"[^A-Z0-9]+", name.upper())
    return name != "PWD" and any(word in _WORDS or word.endswith(_ENDS) for word in words)


def redacted(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment by name, without values that are secret, and without secrets in the others."""
    return {name: REMOVED if is_secret(name) else cleaned(value, environ) for name, value in sorted(environ.items())}


def cleaned(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` without the secrets of the environment, and without user names and passwords in URLs."""
    for secret in secret_values(environ):
        text = text.replace(secret, REMOVED)
    return _USERINFO.sub(REMOVED, text)


def secret_values(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The texts that must not be written, longest first; those of several lines by line, all also as JSON has them."""
    values = {line.strip() for name, value in environ.items() if is_secret(name) for line in value.splitlines()}
    userinfos = {userinfo for value in environ.values() for userinfo in _USERINFO.findall(value)}
    values |= userinfos | {userinfo.partition(":")[2] for userinfo in userinfos}
    values |= {json.dumps(value)[1:-1] for value in values}
    return tuple(sorted((v for v in values - _NOT_SECRET if len(v) >= SHORTEST), key=len, reverse=True))


class Redactor:
    """Replaces `secrets` in a stream of bytes, also where a secret is cut in two."""

    def __init__(self, secrets: Iterable[str]):
        self._secrets = [secret.encode() for secret in secrets]
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What may be written now; no data ends the stream, and gives the rest."""
        is_end, data = not data, self._held + data
        for secret in self._secrets:
            data = data.replace(secret, REMOVED.encode())
        begun = (
            n for each in self._secrets for n in range(1, min(len(each), len(data) + 1)) if each.startswith(data[-n:])
        )
        held = 0 if is_end else max(begun, default=0)
        self._held = data[len(data) - held :]
        return data[: len(data) - held]


def scrub(directory: Path, secrets: Iterable[str]) -> list[Path]:
    """Replaces `secrets` in all files below `directory`; returns those that had some."""
    if not (secrets := list(secrets)):
        return []
    redactor, changed = Redactor(secrets), []
    for path in sorted(directory.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        content = path.read_bytes()
        clean = redactor.feed(content) + redactor.feed(b"")
        if clean != content:
            path.write_bytes(clean)
            changed.append(path)
    return changed
