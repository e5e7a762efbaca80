"""Keeps the KV transfers of the embedded engine waiting, or has them refused, while a file says so."""

from pdkit.checks.base import Checks
from pdkit.engine.test_backends import HOLD_FILE_VARIABLE, Valve

HELD_TRANSFER = ["--disaggregation-transfer-backend", "pdkit.engine.test_backends:HeldTransfer"]


class TransferValve(Checks):
    """For the embedded engine: `valve` rules the servers whose transfer backend is `HELD_TRANSFER`."""

    needs: tuple[str, ...] = ("configure", "server_env")

    valve = None

    @classmethod
    def configure(cls) -> None:
        super().configure()
        cls.valve = Valve(cls.temporary_path("hand-overs-", "valve"))
        cls.valve.turn(None)
        cls.server_env = {**cls.server_env, HOLD_FILE_VARIABLE: str(cls.valve.path)}


class HeldTransfers(TransferValve):
    """KV transfers wait until the event strikes. Put it between RecoveryChecks and the servers."""

    needs: tuple[str, ...] = ("prefill_args",)

    @classmethod
    def prefill_args(cls) -> list[str]:
        return super().prefill_args() + HELD_TRANSFER
