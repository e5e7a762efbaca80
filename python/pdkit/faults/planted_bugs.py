"""Bugs as a change of SGLang's disaggregation code could bring them, and checks of whether each is caught.

Put them before a monolithic server, which stays as released.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import requests

from pdkit.checks.http import RequestFailed, post, status_of
from pdkit.checks.parity.answers import Arm
from pdkit.checks.parity.exact import ExactParityArms
from pdkit.checks.parity.plan import Round, generate_probe
from pdkit.checks.parity.verdict import Parity
from pdkit.core import events
from pdkit.deployment.cpu import drift, working_tree
from pdkit.deployment.cpu.working_tree import Bug

if TYPE_CHECKING:
    from pdkit.deployment.cpu.servers import SglangCpuServers
else:
    SglangCpuServers = object

PREFILL, DECODE = "srt/disaggregation/prefill.py", "srt/disaggregation/decode.py"
UTILS, MOONCAKE = "srt/disaggregation/utils.py", "srt/disaggregation/mooncake/conn.py"
RADIX, ALLOCATOR, COMMON = "srt/mem_cache/radix_cache.py", "srt/mem_cache/allocator/token.py", "srt/mem_cache/common.py"
SCHEDULER = "srt/managers/scheduler.py"

BUGS = (
    Bug(
        "two pages change places",
        PREFILL,
        "                page_indices = kv_to_page_indices(kv_indices, page_size)\n            segment_is_last",
        "                page_indices = kv_to_page_indices(kv_indices, page_size)\n"
        "                page_indices[:2] = page_indices[:2][::-1].copy()\n            segment_is_last",
    ),
    Bug(
        "the last page is dropped",
        MOONCAKE,
        "        dst_device_kv_ptrs = None\n        if dst_device_kv_indices is not None:\n            compression_ratios",
        "        if len(prefill_kv_indices) > 1:\n"
        "            prefill_kv_indices, dst_kv_indices = prefill_kv_indices[:-1], dst_kv_indices[:-1]\n"
        "        dst_device_kv_ptrs = None\n        if dst_device_kv_indices is not None:\n            compression_ratios",
    ),
    Bug(
        "the first token is dropped",
        DECODE,
        "        decode_req.req.output_ids.append(committed_output_id)\n        if not replayed_boundary:",
        "        if not replayed_boundary:",
    ),
    Bug(
        "the logprob of the first token is another's",
        UTILS,
        "                    req.logprob.output_token_logprobs_val[0]\n                )",
        "                    self.output_token_logprobs_val[req.metadata_buffer_index - 1][0]\n                )",
    ),
    Bug(
        "a metadata slot is given away while it is in use",
        UTILS,
        "        return self.free_slots.popleft()",
        "        return self.free_slots[0]",
    ),
    Bug(
        "a cached prefix matches one token too many",
        RADIX,
        "        if page_size == 1:\n            return matched_tokens\n",
        "        if page_size == 1:\n            return min(matched_tokens + 1, len(self), len(other) - offset)\n",
    ),
    Bug(
        "freed pages are free twice",
        ALLOCATOR,
        "                self.release_pages = torch.cat((self.release_pages, free_index))",
        "                self.release_pages = torch.cat((self.release_pages, free_index, free_index))",
    ),
    Bug(
        "a retracted request loses its last token's keys and values",
        ALLOCATOR,
        "        return self._kvcache.get_cpu_copy(\n            indices,",
        "        return self._kvcache.get_cpu_copy(\n            torch.cat((indices[:1], indices[:-1])),",
    ),
    Bug(
        "an aborted request decodes on",
        SCHEDULER,
        "        # Delete requests in the running batch\n        for req in self.collect_inflight_reqs():",
        "        # Delete requests in the running batch\n        for req in ():",
    ),
)
"""For any model."""

STATE_BUGS = (
    Bug(
        "the state of another request is sent",
        PREFILL,
        "int(req.kv.req_pool_idx), c128_seq_len",
        "int(req.kv.req_pool_idx) + 1, c128_seq_len",
    ),
    Bug(
        "the window begins a page late",
        PREFILL,
        "                window_start = (window_start // page_size) * page_size\n",
        "                window_start = -(-window_start // page_size) * page_size\n",
    ),
)
"""For DeepSeek-V4's."""


class PlantedBugChecks(ExactParityArms, SglangCpuServers):
    """Each bug of `bugs` is planted in a copy of SGLang, prefill and decode are restarted from it, and all is asked.

    A bug is caught where a check fails that passes for the release, and the failure names the file that was changed.
    """

    needs: tuple[str, ...] = (
        "launch",
        "server_env",
        "supervisor",
        "tree",
        "close_fork_servers_but",
        "process_prefill",
        "process_decode",
    )

    bugs: ClassVar[Sequence[Bug]] = BUGS
    returning = 60
    retracted = 10
    retracted_tokens = 220
    aborted_tokens = 1200
    rounding_together = 1e-3

    @classmethod
    def checks(cls) -> dict[str, Callable[[PlantedBugChecks], None]]:
        return {
            "alone": lambda self: self.same_as_released(self.parity_plan().alone[0]),
            "cached prefixes": lambda self: self.cached_prefixes(),
            "together": lambda self: self.same_tokens(self.parity_plan().rooms[0]),
            "more than the pool holds": lambda self: self.same_tokens(self.overflowing()),
            "aborted": lambda self: self.aborted_requests_end(),
        }

    @classmethod
    def overflowing(cls) -> Round:
        """Requests that decode's pool cannot hold at once, so that some are retracted."""
        probes = tuple(
            generate_probe(f"long-{seed}", [5 + seed * index % 500 for index in range(60)], cls.retracted_tokens)
            for seed in range(3, 3 + cls.retracted)
        )
        return Round("more than the pool holds", probes, len(probes), flush=True)

    @classmethod
    def take_references(cls) -> None:
        plan = cls.parity_plan()
        for round_ in (*plan.alone, *plan.rooms, *plan.shared_prefix, cls.overflowing()):
            cls.reference_alone(round_)

    def test_the_release_passes(self) -> None:
        for name, check in self.checks().items():
            with self.subTest(name):
                check(self)

    def test_planted_bugs_are_caught(self) -> None:
        rows, before = [], type(self).tree
        release = drift.installed_package()
        with tempfile.TemporaryDirectory(prefix="sglang-bugs-") as directory:
            for bug in self.bugs:
                with self.subTest(bug.name):
                    began = time.monotonic()
                    package = working_tree.copy(release, Path(directory, bug.name.replace(" ", "-")))
                    bug.plant(package)
                    caught = self.what_catches(package.parent)
                    message = "\n".join([*caught.values(), working_tree.report(package, release)])
                    what = ", ".join(caught) or "NOT CAUGHT"
                    rows.append([bug.name, bug.file, what, f"{time.monotonic() - began:.0f}"])
                    print(f"planted bug: {', '.join(rows[-1])} s\n{message[:1500]}", flush=True)
                    self.assertTrue(caught, f"{bug.name} in {bug.file}: not caught by any check")
                    self.assertIn(bug.file, message)
            events.table("planted bugs", ["bug", "file", "caught by", "seconds"], rows)
            self.serve_from(before)

    def what_catches(self, tree: Path) -> dict[str, str]:
        """Message by check, of the first that fails: a pair with a bug may not come back to its senses."""
        for name, check in {"start": lambda self: self.serve_from(tree), **self.checks()}.items():
            try:
                check(self)
            except (AssertionError, RequestFailed, requests.RequestException) as error:
                return {name: f"{type(error).__name__}: {error}"}
        return {}

    def serve_from(self, tree: Path | None) -> None:
        """Prefill and decode of another package sglang, on the same ports behind the same router."""
        cls = type(self)
        cls.tree = tree
        for side in ("prefill", "decode"):
            process = getattr(cls, f"process_{side}")
            process.kill_all()
            process.wait(30)
            fresh = cls.launch(side, process.args, cls.server_env)
            fresh.expects_exit = tree is not None  # a bug may end it
            setattr(cls, f"process_{side}", fresh)
        cls.close_fork_servers_but(tree)
        for side in ("prefill", "decode"):
            self.until_healthy(getattr(cls, f"{side}_url"), getattr(cls, f"process_{side}"))

    def until_healthy(self, url: str, process: Any) -> None:
        deadline = time.monotonic() + self.returning
        while time.monotonic() < deadline:
            if process.poll() is not None:
                self.fail(f"the server of {url} ended with {process.returncode} at its start; {process.log_tail()}")
            with contextlib.suppress(requests.RequestException):
                if status_of(f"{url}/health", timeout=5) == 200:
                    return
            time.sleep(0.3)
        self.fail(f"{url} is not healthy {self.returning} s after its start")

    # Checks

    def ask(self, round_: Round) -> tuple[Arm, Arm]:
        """(answers of the release, of the pair)"""
        return self.reference_alone(round_), self.answers_to(round_)

    def same_as_released(self, round_: Round) -> None:
        """To the bit."""
        Parity.of(round_, *self.ask(round_)).assert_passed()

    def same_tokens(self, round_: Round) -> None:
        """The tokens, where rounding depends on who else is served; nearly equal logprobs."""
        Parity.of(round_, *self.ask(round_), rounding=self.rounding_together).assert_passed()

    def cached_prefixes(self) -> None:
        for round_ in self.parity_plan().shared_prefix:
            if not round_.batch:
                self.same_tokens(round_)

    def aborted_requests_end(self) -> None:
        """A client that hangs up leaves decode without work in a third of the time that its answer would take."""

        def body(tokens: int) -> dict[str, Any]:
            params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
            return {"text": "1", "sampling_params": params, "stream": True}

        began = time.monotonic()
        post(self.lb_url, "/generate", body(self.aborted_tokens // 3), self.request_timeout)
        bound = time.monotonic() - began
        with post(self.lb_url, "/generate", body(self.aborted_tokens), self.request_timeout, stream=True) as answer:
            next(answer.iter_lines())
        hung_up = time.monotonic()
        while (running := self.running()) and time.monotonic() - hung_up < bound:
            time.sleep(0.05)
        self.assertEqual(running, 0, f"decode still serves a request {bound:.1f} s after its client hung up")

    def running(self) -> int:
        """Requests that decode serves or keeps."""
        loads = requests.get(f"{self.decode_url}/v1/loads", timeout=10).json()["loads"]
        return sum(each["num_running_reqs"] + each["num_waiting_reqs"] for each in loads)
