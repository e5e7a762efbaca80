"""Each family of faults that is about a kind is caught by the check of that kind, in words that name it; see `pdkit.faults.kinds`.

And a pair without a fault passes them all, over thousands of requests.
"""

import re
import tempfile
import unittest
from pathlib import Path

import pdkit
from pdkit.core import events
from pdkit.core.ci_register import register_cpu_ci
from pdkit.faults.kinds import TESTS, families
from pdkit.faults.matrix.session import Session, Subject

register_cpu_ci(est_time=900, suite="stage-a-test-cpu", nightly=True)

SUBJECTS = Path(pdkit.__file__).parent / "faults" / "matrix" / "subjects.py"

# By the beginning of a fault's name: what its headline must say.
HEADLINES = {
    "newest-1-lost-after-": r"equal to the monolithic server's until request \d+",
    "decode-silent-": r"decode (answers no request|fetches nothing)",
    "prefill-silent-": r"prefill answers no request",
    "memory-kept-": r"memory of decode grows by \d+ KiB a request",
    "state-of-failed-rooms-kept": r"memory of prefill grows by \d+ KiB a request",
    "beyond-": r"length: prompts up to \d+ of \d+ tokens",
    "decode-computes-": r"decode did the work itself: prompts of [\d, ]+ tokens",
    "failed-receive-answered": r"a failed receive is answered",
    "usage-one-more": r"contradict themselves.*completion_tokens is",
    "cached-beyond-prompt": r"contradict themselves.*cached_tokens is",
    "reason-exchanged": r"contradict themselves|finish",
    "token-after-the-end": r"contradict themselves.*output_ids",
    "logprobs-one-less": r"contradict themselves.*logprobs",
    "stop-ignored-at-": r"the seam.*at token",
    "stream-piece-lost-": r"streams: FAIL, \d+ of \d+ do not equal",
    "retried-one-in-": r"latency has a second mode|prefill started",
    "aliased-within-": r"races: shared prefixes in flight",
    "": r"request parameters in pairs",
}


def headline_of(fault):
    return next(pattern for name, pattern in HEADLINES.items() if fault.startswith(name))


class TestDisaggregationDSV4Kinds(unittest.TestCase):
    def test_each_kind_is_caught_in_words_that_name_it(self):
        faults = [fault.name for fault in families()]
        self.assertEqual(len({test for tests in TESTS.values() for test in tests}), 11)
        rows, wrong = [], []
        with tempfile.TemporaryDirectory() as out:
            with Session([Subject("kinds", SUBJECTS, "Kinds", by_request=True)], Path(out, "logs")) as session:
                for fault in (None, *faults):
                    run = session.run(fault)
                    messages = [each.message for each in run.verdicts.values() if each.caught]
                    rows.append([fault or "no fault", run.met, ", ".join(run.caught_by), f"{run.seconds:.0f}"])
                    print(*rows[-1], *messages[:2], sep=" | ", flush=True)
                    if fault is None:
                        wrong += [f"no fault: {message}" for message in messages]
                    elif not run.met:
                        wrong.append(f"{fault}: it met no request")
                    elif not any(re.search(headline_of(fault), message) for message in messages):
                        wrong.append(f"{fault}: expected {headline_of(fault)!r}, got {messages}")
        events.table("faults by kind", ["fault", "met", "caught by", "seconds"], rows)
        self.assertFalse(wrong, "\n".join(wrong))


if __name__ == "__main__":
    unittest.main()
