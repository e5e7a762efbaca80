#!/usr/bin/env python3
"""Minimal reproductions, on CPU, of defects of the installed SGLang that docs/findings describes.

Result: docs/findings has a page for each that is there in 0.5.23.

    scripts/env.sh python3 studies/sglang_findings.py NAME...     (all without NAME)

Each runs the function of SGLang that is at fault, with stand-ins for what it is given. Exit code 1 if a defect is there.
"""

import asyncio
import contextlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from unittest import mock

from pdkit.core.command import Parser, run_command
from pdkit.core.errors import ExitCode
from pdkit.deployment import fused_mhc


def source_of(path: str) -> str:
    return (Path(importlib.util.find_spec("sglang").origin).parent / path).read_text()


def one_room() -> tuple[bool, str]:
    """Several samples of one prompt share a bootstrap room."""
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    sent = []
    manager = TokenizerManager.__new__(TokenizerManager)
    manager.rid_to_state = {}
    manager.disaggregation_mode = DisaggregationMode.PREFILL

    async def tokenized(obj):
        return SimpleNamespace(bootstrap_room=obj.bootstrap_room, sampling_params=SimpleNamespace(), rid=obj.rid)

    async def send(tokenized_obj):
        sent.append(tokenized_obj.bootstrap_room)

    async def answer(obj, request):
        yield {}

    def begin(obj, *_, **__):
        manager.rid_to_state[obj.rid] = mock.MagicMock()

    manager._tokenize_one_request, manager._send_one_request = tokenized, send
    manager._wait_one_response, manager._init_req_state = answer, begin
    request = GenerateReqInput(text="a prompt", sampling_params={"n": 3}, bootstrap_room=7, bootstrap_host="h")
    request.normalize_batch_and_arguments()
    for rid in request.rid if isinstance(request.rid, list) else [request.rid]:
        manager.rid_to_state[rid] = mock.MagicMock()

    async def run():
        async for _ in manager._handle_batch_request(request, None, dict(manager.rid_to_state)):
            pass

    asyncio.run(run())
    return len(set(sent)) < len(sent), f"n=3 with bootstrap room 7 is sent to the scheduler as rooms {sent}"


def hidden_failures() -> tuple[bool, str]:
    """An eval whose server answers nothing but 500 ends without an error."""
    from sglang.test import simple_eval_common

    class Broken(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            content = json.dumps({"error": "broken"}).encode()
            self.send_response(500)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    Thread(target=server.serve_forever, daemon=True).start()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.dict("os.environ", OPENAI_API_KEY="x"),
        mock.patch.object(simple_eval_common.time, "sleep"),
    ):
        sampler = simple_eval_common.CompletionSampler(f"http://127.0.0.1:{server.server_port}/v1", model="m")
        sampler.client = sampler.client.with_options(max_retries=0)
        try:
            said = sampler([{"role": "user", "content": "1 + 1"}])
        except Exception as error:
            return False, f"a server that answers 500 six times ends the eval: {error!r}"
        finally:
            server.shutdown()
    return said == "", f"a server that answers 500 six times gives the answer {said!r}, which is scored as a wrong one"


def no_copy_of_the_pool() -> tuple[bool, str]:
    """Decode of DeepSeek-V4 cannot retract a request: its pool makes no copy, and nothing stands in for one."""
    from sglang.srt.mem_cache import common
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

    pool = DeepSeekV4TokenToKVPool.__new__(DeepSeekV4TokenToKVPool)
    try:
        pool.get_cpu_copy([0])
        copies = True
    except NotImplementedError:
        copies = False
    instead = hasattr(common, "dsv4_needs_rebootstrap")
    how = "prefill computes a retracted request again" if instead else "the server ends where its pool is full"
    return not (copies or instead), f"get_cpu_copy {'works' if copies else 'raises NotImplementedError'}; {how}"


def no_index_for_the_checksum() -> tuple[bool, str]:
    """The checksum of a KV transfer has no indices for DeepSeek-V4's states, and asserts that there are some."""
    from sglang.srt.disaggregation import checksum
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

    pool = DeepSeekV4TokenToKVPool.__new__(DeepSeekV4TokenToKVPool)
    allocator = SimpleNamespace(get_kvcache=lambda: pool, page_size=256)
    scheduler = SimpleNamespace(token_to_kv_pool_allocator=allocator, req_to_token_pool=None, sliding_window_size=128)
    found = checksum.state_indices_for_request(scheduler, SimpleNamespace(kv=None), 300)
    return found is None, f"state_indices_for_request gives {found} for DeepSeekV4TokenToKVPool"


def empty_text() -> tuple[bool, str]:
    """An empty text is let through to the scheduler where the tokenizer adds no token of its own."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    manager = TokenizerManager.__new__(TokenizerManager)
    manager.tokenizer = mock.MagicMock(is_fast=True, return_value={"input_ids": [[]]})
    manager.model_config = SimpleNamespace(is_embedding_gemma=False)
    manager.async_dynamic_batch_tokenizer = None
    try:
        ids, _ = asyncio.run(manager._tokenize_texts(""))
    except ValueError as error:
        return False, f"refused: {error}"
    return not ids, f"the text '' is tokenized to {ids} and not refused"


def shares_overlap() -> tuple[bool, str]:
    """The fused mHC kernel bounds its blocks by the hidden size instead of by their shares of it."""
    wrong = fused_mhc.WRONG in source_of(fused_mhc.SOURCE)
    return wrong, f"{fused_mhc.SOURCE} has {fused_mhc.WRONG!r}: {wrong}"


def copies_past_the_end() -> tuple[bool, str]:
    """The copy that gathers and scatters rows of DP attention's ranks is not bounded by the tensors."""
    import torch
    from sglang.srt.layers import dp_attention

    rows, size = torch.zeros(4, 8), torch.tensor(4)
    with mock.patch.object(dp_attention, "memcpy_func", dp_attention.memcpy_triton):
        dp_attention.memcpy(rows[:1], torch.ones(4, 8), 0, torch.tensor(0), size, True)
    behind = int(rows[1:].any(dim=1).sum())
    return behind > 0, f"a copy of {size} rows to a tensor of 1 overwrites the {behind} rows behind it"


FINDINGS: dict[str, Callable[[], tuple[bool, str]]] = {
    "one-room": one_room,
    "hidden-failures": hidden_failures,
    "retract": no_copy_of_the_pool,
    "checksum": no_index_for_the_checksum,
    "empty-text": empty_text,
    "fused-mhc": shares_overlap,
    "dp-copy": copies_past_the_end,
}


def main(argv: Sequence[str]) -> ExitCode:
    parser = Parser(prog="sglang_findings.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FINDINGS)}")
    names = parser.parse_args(argv).names or list(FINDINGS)
    if unknown := set(names) - {*FINDINGS}:
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(FINDINGS)}")
    os.environ["TRITON_INTERPRET"] = "1"  # read where Triton is imported
    there = False
    print(f"sglang {version('sglang')}", flush=True)
    for name in names:
        found, what = FINDINGS[name]()
        there |= found
        print(f"{name:<16}{'there' if found else 'not there':<11}{what}", flush=True)
    return ExitCode.FAILED if there else ExitCode.PASSED


if __name__ == "__main__":
    sys.exit(run_command("sglang_findings.py", main, sys.argv[1:]))
