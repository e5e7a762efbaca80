"""What NVML says of the GPUs that CUDA would show: a stand-in for the driver, under the names of the real module."""

import os
import sys
import unittest
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pynvml
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


def stand_in(driver=True, gpus=GPUS):
    """`pynvml`, of a driver with GPUs, each with 1000 MiB in use by one process; that of the first has no name here."""

    def memory(index):
        total = gpus[index].memory_mib * MIB
        return SimpleNamespace(total=total, free=total - 1000 * MIB)

    def process_name(pid):
        if pid == 100:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return f"program {pid}"

    nvml = Mock(spec=pynvml, NVMLError=pynvml.NVMLError)
    nvml.nvmlInit.side_effect = None if driver else pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    nvml.nvmlDeviceGetCount.return_value = len(gpus)
    nvml.nvmlSystemGetDriverVersion.return_value = "580.159.04"
    nvml.nvmlSystemGetCudaDriverVersion_v2.return_value = 13010
    nvml.nvmlSystemGetProcessName.side_effect = process_name
    for name, answer in {
        "HandleByIndex": lambda index: index,
        "UUID": lambda index: f"GPU-{'abcdefgh'[index]}0",
        "Name": lambda index: gpus[index].name,
        "MemoryInfo": memory,
        "CudaComputeCapability": lambda index: list(gpus[index].capability),
        "ComputeRunningProcesses": lambda i: [SimpleNamespace(pid=100 + i, usedGpuMemory=1000 * MIB if i else None)],
        "PciInfo": lambda index: SimpleNamespace(busId=f"00000000:{index}B:00.0"),
    }.items():
        getattr(nvml, f"nvmlDeviceGet{name}").side_effect = answer
    return nvml


class DriverCase(unittest.TestCase):
    def under(self, function, visible=None, **driver):
        """What a function says where the driver is like that; it leaves NVML closed."""
        nvml = stand_in(**driver)
        with patch.dict(sys.modules, pynvml=nvml):
            result = function({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
        opened = nvml.nvmlInit.call_count if driver.get("driver", True) else 0
        self.assertEqual(nvml.nvmlShutdown.call_count, opened)
        return result


class TestVisibleGpus(DriverCase):
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
            (None, {"driver": False}, "no NVIDIA driver (Driver Not Loaded)"),
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
