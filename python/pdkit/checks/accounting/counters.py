"""What the servers count: requests, KV transfers, tokens; and whether that is what the clients asked for.

It shows what no client can see: a request that was served twice, a KV transfer that failed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pdkit.checks.accounting.ledger import ClientAccount
from pdkit.checks.judgement import Judgement
from pdkit.checks.server_info import read_server_info
from pdkit.core.processes import wait_until


@dataclass(frozen=True)
class ServerCounters:
    """What the servers of one role did since they started, and how much they hold now (`rooms`, `running`)."""

    requests: int = 0
    sent: int = 0
    received: int = 0
    failed: int = 0
    bytes: int = 0
    prefill_tokens: int = 0
    rooms: int = 0
    running: int = 0

    HELD_NOW = ("rooms", "running")

    def __add__(self, other: "ServerCounters") -> "ServerCounters":
        return ServerCounters(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def since(self, earlier: "ServerCounters") -> "ServerCounters":
        """The difference; what is held now stays as it is."""
        return ServerCounters(
            **{
                each.name: getattr(self, each.name) - (0 if each.name in self.HELD_NOW else getattr(earlier, each.name))
                for each in fields(self)
            }
        )

    @property
    def is_idle(self) -> bool:
        return self.rooms == self.running == 0


def running_of(info: Mapping[str, Any]) -> int:
    """Requests that a server has, by what it answers to `/server_info`."""
    return sum(state.get("running_requests", 0) for state in info.get("internal_states", ()))


def counters_of(info: Mapping[str, Any]) -> ServerCounters | None:
    """The counters in what a server answers to `/server_info`; None where the engine does not offer them."""
    if not {"engine", "transfer", "rooms"} <= info.keys():
        return None
    return ServerCounters(
        requests=info["engine"]["requests"],
        prefill_tokens=info["engine"]["prefill_tokens"],
        rooms=info["rooms"],
        running=running_of(info),
        **{name: info["transfer"][name] for name in ("sent", "received", "failed", "bytes")},
    )


def total_of(infos: Iterable[Mapping[str, Any]]) -> ServerCounters | None:
    """Sum over servers, by what each answers to `/server_info`; None where one does not offer counters, or none is."""
    each = [counters_of(info) for info in infos]
    known = [counters for counters in each if counters]
    return sum(known, ServerCounters()) if known and len(known) == len(each) else None


def still_held(urls: Iterable[str], seconds: float) -> dict[str, tuple[int, int]]:
    """(rooms, running requests) by URL that servers hold after `seconds`; nothing once all are idle, or do not count.

    Raises ServerInfoError.
    """
    held: dict[str, tuple[int, int]] = {}

    def are_idle() -> bool:
        infos = {url: read_server_info(url, max(seconds, 30)) for url in urls}  # a busy one may take as long
        held.clear()
        held.update({url: (info["rooms"], running_of(info)) for url, info in infos.items() if "rooms" in info})
        return not any(map(any, held.values()))

    return {} if wait_until(are_idle, seconds) else held


@dataclass(frozen=True)
class PairCounters:
    """The counters of all prefill and of all decode servers behind one load balancer."""

    prefill: ServerCounters
    decode: ServerCounters

    def since(self, earlier: "PairCounters") -> "PairCounters":
        return PairCounters(self.prefill.since(earlier.prefill), self.decode.since(earlier.decode))

    @property
    def is_idle(self) -> bool:
        return self.prefill.is_idle and self.decode.is_idle


def settled(infos: Callable[[], Iterable[Iterable[Mapping[str, Any]]]], settle: float) -> PairCounters | None:
    """The counters in what `infos()` says of all prefill and all decode servers; see `read_pair`."""
    found: list[PairCounters | None] = []

    def at_rest() -> bool:
        prefill, decode = map(total_of, infos())
        found.append(PairCounters(prefill, decode) if prefill and decode else None)
        return found[-1] is None or found[-1].is_idle

    wait_until(at_rest, settle)
    return found[-1]


def read_pair(prefill_urls: Sequence[str], decode_urls: Sequence[str], settle: float = 0.0) -> PairCounters | None:
    """The counters once nothing runs any more, after `settle` seconds at the latest; None where not offered.

    A request that was sent twice, or that its client left, may run on after the last answer.
    """
    return settled(
        lambda: [[read_server_info(url, 10) for url in urls] for urls in (prefill_urls, decode_urls)], settle
    )


@dataclass(frozen=True)
class TransferAccount(Judgement):
    """What the servers did against what was asked of them: each sequence prefilled, transferred and decoded once.

    did       None where the engine does not count
    answered  sequences that the client has answers for; sent: all that it asked for, failed attempts included
    """

    did: PairCounters | None
    answered: int
    sent: int

    @property
    def problems(self) -> tuple[str, ...]:
        if self.did is None:
            return ()
        prefill, decode = self.did.prefill, self.did.decode
        asked = f"{self.answered}" if self.answered == self.sent else f"{self.answered} to {self.sent}"
        found = [
            f"{what} {count}, the client asked for {asked} sequences"
            for what, count in (
                ("prefill started", prefill.requests),
                ("decode started", decode.requests),
                ("KV transfers sent by prefill", prefill.sent),
                ("KV transfers received by decode", decode.received),
            )
            if not self.answered <= count <= self.sent
        ]
        failed = max(prefill.failed, decode.failed)
        if failed > self.sent - self.answered:
            found.append(
                f"{failed} KV transfers failed (prefill saw {prefill.failed}, decode {decode.failed}), "
                f"but only {self.sent - self.answered} sequences of the client did"
            )
        if decode.prefill_tokens:
            found.append(f"decode prefilled {decode.prefill_tokens} tokens itself")
        if not self.did.is_idle:
            found.append(
                f"still held when all was answered: {prefill.rooms} rooms and {prefill.running} requests on prefill, "
                f"{decode.running} requests on decode"
            )
        return tuple(found)

    def report(self) -> str:
        if self.did is None:
            return "servers: not checked, this engine's /server_info has no counters of requests and KV transfers"
        prefill, decode = self.did.prefill, self.did.decode
        verdict = "FAIL" if self.problems else "PASS"
        lines = [
            f"servers: {verdict}, prefill started {prefill.requests} and sent {prefill.sent}"
            f", decode received {decode.received} and started {decode.requests}"
            f", KV transfers failed: {prefill.failed} on prefill, {decode.failed} on decode"
        ]
        return "\n".join(lines + [f"  {problem}" for problem in self.problems])


@dataclass(frozen=True)
class RequestAccount(Judgement):
    """Client and servers together; what a test did by itself, passed or not, is told apart from it."""

    client: ClientAccount
    kv_transfer: TransferAccount
    own_result: str = "passed"

    @property
    def problems(self) -> tuple[str, ...]:
        return self.client.problems + self.kv_transfer.problems

    def report(self) -> str:
        own = f"the test by itself: {self.own_result}"
        if self.client.lost:
            own += f" (of what it scored, {self.client.lost} requests had no answer)"
        verdict = f"request accounting: {'PASS' if self.passed else 'FAIL'}"
        return "\n".join((verdict, self.client.report(), self.kv_transfer.report(), own))
