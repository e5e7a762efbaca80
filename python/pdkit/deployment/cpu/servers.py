"""A mixin that launches SGLang's own servers on CPU. Put it before the class that launches a disaggregation test's servers.

class TestSglangCpu(SglangCpuMixin, TestDisaggregationDSV4):
    server_class = Server
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pdkit.claimed_ports import ClaimedPortsMixin
from pdkit.deployment.cpu import checkpoints, plan, requirements
from pdkit.deployment.cpu.forked import ForkedPopen, ForkServer

SPAWN_VARIABLE = "PDKIT_CPU_SPAWN"


class SglangCpuMixin(ClaimedPortsMixin):
    """Prefill, decode and what else is launched, of a small model on CPU.

    server_class  the subclass of `subprocess.Popen` that servers are
    cpu_model     which model: plan.LLAMA or plan.DSV4
    backend       what carries the KV pages: see plan.BACKENDS
    forked        servers are forked from one process that imported SGLang, not spawned as in production
    """

    rung = "sglang-cpu"
    server_class: ClassVar[type]
    cpu_model = plan.LLAMA
    backend = plan.BACKENDS[0]
    forked = not os.getenv(SPAWN_VARIABLE)

    prefill_gpus = decode_gpus = range(0)
    server_env: ClassVar[dict[str, str]] = {}
    more_server_args: ClassVar[Sequence[str]] = ()
    _fork_server: ForkServer | None = None
    _forked_class: type | None = None

    @classmethod
    def setUpClass(cls) -> None:
        requirements.require_machine({**os.environ, **plan.environment(cls.cpu_model)})
        super().setUpClass()

    @classmethod
    def configure(cls) -> None:
        cls.model_name = str(checkpoints.provide(cls.cpu_model.name))
        super().configure()
        cls.transfer_backend = ["--disaggregation-transfer-backend", cls.backend]
        cls.rdma_devices = []
        cls.server_env = {**cls.server_env, **plan.environment(cls.cpu_model)}
        cls.server_args = [*plan.FLAGS, *cls.cpu_model.flags, *cls.more_server_args]

    @classmethod
    def prefill_args(cls) -> list[str]:
        return [*cls.server_args, *plan.PD_FLAGS, *cls.disaggregation_args("prefill", cls.prefill_gpus)]

    @classmethod
    def decode_args(cls) -> list[str]:
        return [*cls.server_args, *plan.PD_FLAGS, *cls.disaggregation_args("decode", cls.decode_gpus)]

    @classmethod
    def start_prefill(cls) -> None:
        if cls.forked:
            environment = {**os.environ, **cls.server_env}
            cls._fork_server = ForkServer(environment, cls.log_path("fork server"))
            cls.addClassCleanup(cls._fork_server.close)
            cls._forked_class = type("ForkedServer", (cls.server_class, ForkedPopen), {"fork_server": cls._fork_server})
        super().start_prefill()

    @classmethod
    def _start(cls, name: str, command: Sequence[str], env: Mapping[str, str]) -> Any:
        server = cls._forked_class if cls.forked else cls.server_class
        return server(name, list(command), dict(env), cls.log_path(name))

    @classmethod
    def launch(cls, name: str, command: Sequence[str]) -> Any:
        return cls._start(name, command, {**os.environ, **cls.server_env})

    @classmethod
    def start_lb(cls, command: Sequence[str]) -> Any:
        return cls.launch("load balancer", command)

    @classmethod
    def first_request(cls) -> None:
        """Also that every server runs with the shims."""
        super().first_request()
        for name in ("prefill", "decode"):
            plan.require_active(cls.log_path(name))
