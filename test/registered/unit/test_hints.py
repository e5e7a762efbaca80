"""Where a hint sends the reader, fault by fault of the library, on what each of them did to real requests.

`hint_evidence.json` holds [prompt tokens, first output token that differs or null] of each request that was answered;
`python3 test_hints.py --record` makes it anew (2 minutes).
"""

import json
import sys
import unittest
from pathlib import Path

import pdkit
from pdkit.checks.hints import ComparedRequest, Evidence, hint
from pdkit.core.ci_register import register_cpu_ci

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

RECORDED = Path(__file__).with_name("hint_evidence.json")
LENGTHS = (1, 3, 4, 5, 31, 32, 33, 96, 127, 128, 129, 142, 255, 256, 257, 301, 391)
BOUNDARIES = {
    "4x compressor": 4,
    "128x compressor": 128,
    "sliding window": 32,
    "prefill chunk": 128,
    "page of the prefix cache": 128,
    "indexer": 64,
}
EVERYTHING = "what every transfer has"
# Beginning of a fault's name -> what its hint must name, if there is one; the first that fits counts.
PARTS = {
    "4x-": "4x compressor",
    "128x-": "128x compressor",
    "indexer-": "the indexer",
    "window-": "sliding window",
    "first-": "first output token",
    "one-worker-in-four": "one of 4 workers",
    "stale-prefix": "prefix",
    "compressed-aliased": "prefix",
    "": EVERYTHING,
}
HARMLESS = "length-behind-first-layer-one-more"


def tokens_of(length):
    """Of the answer: past the next entry of the longest compressor where that is near."""
    near = -length % 128 + 4
    return (near if 12 < near <= 40 else 12) + 1


def evidence_of(rows):
    requests = (
        ComparedRequest(f"random-{n}", n, tokens=tokens_of(n), logprob=first, size=float(first is not None))
        for n, first in rows
    )
    return Evidence("alone", tuple(requests), BOUNDARIES)


class TestFaults(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        recorded = json.loads(RECORDED.read_text())
        cls.hints = {fault: hint([evidence_of(rows)]) for fault, rows in recorded.items()}
        cls.differing = [fault for fault, rows in recorded.items() if any(first is not None for _, first in rows)]

    def test_no_hint_names_a_wrong_part(self):
        rows = []
        for fault in self.differing:
            found = self.hints[fault]
            part = next(part for begins, part in PARTS.items() if fault.startswith(begins))
            verdict = "silent" if found is None else "right" if part in found else "wrong"
            if found and verdict == "wrong" and "look at" not in found:
                verdict = "no part"  # what it says of lengths is true, and that is all
            rows.append((verdict, fault, found))
        print(*(f"{verdict:<8} {fault:<32} {found or ''}" for verdict, fault, found in rows), sep="\n")
        count = {verdict: sum(row[0] == verdict for row in rows) for verdict in ("right", "no part", "silent", "wrong")}
        print(count, flush=True)
        self.assertEqual([row for row in rows if row[0] == "wrong"], [])
        self.assertGreaterEqual(count["right"], 40)

    def test_what_changes_no_answer_gives_none(self):
        self.assertIsNone(self.hints[HARMLESS])
        self.assertEqual({fault for fault, found in self.hints.items() if found and fault not in self.differing}, set())


def compared(name="r", prompt=10, **more):
    return ComparedRequest(name, prompt, tokens=8, **more)


def wrong(name="r", prompt=10, **more):
    return compared(name, prompt, logprob=1, size=0.5, **more)


def round_(condition, *requests):
    return Evidence(condition, requests, BOUNDARIES)


ALONE = round_("alone", *(compared(f"r-{n}", n) for n in (1, 40, 130)))


class TestPatterns(unittest.TestCase):
    def test_nothing_differs(self):
        self.assertIsNone(hint([ALONE]))
        self.assertIsNone(hint([]))

    def test_each_pattern_is_named(self):
        cached = [wrong("a", 200, in_flight=4, cached=128), compared("b", 200, in_flight=4)]
        first = round_("requests from 1 on", compared("length-5", 5), compared("length-257", 257))
        again = [compared("length-5", 5), wrong("length-257", 257, cached=256)]
        late = [compared("length-5", 5), wrong("length-257", 257)]
        shared = [wrong("a", in_flight=3), compared("b", in_flight=3)]
        few = round_("2 in flight", compared("a", in_flight=2), compared("b", in_flight=2))
        many = [wrong("a", in_flight=8), compared("b", in_flight=8)]
        parameters = [wrong("sampling_seed", in_flight=9), compared("top_p", in_flight=9)]
        rooms = [wrong(f"room-{n}", in_flight=8, answer_of=f"room-{n ^ 1}") for n in range(4)]
        firsts = [compared(f"r-{n}", n, token=0) for n in (1, 40, 130)]
        for says, before, condition, requests in (
            ("only prompts with a cached prefix", [ALONE], "prefix from prefill's cache", cached),
            ("only prompts with a cached prefix", [first], "requests from 3 on", again),
            ("answered right until number 3", [first], "requests from 3 on", late),
            ("only requests that share a prefix", [ALONE], "shared prefix, b after a", shared),
            ("only requests with 8 and more in flight", [ALONE, few], "8 in flight", many),
            ("only other request parameters show it (sampling_seed)", [ALONE], "request parameters", parameters),
            ("room-0 that of room-1", [ALONE], "rooms", rooms),
            ("the first output token is wrong already", [], "alone", firsts),
        ):
            with self.subTest(says, condition=condition):
                self.assertIn(says, hint([*before, round_(condition, *requests)]))

    def test_an_answer_that_is_its_own(self):
        rooms = [wrong(f"room-{n}", in_flight=8, answer_of=f"room-{n}") for n in range(4)]
        self.assertNotIn("another request's answer", hint([ALONE, round_("rooms", *rooms)]))

    def test_a_length_that_stands_for_nothing(self):
        requests = [(wrong if n >= 70 else compared)(f"r-{n}", n) for n in (1, 3, 10, 70, 90, 300)]
        found = hint([Evidence("alone", tuple(requests), {})])
        self.assertEqual(found, "only prompts of 70 tokens and more differ; up to 10 tokens all are right")

    def test_one_request_says_nothing_of_lengths(self):
        self.assertIsNone(hint([round_("alone", compared("a", 1), wrong("b", 130), compared("c", 140))]))

    def test_an_event_holds_it_all(self):
        evidence = round_("x", compared(), wrong("b", None, other=("text",), answer_of="r"), compared("c", 5, cached=3))
        self.assertEqual(Evidence.of_event(json.loads(json.dumps(evidence.as_event()))), evidence)


def record():
    """Runs each fault of the library on real prompts in this process."""
    import torch
    from pdkit.engine.model_runner import ModelRunner
    from pdkit.faults import ground_truth
    from pdkit.faults.library import LIBRARY
    from pdkit.models.cpu.model import load_model

    torch.set_num_threads(1)
    weights = Path(pdkit.__file__).parent / "assets" / "random-dsv4"
    runner = ModelRunner(load_model(weights, load_format="dummy", seed=1))
    sound = ground_truth.sound_runs(runner, ground_truth.prompt_family(LENGTHS, runner.config.vocab_size))
    faults = [fault for fault in LIBRARY.values() if fault.is_of_the_transfer]
    found = {}
    for start in range(0, len(faults), 16):
        found |= ground_truth.effects(runner, faults[start : start + 16], sound)
    lines = []
    for fault, effects in found.items():
        # decode's first step makes the second output token
        rows = [
            [each.length, 0 if each.reported else None if each.logits is None else each.logits + 1]
            for each in effects
            if each.status is None
        ]
        lines.append(f" {json.dumps(fault)}: {json.dumps(rows, separators=(',', ':'))}")
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        record()
    else:
        unittest.main()
