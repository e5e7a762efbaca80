"""Which known name was probably meant."""

from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Up to `limit` known names, most similar first; a word that resembles none of them gets an answer too."""
    from difflib import SequenceMatcher

    ratio = {name: SequenceMatcher(None, word.lower(), name.lower()).ratio() for name in known}
    return sorted(ratio, key=lambda name: (-ratio[name], name))[:limit]


def unknown(kind: str, word: str, known: Iterable[str], limit: int = 3) -> str:
    """One line that says that `word` is no known `kind`, and which ones come near."""
    near = nearest(word, known, limit)
    return f"unknown {kind} {word!r}; " + (f"nearest known: {', '.join(near)}" if near else f"no {kind} is known")
