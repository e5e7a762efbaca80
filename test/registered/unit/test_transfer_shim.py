"""Faults of a transfer, through the wrapped modules of both backends: bytes in prefill's memory, bytes in decode's."""

import json
import os
import subprocess
import sys
import time
import types
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from cases import FolderCase
from pdkit.checks import acceptance
from pdkit.checks.parity.plan import Round, generate_probe
from pdkit.core.ci_register import register_cpu_ci
from pdkit.faults import driver
from pdkit.faults.real_engine import backends, checks
from pdkit.faults.real_engine.blocks import Block, Memory, Regions, from_before, half, lost, pieces_of, swapped
from pdkit.faults.real_engine.library import LIBRARY
from pdkit.faults.switch import Switch, UnknownFault
from stub_server import StubServer

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")

RATIOS = (0, 4, 128)
PAGES, SIZE = 4, 8  # pages of a region, bytes of a page
POOLS, STATES = pieces_of(RATIOS)
METADATA = 10
MESSAGES = b"pools", b"metadata", b"states", b"128x", b"draft"
TARGET = 1_000_000


def region(number):
    return 1000 * (number + 1)


class Ram:
    """Bytes by address: prefill's regions hold what says whose they are, decode's are empty."""

    def __init__(self):
        self.bytes = {}
        for number in range(len(POOLS) + METADATA + len(STATES)):
            for at in range(PAGES * SIZE):
                self.bytes[region(number) + at] = (number, at)

    def copy(self, source, target, length):
        for at in range(length):
            self.bytes[target + at] = self.bytes.get(source + at)

    def written(self):
        return {address: byte for address, byte in self.bytes.items() if address >= TARGET}


class FakeEngine:
    ram = None

    def get_rpc_port(self):
        return 7

    def batch_register_memory(self, addresses, sizes):
        return 0

    def batch_transfer_sync_write(self, session, sources, targets, lengths):
        for block in zip(sources, targets, lengths):
            self.ram.copy(*block)
        return 0


class FakeAgent:
    ram = None

    def __init__(self, name):
        self.heard = []

    def register_memory(self, regions, mem_type=None, backends=()):
        return object()

    def prep_xfer_dlist(self, agent_name, xfer_list, mem_type=None, backends=()):
        return types.SimpleNamespace(rows=xfer_list, peer=agent_name)

    def get_xfer_descs(self, descs, mem_type=None):
        return types.SimpleNamespace(rows=np.asarray(descs))

    def make_prepped_xfer(self, operation, local, local_rows, remote, remote_rows, notif_msg=b""):
        rows = (self.plain(each.rows)[chosen] for each, chosen in ((local, local_rows), (remote, remote_rows)))
        return types.SimpleNamespace(rows=tuple(rows), message=notif_msg)

    @staticmethod
    def plain(rows):
        """Runs of a strided list one by one."""
        if len(rows[0]) == 3:
            return rows
        strided = ((row, at) for row in rows.tolist() for at in range(row[-1]))
        return np.array([(first + at * stride, size, device) for (first, size, device, stride, _), at in strided])

    def initialize_xfer(self, operation, local, remote, peer, notif_msg=b""):
        assert len(local.rows), "NIXL refuses an empty list"
        return types.SimpleNamespace(rows=(local.rows, remote.rows), message=notif_msg)

    def transfer(self, handle, notif_msg=b""):
        for (source, length, _), (target, _, _) in zip(*handle.rows):
            self.ram.copy(int(source), int(target), int(length))
        if handle.message:
            self.heard.append(handle.message)
        return "PROC"

    def check_xfer_state(self, handle):
        return "DONE"

    def send_notif(self, peer, message):
        self.heard.append(message)


class ShimTest(FolderCase):
    def setUp(self):
        super().setUp()
        self.switch = Switch(self.root / "switch", LIBRARY)
        self.ram = FakeEngine.ram = FakeAgent.ram = Ram()

    def tap(self):
        return backends.Tap(self.switch, Regions(POOLS, STATES))

    def groups(self):
        """Numbers of the regions that are transferred together: pools, metadata, target's states, 128x, draft's."""
        numbers = iter(range(len(POOLS) + METADATA + len(STATES)))
        return [[next(numbers) for _ in range(size)] for size in (len(POOLS), METADATA, len(STATES) - 2, 1, 1)]

    def mooncake_at_once(self):
        """As SGLang 0.5.23 does it: one call registers all."""
        return self.mooncake(at_once=True)

    def nixl_strided(self):
        """As SGLang 0.5.23 does it: prepared lists are runs of equal rows, and it notifies by itself."""
        return self.nixl(strided=True)

    def mooncake(self, at_once=False):
        """A function that transfers pages (first, count) of all regions, as SGLang's Mooncake manager asks for it."""
        engine = backends.wrapped_engine(FakeEngine, self.tap())()
        groups = self.groups()
        for group in [sum(groups, [])] if at_once else groups:
            engine.batch_register_memory([region(number) for number in group], [PAGES * SIZE] * len(group))

        def transferred(first, count):
            for group in groups:
                sources = [region(number) + first * SIZE for number in group]
                targets = [TARGET + source for source in sources]
                said = engine.batch_transfer_sync_write("decode", sources, targets, [count * SIZE] * len(group))
                self.assertEqual(said, 0)

        return transferred

    def nixl(self, strided=False):
        """The same as the NIXL manager asks for it: pools by rows of prepared lists, the rest by descriptors."""
        self.agent = agent = backends.wrapped_agent(FakeAgent, self.tap())("prefill")
        groups = self.groups()
        for group in (*groups[:2], sum(groups[2:], [])):
            agent.register_memory([(region(number), PAGES * SIZE, 0, "") for number in group], "VRAM")
        rows = [(region(number) + page * SIZE, SIZE, 0) for number in groups[0] for page in range(PAGES)]
        if strided:
            rows = [(region(number), SIZE, 0, SIZE, PAGES) for number in groups[0]]
        messages = (b"",) * len(MESSAGES) if strided else MESSAGES
        local = agent.prep_xfer_dlist("", np.array(rows, dtype=np.uint64), "VRAM")
        remote = [(TARGET + address, *rest) for address, *rest in rows]
        remote = agent.prep_xfer_dlist("decode", np.array(remote, dtype=np.uint64), "VRAM")

        def transferred(first, count):
            chosen = [place * PAGES + page for place in range(len(POOLS)) for page in range(first, first + count)]
            handles = [agent.make_prepped_xfer("WRITE", local, chosen, remote, chosen, messages[0])]
            for name, group in zip(messages[1:], groups[1:]):
                sources = [(region(number) + first * SIZE, count * SIZE, 0) for number in group]
                targets = [(TARGET + address, size, device) for address, size, device in sources]
                descs = (agent.get_xfer_descs(each, "VRAM") for each in (sources, targets))
                handles.append(agent.initialize_xfer("WRITE", *descs, "decode", name))
            for handle in handles:
                self.assertIn(agent.transfer(handle), ("DONE", "PROC"))
                self.assertEqual(agent.check_xfer_state(handle), "DONE")

        return transferred

    def written(self, backend, fault):
        """Decode's memory after a KV transfer of one page without, and one of three pages with the fault."""
        self.ram = FakeEngine.ram = FakeAgent.ram = Ram()
        transferred = backend()
        self.switch.turn(None)
        transferred(0, 1)
        self.switch.turn(fault)
        transferred(0, 1)
        transferred(1, 3)
        return self.ram.written()

    def test_without_a_fault_everything_arrives(self):
        for backend in (self.mooncake, self.mooncake_at_once, self.nixl, self.nixl_strided):
            written = self.written(backend, None)
            self.assertEqual({address - TARGET: byte for address, byte in written.items()}, Ram().bytes)
            self.assertEqual(self.switch.met(), 0)

    def test_each_fault_does_the_same_through_both_backends(self):
        right = self.written(self.mooncake, None)
        for name, fault in LIBRARY.items():
            with self.subTest(fault=name):
                if fault.early:
                    continue  # see test_reported_early
                wrong = self.written(self.mooncake, name)
                met = self.switch.met()
                self.assertEqual(wrong == right, bool(fault.environment or name == "transfer-slow"))
                self.assertEqual(met > 0, not fault.environment)
                self.assertEqual(self.written(self.nixl, name), wrong)
                self.assertEqual(self.agent.heard, [*MESSAGES] * 3)
                self.assertEqual(self.written(self.mooncake_at_once, name), wrong)
                self.assertEqual(self.written(self.nixl_strided, name), wrong)
                self.assertEqual(self.agent.heard, [], "an empty message is none")

    def test_reported_early(self):
        for backend in (self.mooncake, self.mooncake_at_once, self.nixl, self.nixl_strided):
            before = [number for number, at in self.written(backend, "reported-early").values() if at >= SIZE]
            self.assertEqual({*before}, {*self.groups()[1]}, "only metadata were to be written yet")
            deadline = time.monotonic() + 5
            while len(self.ram.written()) < len(Ram().bytes):
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.01)

    def test_what_a_fault_leaves_out_is_the_piece_that_it_names(self):
        written = self.written(self.mooncake, "128x-compressed-lost")
        missing = {Ram().bytes[address] for address in Ram().bytes if TARGET + address not in written}
        self.assertEqual({number for number, _ in missing}, {POOLS.index("128x compressed")})
        self.assertEqual(min(at for _, at in missing), SIZE, "the first page came before the fault")

    def test_environment_of_a_fault(self):
        tap, name = self.tap(), "SGLANG_TEST_DISAGG_FAILURE_PROB"

        def look(_):
            values.append(os.environ.get(name))
            if len(values) == 3:
                raise StopIteration
            self.switch.turn("polls-fail" if len(values) == 1 else None)

        values = []
        with mock.patch.dict(os.environ), mock.patch.object(backends.time, "sleep", look):
            os.environ.pop(name, None)
            with self.assertRaises(StopIteration):
                backends.watch_environment(tap)
        self.assertEqual(values, [None, LIBRARY["polls-fail"].environment[name], None])

    def test_another_library(self):
        with self.assertRaisesRegex(UnknownFault, "window-lost"):
            self.switch.turn("window-lots")


class TestBlocks(unittest.TestCase):
    def test_pieces_of_a_model(self):
        pools, states = pieces_of((0, 4, 128, 4))
        self.assertEqual(pools, ("4x compressed",) * 2 + ("indexer compressed",) * 2 + ("128x compressed",))
        self.assertEqual(states[:4] + states[-2:], ("window",) * 4 + ("128x buffers", "draft window"))

    def test_pieces_of_servers_with_a_canary(self):
        """SGLang 0.5.23 puts its buffers around the target's and around the draft's states, none around the 128x."""
        plain, guarded = pieces_of(RATIOS), pieces_of(RATIOS, canary=True)
        self.assertEqual(guarded[0], plain[0])
        *states, buffers, draft = plain[1]
        self.assertEqual(guarded[1], ("canary", *states, "canary", buffers, "canary", draft, "canary"))

    def test_without_a_draft_all_are_named_that_one_call_registers(self):
        pools, states = pieces_of(RATIOS)
        regions = Regions(pools, states)
        count = len(pools) + METADATA + len(states) - 1
        regions.register([(100 * number, 100) for number in range(count)])
        found = [regions.piece(100 * number) for number in (0, len(pools), len(pools) + METADATA, count - 1)]
        self.assertEqual(found, [pools[0], "first token", "window", "128x buffers"])

    def test_regions_take_joined_pages_apart_once_they_saw_one(self):
        regions = Regions(("a",), ())
        regions.register([(100, 64)])
        self.assertEqual(regions.named([Block(100, 0, 24)]), [Block(100, 0, 24, "a")])
        self.assertEqual(regions.named([Block(124, 0, 8)]), [Block(124, 0, 8, "a")])
        self.assertEqual([block.source for block in regions.named([Block(100, 0, 24)])], [100, 108, 116])
        self.assertEqual([regions.piece(address) for address in (99, 100, 163, 164)], ["unknown", "a", "a", "unknown"])

    def test_changes(self):
        blocks = [Block(1, 11, 4, "a"), Block(5, 15, 4, "a"), Block(9, 19, 4, "b")]
        memory = Memory()
        self.assertEqual(lost("a")(blocks, memory), blocks[2:])
        self.assertEqual([block.length for block in half("b")(blocks, memory)], [4, 4, 2])
        self.assertEqual([block.source for block in swapped("a", "b")(blocks, memory)], [5, 1, 9])
        self.assertEqual(from_before("a")(blocks, memory), blocks, "nothing was before")
        later = [Block(100, 15, 4, "a"), Block(9, 19, 4, "b")]
        self.assertEqual([block.source for block in from_before("a")(later, memory)], [1, 9])


class TestKit(FolderCase):
    """The mixin over a stub that stands for pair and monolithic server, and errs as the switch says."""

    def setUp(self):
        super().setUp()
        self.switch = switch = Switch(self.root / "switch", LIBRARY)
        self.does, self.flushed = {}, 0

        def reply(is_pair, path, body):
            fault = switch.name() if is_pair else None
            if path.startswith("/flush_cache"):
                self.flushed += is_pair
                return 200, {}
            if fault and "unmet" not in self.does[fault]:
                switch.record()
            if "fails" in self.does.get(fault, ""):
                return 500, {"error": {"message": "transfer failed"}}
            ids = body.get("input_ids") or [1]
            count = body["sampling_params"]["max_new_tokens"]
            logprob = -9.0 if "errs" in self.does.get(fault, "") else -0.1
            meta = {"finish_reason": {"type": "length"}, "prompt_tokens": len(ids), "completion_tokens": count}
            row = [logprob, ids[-1], None]
            meta |= {"output_token_logprobs": [row] * count, "output_top_logprobs": [[row]] * count}
            return 200, {"text": "", "output_ids": [ids[-1]] * count, "meta_info": meta}

        self.pair, self.alone = (StubServer(self, reply=partial(reply, is_pair)) for is_pair in (True, False))
        probes = tuple(generate_probe(f"p{i}", (i + 1, i + 2), 4) for i in range(6))
        alone, rooms, indexed = Round("alone", probes), Round("rooms", probes, 3), Round("i", probes)
        plan = types.SimpleNamespace(alone=(alone,), rooms=(rooms,), indexed=(indexed,))
        score = lambda *_: {"score": 0.5 if self.on("forgets") else 1.0}  # noqa: E731
        self.enterContext(mock.patch.object(checks, "gsm8k_metrics", score))
        self.enterContext(mock.patch.object(acceptance, "measure", self.accepted))
        self.enterContext(mock.patch.object(acceptance, "few_shot_prompts", lambda _, count: ["1"] * count))
        self.records = self.enterContext(mock.patch.object(driver.events, "table"))

        class Case(checks.TransferFaultChecks, unittest.TestCase):
            lb_url = prefill_url = decode_url = self.pair.url
            monolithic_url = self.alone.url
            configure = server_env = None
            transfer_switch, backend, model, min_score, gsm8k_data_path, returning = switch, "stub", "m", 0.95, None, 0

            @classmethod
            def parity_plan(cls):
                return plan

        self.case = Case("test_seeded_faults_of_the_transfer")

    def accepted(self, url, _, prompts, tokens=256):
        """Steps of answers of so many tokens, two a step; a draft that errs at first costs each answer one."""
        errs = url == self.pair.url
        steps = [(tokens - 1) // (1 if errs and self.on("drafts") else 2) for _ in prompts]
        if errs and self.on("starts"):
            steps = [count + 1 for count in steps]
        return acceptance.Acceptance("EAGLE", "stub", tokens * len(steps) / sum(steps), tuple(steps))

    def on(self, what):
        return what in self.does.get(self.switch.name(), "")

    def seen(self, **does):
        """Columns that saw each fault that `does` something."""
        self.does = {name.replace("_", "-"): what for name, what in does.items()}
        type(self.case).transfer_faults, type(self.case).first_drafts_prompts = tuple(self.does), 16
        with mock.patch("builtins.print"):
            self.case.test_seeded_faults_of_the_transfer()
        (_, columns, rows), _ = self.records.call_args
        return {row[0]: [column for column, mark in zip(columns[2:], row[2:]) if mark] for row in rows}

    def test_each_check_sees_its_fault(self):
        seen = self.seen(
            transfer_slow="nothing", window_lost="errs", pages_halved="forgets", buffers_lost="drafts",
            polls_fail="fails", first_draft_lost="starts",
        )  # fmt: skip
        parity = ["parity alone", "parity rooms", "parity indexed"]
        wanted = {"no fault": [], "transfer-slow": [], "window-lost": parity, "pages-halved": ["accuracy"]}
        wanted |= {"buffers-lost": ["acceptance", "first drafts"], "first-draft-lost": ["first drafts"]}
        self.assertEqual(seen, wanted | {"polls-fail": [*parity, "accounting"]})

    def test_before_each_fault_decode_holds_as_much_else_as_any_check_asks_for_at_once(self):
        with mock.patch.object(checks, "collect") as collect:
            self.case.overwrite()
        ((_, round_, _), _) = collect.call_args
        prompts = {json.dumps(json.loads(probe.body)["input_ids"]) for probe in round_.probes}
        at_once = self.case.accuracy_examples, self.case.acceptance_length_prompts, self.case.first_drafts_prompts
        self.assertGreaterEqual(min(round_.in_flight, len(prompts)), max(at_once))

    def test_each_check_begins_with_the_pages_that_hold_it(self):
        self.seen()
        sent_alone = 2 * 6
        self.assertEqual(self.flushed, 2 * (1 + 6) + sent_alone, "prefill and decode; decode before each prompt alone")

    def test_what_it_fails_for(self):
        nothing = (("window_lost", "nothing"), ("first_draft_lost", "nothing"))
        for name, what in (*nothing, ("transfer_slow", "errs"), ("window_lost", "errs unmet")):
            with self.subTest(fault=name, does=what), self.assertRaisesRegex(AssertionError, name.replace("_", "-")):
                self.seen(**{name: what})


LAUNCH_SERVER = """
import multiprocessing

def report():
    from mooncake.engine import TransferEngine
    print("engine of", TransferEngine.__module__, flush=True)

if __name__ == "__main__":
    from sglang.launch_server import report
    report()
    process = multiprocessing.get_context("spawn").Process(target=report)
    process.start()
    process.join()
"""


class TestServer(FolderCase):
    def test_each_process_of_a_server_has_the_wrapped_backend(self):
        self.write("mooncake/engine.py", "class TransferEngine: pass\n")
        self.write("sglang/launch_server.py", LAUNCH_SERVER)
        for package in ("mooncake", "sglang"):
            self.write(f"{package}/__init__.py")
        environ = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.root), str(Path(backends.__file__).parents[3])]),
            backends.SWITCH_VARIABLE: str(self.root / "switch"),
            backends.PIECES_VARIABLE: json.dumps([POOLS, STATES]),
        }
        command = [sys.executable, "-m", "pdkit.faults.real_engine.server"]
        run = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
        self.assertEqual(run.stdout, "engine of pdkit.faults.real_engine.backends\n" * 2, run.stderr[-2000:])


if __name__ == "__main__":
    unittest.main()
