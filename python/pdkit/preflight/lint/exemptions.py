"""Comments that say why a line is right though it breaks a rule."""

import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pdkit.core.suggest import unknown
from pdkit.preflight.finding import Finding, broken

RULE = "exemption"
_COMMENT = re.compile(r"#\s*lint:\s*allow\s+(?P<rule>[\w-]+)\s*(?::\s*(?P<reason>.*\S))?\s*")


@dataclass(frozen=True)
class Exemption:
    """`# lint: allow RULE: reason`, behind the code or alone on the line above it; `covers` is the line of the code."""

    line: int
    covers: int
    rule: str
    reason: str | None


def exemptions(text: str) -> Iterator[Exemption]:
    """The exemptions that a file states."""
    if not _COMMENT.search(text):  # most files: no need to split them into tokens
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        match = token.type == tokenize.COMMENT and _COMMENT.fullmatch(token.string)
        if match:
            line = token.start[0]
            is_alone = not token.line[: token.start[1]].strip()
            yield Exemption(line, line + is_alone, match["rule"], match["reason"])


def apply(path: Path, text: str, found: Iterable[Finding], rules: Iterable[str]) -> list[Finding]:
    """The findings that no exemption covers, and one for each exemption that is wrong or covers nothing."""
    known, open_findings = set(rules), sorted(set(found), key=lambda finding: finding.order)
    for exemption in exemptions(text):
        covered = {f for f in open_findings if (f.line, f.subject) == (exemption.covers, exemption.rule)}
        problem = None
        if exemption.rule not in known:
            problem = unknown("rule", exemption.rule, known)
        elif not exemption.reason:
            problem = f"`lint: allow {exemption.rule}` gives no reason; write `# lint: allow {exemption.rule}: REASON`"
        elif not covered:
            problem = f"nothing here breaks {exemption.rule}; remove the comment"
        else:
            open_findings = [f for f in open_findings if f not in covered]
        if problem:
            open_findings.append(broken(path, exemption.line, RULE, problem))
    return sorted(open_findings, key=lambda finding: finding.order)
