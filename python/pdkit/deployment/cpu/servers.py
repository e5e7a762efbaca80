"""SGLang's own servers on CPU.

class TestDisaggregationSglangCpu(ExactParityChecks, MonolithicBeside, SglangCpuServers):
    cpu_model = plan.DSV4
"""

from __future__ import annotations

import atexit
import os
import unittest
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pdkit.core.forked import ForkServer
from pdkit.core.paths import ASSETS
from pdkit.deployment.cpu import checkpoints, drift, plan, requirements, working_tree
from pdkit.deployment.fixture import PlannedServers
from pdkit.deployment.ports import ClaimedPorts
from pdkit.deployment.server import Server

SPAWN_VARIABLE = "PDKIT_CPU_SPAWN"

# By tree and environment; those that the next class can use outlive the one that started them.
_fork_servers: dict[tuple[Path | None, tuple[tuple[str, str], ...]], ForkServer] = {}


@atexit.register  # at import, so that classes stop their servers before
def _close_fork_servers() -> None:
    while _fork_servers:
        _fork_servers.popitem()[1].close()


class SglangCpuServers(ClaimedPorts, PlannedServers):
    """Prefill, decode and what else is launched, of a small model on CPU.

    cpu_model     which model: plan.LLAMA, plan.DSV4 or plan.TRAINED_DSV4
    backend       what carries the KV pages: see plan.BACKENDS
    forked        servers are forked from one process that imported SGLang, not spawned as in production
    tree          the directory that holds the package `sglang` of prefill and decode; None: the installed release
    """

    target = "sglang-cpu"
    cpu_model = plan.LLAMA
    backend = plan.BACKENDS[0]
    forked = not os.getenv(SPAWN_VARIABLE)

    gsm8k_data_path = str(ASSETS / "gsm8k_nano.jsonl")
    prefill_gpus = decode_gpus = range(0)
    server_env: Mapping[str, str] = {}
    more_server_args: ClassVar[Sequence[str]] = ()
    tree: ClassVar[Path | None] = None

    @classmethod
    def setUpClass(cls) -> None:
        cls.tree = plan.source()
        requirements.require_machine()
        super().setUpClass()

    @classmethod
    def configure(cls) -> None:
        cls.model_name = str(checkpoints.provide(cls.cpu_model.checkpoint))
        super().configure()
        cls.server_args = [*plan.FLAGS, *cls.cpu_model.flags, *cls.more_server_args]

    @classmethod
    def launch_all(cls) -> None:
        cls.close_fork_servers_but(cls.tree)
        super().launch_all()

    @classmethod
    def disaggregation_args(cls, side: str, gpus: Sequence[int]) -> list[str]:
        return [*plan.PD_FLAGS, *super().disaggregation_args(side, gpus)]

    @classmethod
    def launch(
        cls, name: str, command: Sequence[str], env: Mapping[str, str] | None = None, *more: Any, **by_name: Any
    ) -> Server:
        environment = plan.environment(cls.cpu_model, cls.tree_of(name))
        return super().launch(name, command, {**environment, **(env or {})}, *more, **by_name)

    @classmethod
    def tree_of(cls, name: str) -> Path | None:
        """Answers are compared with those of the release, whatever tree the pair is of."""
        return None if name == "monolithic" else cls.tree

    @classmethod
    def server_class(cls, name: str, environment: Mapping[str, str]) -> type[Server]:
        """Servers are forked from a process that imported SGLang from the tree of `name`, if any are."""
        if not cls.forked:
            return super().server_class(name, environment)
        key = cls._fork_key(cls.tree_of(name))
        if key not in _fork_servers:
            log = cls.log_path(f"fork server {len(_fork_servers)}")
            prepare = "pdkit.deployment.cpu.preload:prepare"
            _fork_servers[key] = ForkServer(prepare, environment, log, flags=["-W", "ignore"])
        return _fork_servers[key].based_on(Server)

    @classmethod
    def _fork_key(cls, tree: Path | None) -> tuple[Path | None, tuple[tuple[str, str], ...]]:
        return tree, tuple(sorted(cls.server_env.items()))

    @classmethod
    def close_fork_servers_but(cls, tree: Path | None) -> None:
        """End those that no server of this class is forked from, with `tree` or the release."""
        for key in _fork_servers.keys() - {cls._fork_key(tree), cls._fork_key(None)}:
            _fork_servers.pop(key).close()

    def _callTestMethod(self, method: Callable[[], None]) -> None:
        """A failure ends with what in the working tree under test is another than in the release."""
        try:
            super()._callTestMethod(method)
        except Exception as error:
            if self.tree is not None and not isinstance(error, unittest.SkipTest):
                error.add_note(working_tree.report(self.tree / "sglang", drift.installed_package()))
            raise

    @classmethod
    def first_request(cls, base_url: str | None = None, model: str | None = None, threads: int = 32) -> None:
        """Also that every server runs with the shims."""
        super().first_request(base_url, model, threads)
        for name in ("prefill", "decode"):
            plan.require_active(cls.log_path(name))
