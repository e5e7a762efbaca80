"""The fault library: each fault does what its name says, where it says, and changes something unless it says not."""

import asyncio
import contextlib
import os
import re
import socket
import unittest
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from cases import FolderCase
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.paths import ASSETS
from pdkit.engine import state
from pdkit.engine.model_runner import ModelRunner
from pdkit.engine.transfer import DecodeReceiver, KVTransfer, PrefillSender, TransferError, load_backend
from pdkit.faults import ground_truth, messages, pieces
from pdkit.faults.fault import Injection, Where, same_beginning
from pdkit.faults.lb_faults import BalancerFaultChecks
from pdkit.faults.library import LIBRARY
from pdkit.faults.pieces import Kind
from pdkit.faults.switch import VARIABLE, Switch, UnknownFault
from pdkit.models.cpu.model import load_config, load_model

register_cpu_ci(est_time=9, suite="stage-a-test-cpu")

RANDOM = ASSETS / "random-dsv4"

torch.set_num_threads(1)
config = load_config(RANDOM)
config.dtype = torch.float32


def kv_transfer_of(length, room=0, seed=0):
    """A KV transfer of `length` tokens whose tensors are random, of the shapes that the model's have."""
    draw = torch.Generator().manual_seed(seed)
    shapes, counts = state.expected(config, length)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return KVTransfer(room, length, 5, 0, counts, tensors, first_logprob=-1.5, first_top_logprobs=[(-1.5, 5)])


def changed_by(name, kv_transfer, *earlier):
    """What the fault makes of `kv_transfer` after it saw `earlier`."""
    injection = Injection(LIBRARY[name])
    for each in earlier:
        injection.apply(each)
    return injection.apply(kv_transfer)


def changed_kinds(one, other):
    """Kinds of the pieces in which two KV transfers differ."""
    names = one.tensors.keys() | one.counts.keys()

    def differs(name):
        if name in one.counts:
            return one.counts[name] != other.counts.get(name)
        return name not in other.tensors or not torch.equal(one.tensors[name], other.tensors[name])

    return {pieces.kind_of(name, names) for name in names if differs(name)}


class TestLibrary(unittest.TestCase):
    def test_names_real_bugs(self):
        for number in ("24878", "35494"):
            self.assertTrue([fault.name for fault in LIBRARY.values() if number in fault.resembles], number)

    def test_names_are_words(self):
        for name, fault in LIBRARY.items():
            self.assertEqual(name, fault.name)
            self.assertRegex(name, r"^[a-z0-9]+(-[a-z0-9]+)*$")
            self.assertTrue(fault.what)


class TestKinds(unittest.TestCase):
    def test_each_piece_of_the_state_has_one(self):
        shapes, counts = state.expected(config, 300)
        names = shapes.keys() | counts.keys()
        self.assertEqual({pieces.kind_of(name, names) for name in names}, set(Kind))
        self.assertIs(pieces.kind_of("layers.2.compressor.compressed_kv", names), Kind.C128_COMPRESSED)
        self.assertIs(pieces.kind_of("layers.1.compressor.compressed_kv", names), Kind.C4_COMPRESSED)

    def test_rows_of_the_newest_tokens_are_those_that_a_shorter_prompt_lacks(self):
        for length in (1, 3, 4, 5, 33, 127, 128, 129, 300):
            for tokens in (1, 4, 16):
                full, short = (state.expected(config, size)[0] for size in (length, max(0, length - tokens)))
                for name in full:
                    kind = pieces.kind_of(name, full)
                    if "compressed" in kind.value:
                        lost = full[name][-2] - short[name][-2]
                        self.assertEqual(pieces.rows_of_newest(kind, length, tokens), lost, (name, length, tokens))


class TestOperations(unittest.TestCase):
    rows = torch.arange(1.0, 13.0).view(1, 4, 3)

    def test_rows(self):
        other = -torch.ones(1, 2, 3)
        for what, found, first in (
            ("shifted loses the newest", pieces.shifted(self.rows), [1, 1, 4, 7]),
            ("the newest is lost", pieces.newest_lost(self.rows, 1), [1, 4, 7, 0]),
            ("more are lost than there are", pieces.newest_lost(self.rows, 9), [0] * 4),
            ("cut", pieces.cut(self.rows, 3), [1]),
            ("overlaid takes the rows that both have", pieces.overlaid(other, self.rows), [-1, -1, 7, 10]),
            ("overlaid by more", pieces.overlaid(self.rows, other), [1, 4]),
        ):
            with self.subTest(what):
                self.assertEqual(found[0, :, 0].tolist(), first)
        self.assertEqual(pieces.cut(self.rows, 9).shape, (1, 0, 3))
        self.assertTrue(torch.equal(pieces.overlaid(None, self.rows), self.rows))

    def test_bits_are_flipped_at_the_rate_named(self):
        tensor = torch.randn(1, 500, 64, generator=torch.Generator().manual_seed(0))
        for rate, bits in ((1e-3, 32), (1e-2, 32), (1e-3, 23)):
            flipped = pieces.bits_flipped(tensor, np.random.default_rng(0), rate, bits)
            xor = tensor.numpy().view(np.uint32) ^ flipped.numpy().view(np.uint32)
            share = np.unpackbits(xor.view(np.uint8)).sum() / (tensor.numel() * bits)
            self.assertAlmostEqual(share / rate, 1, delta=0.1)
            if bits == 23:
                self.assertFalse((xor >> 23).any(), "only mantissa bits")

    def test_rounding_keeps_what_the_format_can_hold(self):
        tensor = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0)) * 1000
        for dtype, relative in ((torch.bfloat16, 2**-8), (torch.float8_e4m3fn, 2**-4)):
            rounded = pieces.rounded(tensor, dtype)
            self.assertFalse(torch.equal(rounded, tensor))
            self.assertTrue(((rounded - tensor).abs() <= relative * tensor.abs() + 1e-3 * tensor.abs().max()).all())

    def test_nothing_is_written_into_the_state_itself(self):
        kv_transfer = kv_transfer_of(129)
        copies = {name: tensor.clone() for name, tensor in kv_transfer.tensors.items()}
        for fault in LIBRARY.values():
            if fault.change:
                with contextlib.suppress(TransferError):
                    Injection(replace(fault, every=1)).apply(kv_transfer)
        self.assertTrue(all(torch.equal(copies[name], tensor) for name, tensor in kv_transfer.tensors.items()))


class TestFaults(unittest.TestCase):
    def test_of_a_kind_touch_that_kind_only(self):
        kv_transfer, before = kv_transfer_of(391), kv_transfer_of(391, seed=1)
        of_a_kind = re.compile("(.+)-(missing|zeroed|left-over|shifted|one-more|zero)")
        kinds = {kind.value.replace(" ", "-"): kind for kind in Kind}
        touched = set()
        for name in LIBRARY:
            match = of_a_kind.fullmatch(name)
            if match and match[1] in kinds:
                changed = changed_by(name, kv_transfer, before)
                self.assertEqual(changed_kinds(kv_transfer, changed), {kinds[match[1]]}, name)
                touched.add(kinds[match[1]])
        self.assertEqual(touched, set(Kind))

    def test_that_keep_the_shape_pass_the_checks_of_decode(self):
        kv_transfer, before = kv_transfer_of(391), kv_transfer_of(200, seed=1)
        for name, fault in LIBRARY.items():
            if fault.where is Where.DECODE:
                changed = changed_by(name, kv_transfer, before)
                state.check(config, 391, changed.tensors, changed.counts)

    def test_left_over_is_what_the_request_before_had_or_nothing(self):
        one, other = kv_transfer_of(391), kv_transfer_of(200, seed=1)
        changed = changed_by("4x-compressed-left-over", one, other).tensors["layers.1.compressor.compressed_kv"]
        before = other.tensors["layers.1.compressor.compressed_kv"]
        self.assertTrue(torch.equal(changed[:, :50], before))
        self.assertFalse(changed[:, 50:].any())
        self.assertFalse(changed_by("window-left-over", one).tensors["layers.0.window"].any())

    def test_aliases_only_requests_that_share_a_beginning(self):
        one, other, stranger = kv_transfer_of(391), kv_transfer_of(391, seed=1), kv_transfer_of(391, seed=2)
        name = "layers.1.compressor.compressed_kv"
        other.tensors[name][:, :20] = one.tensors[name][:, :20]
        self.assertIs(same_beginning(one, [other, stranger]), other)
        self.assertIsNone(same_beginning(one, [one, stranger]), "the same prompt is no other request")
        changed = changed_by("compressed-aliased", one, other, stranger)
        self.assertEqual(changed_kinds(one, changed), set(pieces.COMPRESSED))
        self.assertTrue(torch.equal(changed.tensors[name], other.tensors[name]))
        self.assertIs(changed_by("compressed-aliased", one, stranger), one)

    def test_meet_one_request_in_so_many(self):
        injection = Injection(LIBRARY["transfer-fails-one-in-ten"])
        failed = []
        for room in range(40):
            try:
                injection.apply(kv_transfer_of(1, room))
            except TransferError:
                failed.append(room)
        self.assertEqual(failed, [9, 19, 29, 39])
        self.assertEqual((injection.seen, injection.met), (40, 4))

    def test_are_the_same_in_each_run(self):
        one, other = (changed_by("bits-flipped-1e-3", kv_transfer_of(129)) for _ in range(2))
        for name, tensor in one.tensors.items():
            self.assertTrue(torch.equal(tensor.view(torch.int32), other.tensors[name].view(torch.int32)))


class SwitchCase(FolderCase):
    def setUp(self):
        super().setUp()
        self.switch = Switch(self.root / "switch")


class TestSwitch(SwitchCase):
    def test_turns_faults_on_and_off_in_other_readers(self):
        reader = Switch(self.switch.path)
        self.assertIsNone(reader.injection(*Where))
        self.switch.turn("window-zeroed")
        self.assertEqual(reader.injection(*Where).fault.name, "window-zeroed")
        self.assertIsNone(reader.injection(Where.LB), "it acts elsewhere")
        self.switch.turn(None)
        self.assertIsNone(reader.injection(*Where))

    def test_a_turn_begins_a_new_run(self):
        self.switch.turn("window-zeroed")
        first = self.switch.injection(*Where)
        self.assertIs(first, self.switch.injection(*Where))
        self.switch.record()
        self.assertEqual(self.switch.met(), 1)
        self.switch.turn("window-zeroed")
        self.assertIsNot(first, self.switch.injection(*Where))
        self.assertEqual(self.switch.met(), 0)

    def test_names_the_nearest_of_an_unknown_fault(self):
        with self.assertRaisesRegex(UnknownFault, "unknown fault 'windowzeroed'; nearest known: window-zeroed"):
            self.switch.turn("windowzeroed")

    def test_must_be_named(self):
        with mock.patch.dict(os.environ), self.assertRaisesRegex(ValueError, VARIABLE):
            os.environ.pop(VARIABLE, None)
            load_backend("pdkit.faults.transfer:FaultyTransfer")


class TestFaultyTransfer(SwitchCase):
    """Two backends with one switch, and the engine's own sender and receiver between them."""

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.dict(os.environ, {VARIABLE: str(self.switch.path)}))

    def transferred(self, *kv_transfers):
        """What arrives of each, or the error, through one pair of servers."""
        return asyncio.run(self._transferred(kv_transfers))

    async def _transferred(self, kv_transfers):
        sender = PrefillSender(load_backend("pdkit.faults.transfer:FaultyTransfer"), 1, 0.3)
        receiver = DecodeReceiver(load_backend("pdkit.faults.transfer:FaultyTransfer"), 2)
        sock = socket.create_server(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        await sender.start(sock)

        def accept(got):
            state.check(config, got.prompt_tokens, got.tensors, got.counts)

        arrived = []
        for kv_transfer in kv_transfers:
            await sender.open(kv_transfer.room)
            fetching = asyncio.create_task(receiver.fetch("127.0.0.1", port, kv_transfer.room, accept))
            try:
                await sender.deliver(kv_transfer)
            except TransferError:
                sender.close(kv_transfer.room, "failed")
            arrived += await asyncio.gather(fetching, return_exceptions=True)
        sender._server.close()
        return arrived

    def test_without_a_fault_is_the_plain_backend(self):
        kv_transfer = kv_transfer_of(33)
        (arrived,) = self.transferred(kv_transfer)
        self.assertEqual(changed_kinds(kv_transfer, arrived), set())
        self.assertEqual(self.switch.met(), 0)

    def test_injects_at_each_place(self):
        kv_transfers = [kv_transfer_of(33, room, seed=room) for room in range(2)]
        for name, kinds in (
            ("rounded-to-bf16", set(pieces.TENSORS) - {Kind.C128_COMPRESSED}),
            ("window-shifted", {Kind.WINDOW}),
            ("4x-count-one-more", {Kind.C4_COUNT}),
        ):
            self.switch.turn(name)
            for sent, arrived in zip(kv_transfers, self.transferred(*kv_transfers), strict=True):
                self.assertEqual(changed_kinds(sent, arrived), kinds, name)
            self.assertEqual(self.switch.met(), 2)

    def test_what_decode_can_tell_is_refused(self):
        for name, error in (
            ("wire-corrupted", "checksum mismatch"),
            ("window-missing", "tensor layers.0.window is missing"),
            ("4x-count-missing", "count layers"),
            ("newest-1-cut", "tensor layers"),
            ("transfer-fails", "bootstrap room 0"),
        ):
            self.switch.turn(name)
            (arrived,) = self.transferred(kv_transfer_of(33))
            self.assertIsInstance(arrived, TransferError, name)
            self.assertIn(error, str(arrived))

    def test_a_kv_transfer_that_is_never_sent_ends_with_the_timeout(self):
        self.switch.turn("transfer-hangs-one-in-twenty")
        arrived = self.transferred(*(kv_transfer_of(1, room) for room in range(20)))
        self.assertEqual([type(each) for each in arrived], [KVTransfer] * 19 + [TransferError])
        self.assertEqual(self.switch.met(), 1)


class TestMessages(unittest.TestCase):
    def test_sampling_parameters_are_lost_from_each_form_of_request(self):
        one = {"text": "a", "sampling_params": {"temperature": 0, "stop": "x"}}
        self.assertEqual(messages.without(one, ("temperature",)), {"text": "a", "sampling_params": {"stop": "x"}})
        many = {"sampling_params": [{"temperature": 0}, {"top_p": 1}]}
        self.assertEqual(messages.without(many, ("temperature",)), {"sampling_params": [{}, {"top_p": 1}]})
        completion = {"prompt": "a", "temperature": 0, "stop": ["x"]}
        self.assertEqual(messages.without(completion, ("temperature",)), {"prompt": "a", "stop": ["x"]})

    def test_the_first_token_comes_twice(self):
        def first_text(text):
            return re.match(r"\s*\w+", text)[0]

        native = {"text": " a b", "output_ids": [3, 4], "meta_info": {"output_token_logprobs": [[-1, 3], [-2, 4]]}}
        twice = messages.first_token_repeated(native, first_text)
        self.assertEqual(twice["text"], " a a b")
        self.assertEqual(twice["output_ids"], [3, 3, 4])
        self.assertEqual(twice["meta_info"]["output_token_logprobs"], [[-1, 3], [-1, 3], [-2, 4]])
        completion = {"choices": [{"text": "1 2"}, {"text": ""}]}
        twice = messages.first_token_repeated(completion, first_text)
        self.assertEqual([choice["text"] for choice in twice["choices"]], ["11 2", ""])

    def test_two_at_a_time_are_swapped_and_one_alone_keeps_its_own(self):
        async def three():
            exchange = messages.Exchange()
            return await asyncio.gather(*(exchange.swap(name) for name in "abc"))

        with mock.patch.object(messages, "PARTNER_TIMEOUT_S", 0.01):
            self.assertEqual(asyncio.run(three()), ["b", "a", "c"])


class TestBesideKit(unittest.TestCase):
    """The mixin that asks a pair of any engine through a faulty balancer; `sees` says which check sees which fault."""

    harmful = {
        name: ["parity rooms"]
        for name in BalancerFaultChecks.balancer_faults
        if not LIBRARY[name].harmless and name not in BalancerFaultChecks.unseen_faults
    }

    def ask(self, sees, breaks=None):
        """Raises AssertionError where the mixin's test fails. A server is broken from the fault `breaks` on."""
        rounds, turned = {"parity rooms": 1, "parity request parameters": 2}, []

        class Case(BalancerFaultChecks, unittest.TestCase):
            lb_url = prefill_url = decode_url = model = monolithic_url = gsm8k_data_path = None
            start_decode = log_path = None
            base_host, faulty_lb_port = "127.0.0.1", "1"
            switch = mock.Mock(turn=turned.append, met=lambda: turned[-1] is not None)
            wait_server_ready, fault_timeout = mock.Mock(), 0
            parity_plan = lambda self: mock.Mock(rooms=(rounds["parity rooms"],))  # noqa: E731
            parameter_round = lambda self: (None, rounds["parity request parameters"])  # noqa: E731

            def seen(self, url, round_):
                check = next(name for name in rounds if rounds[name] == round_)
                return "why" if breaks and breaks in turned or check in sees.get(turned[-1], ()) else None

        with mock.patch("builtins.print"):
            Case("test_seeded_faults_of_the_load_balancer").test_seeded_faults_of_the_load_balancer()

    def test_all_is_seen_that_should_be(self):
        self.ask(self.harmful)

    def test_what_it_fails_for(self):
        for name, checks in (("stop-lost", []), ("prefill-late", ["parity rooms"])):
            with self.subTest(fault=name, seen=checks), self.assertRaisesRegex(AssertionError, name):
                self.ask(self.harmful | {name: checks})

    def test_a_server_that_broke_is_no_fault_seen(self):
        with self.assertRaisesRegex(AssertionError, "after answers-swapped"):
            self.ask(self.harmful, breaks="answers-swapped")


class TestGroundTruth(unittest.TestCase):
    """On the random model; lengths at which each kind of state is read while a few tokens are decoded."""

    @classmethod
    def setUpClass(cls):
        cls.runner = ModelRunner(load_model(RANDOM, load_format="dummy", seed=7))
        lengths = (96, 127, 142, 255, 257, 383)
        cls.runs = ground_truth.sound_runs(cls.runner, ground_truth.prompt_family(lengths, config.vocab_size))
        of_transfer = [fault for fault in LIBRARY.values() if fault.is_of_the_transfer]
        faults = [replace(fault, every=min(fault.every, 3), after=0) for fault in of_transfer]
        cls.effects = ground_truth.effects(cls.runner, faults, cls.runs)

    def test_a_fault_changes_something_unless_it_says_why_not(self):
        self.assertGreater(len(self.effects), 70)
        for name, effects in self.effects.items():
            self.assertEqual(any(effect.changes for effect in effects), not LIBRARY[name].harmless, name)

    def test_buffers_are_empty_where_a_prompt_ends_with_an_entry(self):
        for effects in (self.effects["4x-buffers-zeroed"], self.effects["indexer-buffers-zeroed"]):
            self.assertFalse(any(effect.changes for effect in effects if effect.length % 4 == 0))

    def test_the_same_kv_transfer_gives_the_same_logits(self):
        run = self.runs[0]
        logits = ground_truth._decode(self.runner, [run.kv_transfer] * 2, run.tokens, len(run.logits))
        self.assertTrue(torch.equal(logits[0], run.logits) and torch.equal(logits[1], run.logits))


if __name__ == "__main__":
    unittest.main()
