"""What NVML says of the GPUs that CUDA would show: a stand-in for the driver, under the names of the real module."""

import os
import sys
import unittest
from types import SimpleNamespace
from unittest.mock import patch

from cases import FolderCase
from pdkit.core import gpus, numa
from pdkit.core.ci_register import register_cpu_ci
from pdkit.core.gpus import Gpu, GpuProcess, visible_gpus

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

H200 = Gpu("NVIDIA H200", 143_771, (9, 0), 142_771)
H100 = Gpu("NVIDIA H100 80GB HBM3", 81_559, (9, 0), 80_559)
B200 = Gpu("NVIDIA B200", 183_359, (10, 0), 182_359)
GPUS = (H200, H100, B200)
MIB = 2**20


class FakeNVML:
    """A driver with GPUS, each with 1000 MiB in use by one process that has no name here."""

    class NVMLError(Exception):
        pass

    def __init__(self, driver=True, gpus=GPUS):
        self._driver, self._gpus, self._open = driver, gpus, 0

    def nvmlInit(self):
        if not self._driver:
            raise self.NVMLError("driver not loaded")
        self._open += 1

    def nvmlShutdown(self):
        self._open -= 1

    def nvmlDeviceGetCount(self):
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, index):
        return f"GPU-{'abcdefgh'[index]}0"

    def nvmlDeviceGetName(self, index):
        return self._gpus[index].name

    def nvmlDeviceGetMemoryInfo(self, index):
        total = self._gpus[index].memory_mib * MIB
        return SimpleNamespace(total=total, free=total - 1000 * MIB)

    def nvmlDeviceGetCudaComputeCapability(self, index):
        return list(self._gpus[index].capability)

    def nvmlDeviceGetComputeRunningProcesses(self, index):
        return [SimpleNamespace(pid=100 + index, usedGpuMemory=1000 * MIB if index else None)]

    def nvmlDeviceGetPciInfo(self, index):
        return SimpleNamespace(busId=f"00000000:{index}B:00.0")

    def nvmlSystemGetProcessName(self, pid):
        if pid > 100:
            return f"program {pid}"
        raise self.NVMLError("Not Found")

    def nvmlSystemGetDriverVersion(self):
        return "580.159.04"

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return 13010


class DriverCase(unittest.TestCase):
    def under(self, function, visible=None, **driver):
        """What a function says where the driver is like that; it leaves NVML closed."""
        fake = FakeNVML(**driver)
        with patch.dict(sys.modules, pynvml=fake):
            result = function({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
        self.assertEqual(fake._open, 0)
        return result


class TestVisibleGpus(DriverCase):
    def test_the_stand_in_has_no_name_that_pynvml_lacks(self):
        import pynvml

        names = {name for name in vars(FakeNVML) if not name.startswith("_")}
        self.assertEqual(names - set(dir(pynvml)), set())

    def test_only_those_that_cuda_shows(self):
        for value, expected in (
            (None, GPUS),
            ("", ()),
            ("-1", ()),
            ("1", (H100,)),
            ("2, 0", (B200, H200)),
            ("0,-1,1", (H200,)),
            ("0,7,1", (H200,)),
            ("GPU-b0,GPU-a", (H100, H200)),
            ("GPU-", ()),
        ):
            with self.subTest(value):
                self.assertEqual(self.under(visible_gpus, value), expected)
        self.assertEqual(self.under(visible_gpus, driver=False), ())


class TestEnvironmentCheck(DriverCase):
    def test_gpus_and_driver(self):
        seen = self.under(gpus.observe, "1,0")
        self.assertEqual((seen["driver"], seen["driver_cuda"], seen["gpu_problem"]), ("580.159.04", (13, 1), None))
        first, second = seen["gpus"]
        self.assertEqual((first.name, first.memory_mib, first.capability), (H100.name, H100.memory_mib, (9, 0)))
        self.assertEqual(first.free_mib, H100.memory_mib - 1000)
        self.assertEqual(first.processes, (GpuProcess(101, "program 101", 1000),))
        self.assertEqual(second.processes, (GpuProcess(100, "a process outside this container", 0),))

    def test_why_there_is_none(self):
        for visible, driver, why in (
            ("", {}, "CUDA_VISIBLE_DEVICES= hides all 3"),
            (None, {"gpus": ()}, "the driver finds none"),
            (None, {"driver": False}, "no NVIDIA driver (driver not loaded)"),
        ):
            seen = self.under(gpus.observe, visible, **driver)
            self.assertEqual((seen.get("gpus", ()), seen["gpu_problem"]), ((), why))


class TestSockets(DriverCase, FolderCase):
    def test_gpus_are_numbered_as_cuda_does(self):
        for gpu, node in ((0, "0"), (1, "1"), (2, "-1")):
            self.write(f"bus/pci/devices/0000:{gpu}b:00.0/numa_node", f"{node}\n")
        for visible, expected in ((None, {0: 0, 1: 1}), ("1,0", {0: 1, 1: 0}), ("2,1", {1: 1})):
            self.assertEqual(self.under(lambda environ: numa.gpu_sockets(self.root, environ), visible), expected)

    @unittest.skipIf(os.path.exists("/dev/nvidiactl"), "this machine has a driver")
    def test_machine_without_driver(self):
        self.assertEqual(numa.gpu_sockets(), {})


if __name__ == "__main__":
    unittest.main()
