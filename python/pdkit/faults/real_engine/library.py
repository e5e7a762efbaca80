"""The faults of a transfer by the real engine, by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdkit.faults.pieces import COMPRESSED, Kind
from pdkit.faults.real_engine.blocks import CANARY, DRAFT_WINDOW, FIRST_DRAFT, Change, from_before, half, lost, swapped

SLOW_S, LATE_S = 0.02, 0.25
FAILING_POLLS = "0.001"
POOLS = tuple(kind.value for kind in COMPRESSED)
BUFFERS = tuple(kind.value for kind in (Kind.C4_BUFFERS, Kind.INDEXER_BUFFERS, Kind.C128_BUFFERS))


@dataclass(frozen=True)
class TransferFault:
    """A named fault.

    change       of the blocks that are asked for
    delay        seconds before anything is written
    early        the transfer is reported as done before that; but metadata come at once, for which SGLang's decode
                 waits whatever is reported, see `DecodeTransferQueue._poll_with_metadata_gate` of 0.5.17
    environment  variables that SGLang's servers see meanwhile: its own switches for tests
    resembles    a bug of the field that had this shape
    harmless     why it changes no logit, token or status
    """

    name: str
    what: str
    change: Change | None = None
    delay: float = 0.0
    early: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    resembles: str = ""
    harmless: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.what}" + (f" [{self.resembles}]" if self.resembles else "")


SKIPPED = "SGLang 24878: one backend skipped it"
WITH_CANARY = "window-skipped", "window-of-the-request-before"  # need servers with --kv-canary

WINDOW = Kind.WINDOW.value

LIBRARY: dict[str, TransferFault] = {
    fault.name: fault
    for fault in (
        TransferFault("transfer-slow", f"each transfer begins {SLOW_S * 1000:.0f} ms later", delay=SLOW_S,
                      harmless="decode waits for it, for much longer than that"),
        TransferFault("window-lost", "the window is never written", lost(WINDOW), resembles=SKIPPED),
        *(
            TransferFault(f"{kind.slug}-lost", f"{kind.value}: never written", lost(kind.value), resembles=SKIPPED)
            for kind in COMPRESSED
        ),
        TransferFault("window-skipped", "neither the window nor what the canary keeps of it is written",
                      lost(WINDOW, DRAFT_WINDOW, CANARY), resembles=SKIPPED),
        TransferFault("window-of-the-request-before", "window and canary are read where the request before had its own",
                      from_before(WINDOW, DRAFT_WINDOW, CANARY)),
        TransferFault("buffers-lost", "what compressors hold of unfinished entries is never written", lost(*BUFFERS)),
        TransferFault("draft-window-lost", "the window of the draft is never written", lost(DRAFT_WINDOW)),
        TransferFault("first-draft-lost", "decode verifies the first draft of another request", lost(*FIRST_DRAFT)),
        TransferFault("first-token-lost", "decode goes on after the first token of another request",
                      lost("first token")),
        TransferFault("pages-halved", "the second half of each page of compressed entries is lost", half(*POOLS)),
        TransferFault("pages-swapped", "the first two pages of all compressed entries change places", swapped(*POOLS)),
        TransferFault("pages-of-the-request-before", "compressed entries are read where the request before had its own",
                      from_before(*POOLS), resembles="SGLang 35494"),
        TransferFault("reported-early", f"done is said {LATE_S * 1000:.0f} ms before pages and states are written",
                      delay=LATE_S, early=True),
        TransferFault("polls-fail", f"a poll of a transfer fails with probability {FAILING_POLLS}",
                      environment={"SGLANG_TEST_DISAGG_FAILURE_PROB": FAILING_POLLS}),
    )
}  # fmt: skip
