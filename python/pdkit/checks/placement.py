"""On which GPUs prefill and decode are, by the driver, against the plan."""

import os
from collections.abc import Sequence

import psutil

from pdkit.checks.accounting.checks import unaccounted
from pdkit.checks.base import Checks
from pdkit.core.gpus import Gpu, observe
from pdkit.core.processes import descendants


def used_gpus(pid: int, gpus: Sequence[Gpu]) -> list[int]:
    tree = {pid, *(child.pid for child in descendants(psutil.Process(pid)))}
    return [index for index, gpu in enumerate(gpus) if tree & {process.pid for process in gpu.processes}]


class PlacementChecks(Checks):
    """The servers use the GPUs that they are planned on, and no others."""

    needs: tuple[str, ...] = ("process_prefill", "process_decode", "prefill_gpus", "decode_gpus")

    @unaccounted
    def test_servers_are_on_the_gpus_of_the_plan(self) -> None:
        observed = observe(os.environ)
        gpus = observed.get("gpus", ())
        planned = {"prefill": list(self.prefill_gpus), "decode": list(self.decode_gpus)}
        processes = {"prefill": self.process_prefill, "decode": self.process_decode}
        found = {name: used_gpus(process.pid, gpus) for name, process in processes.items() if process}
        print(f"GPUs in use, as the driver reports them: {found}", flush=True)
        if not any(found.values()):
            problem = observed.get("gpu_problem") or "in a container it may know them by other numbers"
            self.skipTest(f"the driver names no process of ours: {problem}")
        self.assertEqual(found, planned)
