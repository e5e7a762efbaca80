"""Launches a test's servers with a switch for faults between them.

    class Subject(FaultSwitchServers, TestDisaggregationDSV4Integrity):
        pass

    Subject.switch.turn("window-zeroed")

It needs the embedded engine and SGLang's mini load balancer.
"""

import os
from collections.abc import Sequence
from unittest import mock

from pdkit.checks.base import Checks
from pdkit.deployment.server import Server
from pdkit.faults.switch import VARIABLE, Switch
from pdkit.faults.transfer import BACKEND_VARIABLE

BACKEND = "--disaggregation-transfer-backend"


class FaultSwitchServers(Checks):
    """Put it first. `switch` is there once the class is set up.

    bootstrap_timeout  seconds after which prefill gives up a room that no decode server asked for
    transfer_timeout   seconds after which decode gives up a KV transfer that has not come
    """

    needs: tuple[str, ...] = ("configure", "server_env", "prefill_args", "decode_args", "start_lb")

    switch: Switch
    bootstrap_timeout = 30
    transfer_timeout = 45

    @classmethod
    def configure(cls) -> None:
        super().configure()
        cls.switch = Switch(cls.temporary_path("fault-switch-", "switch"))
        cls.server_env = {
            **cls.server_env,
            VARIABLE: str(cls.switch.path),
            BACKEND_VARIABLE: cls._own_backend(),
            "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(cls.bootstrap_timeout),
            "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(cls.transfer_timeout),
        }

    @classmethod
    def _own_backend(cls) -> str:
        """The backend that the test itself names; the faults are added to what it does."""
        args = super().prefill_args()
        return args[args.index(BACKEND) + 1] if BACKEND in args else "tcp"

    @classmethod
    def prefill_args(cls) -> list[str]:
        return super().prefill_args() + [BACKEND, "pdkit.faults.transfer:FaultyTransfer"]

    @classmethod
    def decode_args(cls) -> list[str]:
        return super().decode_args() + [BACKEND, "pdkit.faults.transfer:FaultyTransfer"]

    @classmethod
    def start_lb(cls, command: Sequence[str]) -> Server:
        at = command.index("sglang_router.launch_router")
        with mock.patch.dict(os.environ, {VARIABLE: str(cls.switch.path)}):
            return super().start_lb([*command[:at], "pdkit.faults.load_balancer", *command[at + 1 :]])
