"""A mixin that launches SGLang's own servers on CPU. Put it before the class that launches a disaggregation test's servers.

class TestSglangCpu(SglangCpuMixin, TestDisaggregationDSV4):
    server_class = Server
"""

from __future__ import annotations

import os
import unittest
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pdkit.claimed_ports import ClaimedPortsMixin
from pdkit.deployment.cpu import checkpoints, drift, plan, requirements, working_tree
from pdkit.deployment.cpu.forked import ForkedPopen, ForkServer

SPAWN_VARIABLE = "PDKIT_CPU_SPAWN"


class SglangCpuMixin(ClaimedPortsMixin):
    """Prefill, decode and what else is launched, of a small model on CPU.

    server_class  the subclass of `subprocess.Popen` that servers are
    cpu_model     which model: plan.LLAMA or plan.DSV4
    backend       what carries the KV pages: see plan.BACKENDS
    forked        servers are forked from one process that imported SGLang, not spawned as in production
    tree          the directory that holds the package `sglang` of prefill and decode; None: the installed release
    """

    rung = "sglang-cpu"
    server_class: ClassVar[type]
    cpu_model = plan.LLAMA
    backend = plan.BACKENDS[0]
    forked = not os.getenv(SPAWN_VARIABLE)

    prefill_gpus = decode_gpus = range(0)
    server_env: ClassVar[dict[str, str]] = {}
    more_server_args: ClassVar[Sequence[str]] = ()
    tree: ClassVar[Path | None] = None
    _fork_servers: ClassVar[dict[Path | None, ForkServer]] = {}

    @classmethod
    def setUpClass(cls) -> None:
        cls.tree = plan.source()
        requirements.require_machine({**os.environ, **plan.environment(cls.cpu_model)})
        super().setUpClass()

    @classmethod
    def configure(cls) -> None:
        cls.model_name = str(checkpoints.provide(cls.cpu_model.name))
        super().configure()
        cls.transfer_backend = ["--disaggregation-transfer-backend", cls.backend]
        cls.rdma_devices = []
        cls.server_env = {**cls.server_env, **plan.environment(cls.cpu_model, cls.tree)}
        cls.server_args = [*plan.FLAGS, *cls.cpu_model.flags, *cls.more_server_args]

    @classmethod
    def prefill_args(cls) -> list[str]:
        return [*cls.server_args, *plan.PD_FLAGS, *cls.disaggregation_args("prefill", cls.prefill_gpus)]

    @classmethod
    def decode_args(cls) -> list[str]:
        return [*cls.server_args, *plan.PD_FLAGS, *cls.disaggregation_args("decode", cls.decode_gpus)]

    @classmethod
    def start_prefill(cls) -> None:
        cls._fork_servers = {}
        super().start_prefill()

    @classmethod
    def launch(cls, name: str, command: Sequence[str]) -> Any:
        # Answers are compared with those of the release, whatever tree the pair is of.
        tree = None if name == "monolithic" else cls.tree
        environment = {**os.environ, **cls.server_env, "PYTHONPATH": plan.python_path(tree)}
        server = cls.forked_class(tree, environment) if cls.forked else cls.server_class
        return server(name, list(command), environment, cls.log_path(name))

    @classmethod
    def forked_class(cls, tree: Path | None, environment: Mapping[str, str]) -> type:
        """The class of servers that are forked from a process which imported SGLang from `tree` (None: the release)."""
        if tree not in cls._fork_servers:
            log = cls.log_path(f"fork server {len(cls._fork_servers)}")
            cls._fork_servers[tree] = ForkServer(environment, log)
            cls.addClassCleanup(cls._fork_servers[tree].close)
        return type("ForkedServer", (cls.server_class, ForkedPopen), {"fork_server": cls._fork_servers[tree]})

    @classmethod
    def close_fork_servers_but(cls, tree: Path | None) -> None:
        """End those of trees that nobody serves any more; the release's stays."""
        for other in cls._fork_servers.keys() - {tree, None}:
            cls._fork_servers.pop(other).close()

    def _callTestMethod(self, method: Any) -> Any:
        """A failure ends with what in the working tree under test is another than in the release."""
        try:
            return super()._callTestMethod(method)
        except Exception as error:
            if self.tree is not None and not isinstance(error, unittest.SkipTest):
                error.add_note(working_tree.report(self.tree / "sglang", drift.installed_package()))
            raise

    @classmethod
    def start_lb(cls, command: Sequence[str]) -> Any:
        return cls.launch("load balancer", command)

    @classmethod
    def first_request(cls) -> None:
        """Also that every server runs with the shims."""
        super().first_request()
        for name in ("prefill", "decode"):
            plan.require_active(cls.log_path(name))
