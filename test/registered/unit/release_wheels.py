"""A small release of SGLang, as a wheel: the modules that a launch contract asks, in a few lines each."""

import textwrap
import zipfile
from pathlib import Path

SERVER_ARGS = """
import argparse
from types import SimpleNamespace

import torch
from sglang.srt.breaks_without_torch import Kernel
from sglang.benchmark.serving import run_benchmark
from sglang.srt.heavy import Layer
from sglang.srt.utils import get_free_port, wait_port_available


class DeprecatedStoreTrueAction(argparse.Action):
    def __init__(self, option_strings, dest, new_flag=None, **kwargs):
        self.new_flag = new_flag
        super().__init__(option_strings, dest, nargs=0, default=False, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, True)


class ServerArgs:
    cuda_graph_max_bs_decode = None

    @property
    def is_joiner(self):
        return self.nnodes > 1

    @staticmethod
    def add_cli_args(parser):
        add = parser.add_argument
        add("--model-path", required=True)
        add("--trust-remote-code", action="store_true")
        add("--tensor-parallel-size", "--tp-size", type=int, default=1)
        add("--data-parallel-size", "--dp-size", type=int, default=1)
        add("--pp-size", type=int, default=1)
        add("--nnodes", type=int, default=1)
        add("--base-gpu-id", type=int, default=0)
        add("--gpu-id-step", type=int, default=1)
        add("--mem-fraction-static", type=float)
        add("--enable-dp-attention", action=DeprecatedStoreTrueAction, new_flag="--attn-dp-size N")
        add("--cuda-graph-max-bs-decode", type=int)
        add("--cuda-graph-max-bs-prefill", type=int)
        add("--moe-a2a-backend", choices=["none", "deepep"], default="none")
        add("--deepep-config")
        add("--old-switch", action="store_true", help="[Deprecated] Use --new-switch instead.")
        add("--host", default="127.0.0.1")
        add("--port", type=int, default=30000)
        add("--nccl-port", type=int)
        add("--disaggregation-mode", choices=["null", "prefill", "decode"], default="null")
        add("--disaggregation-bootstrap-port", type=int, default=8998)
        add("--disaggregation-ib-device")
EXTRA_FLAG


class PortArgs:
    @staticmethod
    def init_new(server_args):
        nccl_port = server_args.nccl_port or get_free_port()
        dp_size = server_args.dp_size if server_args.enable_dp_attention else 1
        if getattr(server_args, "attn_dp_size", dp_size) > 1 and not server_args.is_joiner:
            wait_port_available(server_args.port + 233, "dist_init_port")
        return SimpleNamespace(nccl_port=nccl_port)
"""

ENVIRON = """
import os
import warnings


class EnvField:
    def __init__(self, default):
        self.default = default


class EnvInt(EnvField):
    def parse(self, value):
        try:
            return int(value)
        except ValueError:
            raise ValueError(f'"{value}" is not a valid integer value')


class EnvIntWithAlias(EnvInt):
    def __init__(self, default, deprecated_name):
        super().__init__(default)
        self.deprecated_name = deprecated_name


class Envs:
    SGLANG_DISPATCH_TOKENS = EnvInt(128)
    SGLANG_NEW_NAME = EnvIntWithAlias(1, deprecated_name="SGLANG_OLD_NAME")


if "SGLANG_GONE" in os.environ:
    warnings.warn("Environment variable SGLANG_GONE is deprecated. Please use SGLANG_DISPATCH_TOKENS instead.")
"""

FIXTURE = """
import os
import subprocess
import unittest

import requests
from sglang.test.test_utils import (
    kill_process_tree,
    popen_launch_pd_server,
    popen_with_error_check,
    start_subprocess_fail_fast_watcher,
    terminate_and_kill_process_tree,
)


class PDDisaggregationServerBase(unittest.TestCase):
    host = "127.0.0.1"
    lb_port, lb_url = "21000", "http://127.0.0.1:21000"
    prefill_url, decode_url = "http://127.0.0.1:21100", "http://127.0.0.1:21200"

    @classmethod
    def setUpClass(cls):
        os.environ["MC_TCP_ENABLE_CONNECTION_POOL"] = "true"
        cls.prefill_nccl_port = "21300"

    @classmethod
    def serve(cls, *argv, env=None):
        command = ["python3", "-m", "sglang.launch_server", "--model-path", "some/model", *argv]
        return subprocess.Popen(command, env=env and {**os.environ, **env})

    @classmethod
    def start_prefill(cls):
        cls.serve("--disaggregation-mode", "prefill", "--port", "21100", *cls.extra_prefill_args)

    @classmethod
    def start_decode(cls):
        cls.serve("--disaggregation-mode", "decode", "--port", "21200", *cls.extra_decode_args)

    @classmethod
    def wait_server_ready(cls, url, timeout):
        assert requests.get(url).status_code == 200

    @classmethod
    def launch_lb(cls):
        pass

    extra_prefill_args = extra_decode_args = []
"""

CI_REGISTER = """
import re
from types import SimpleNamespace


def register_cuda_ci(**kwargs):
    pass


def ut_parse_one_file(path):
    suites = re.findall(r'suite="(.+?)"', open(path).read())
    backend = SimpleNamespace(name="CUDA")
    return [SimpleNamespace(backend=backend, effective_suite=suite, nightly=False) for suite in suites], True
"""

SOURCES = {
    "srt/server_args.py": SERVER_ARGS.replace("EXTRA_FLAG", ""),
    "srt/environ.py": ENVIRON,
    "srt/heavy.py": """
        import torch
        from transformers import PretrainedConfig

        class Layer(torch.nn.Module, PretrainedConfig):
            dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32

            @torch.compile
            def forward(self, x: "torch.Tensor | None" = None):
                return x * 2

        assert Layer().forward(21) == 42
        assert not hasattr(torch, "npu") and torch.version.hip is None
        assert int(torch.__version__.split(".")[0]) > 2
    """,
    "benchmark/serving.py": "raise OSError('it is slow, and no answer depends on it')",
    "srt/breaks_without_torch.py": """
        import torch

        class Kernel:
            pass

        table = {}
        table[torch.float32.name]["x"]
    """,
    "srt/utils.py": """
        import os

        def kill_process_tree(parent_pid):
            pass

        READ_OUTSIDE_OF_THE_REGISTRY = os.getenv("SGLANG_UNREGISTERED")

        def get_free_port():
            raise AssertionError("ports that are drawn are not drawn while a plan is read")

        def wait_port_available(port, name):
            raise AssertionError("ports are not looked at while a plan is read")
    """,
    "test/test_utils.py": """
        from sglang.srt.utils import kill_process_tree

        DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH = 600

        def to_be_replaced(*args, **kwargs):
            raise AssertionError("a test that is attached to starts nothing by this")

        popen_launch_pd_server = popen_launch_server = popen_with_error_check = try_cached_model = to_be_replaced
        start_subprocess_fail_fast_watcher = terminate_and_kill_process_tree = to_be_replaced
    """,
    "test/run_eval.py": "def run_eval(args): raise NotImplementedError",
    "test/simple_eval_common.py": "import openai",
    "test/server_fixtures/disaggregation_fixture.py": FIXTURE,
    "test/ci/ci_register.py": CI_REGISTER,
}


def write_wheel(path: Path, changes: dict[str, str] | None = None, version="0.5.99", name="sglang") -> Path:
    """Writes a wheel with SOURCES, some of them replaced, and returns its path."""
    with zipfile.ZipFile(path, "w") as archive:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        archive.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
        for source, text in {**SOURCES, **(changes or {})}.items():
            archive.writestr(f"sglang/{source}", textwrap.dedent(text))
    return path
