"""On which CPU socket the NICs and GPUs of this machine sit."""

import os
from collections.abc import Mapping
from pathlib import Path

from pdkit.core.gpus import NoDriver, visible_handles


def _numa_node(device: Path) -> int | None:
    try:
        node = int((device / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def nic_sockets(sysfs: Path = Path("/sys")) -> dict[str, int]:
    """NUMA node by RDMA device, of those that the kernel knows a node for."""
    nodes = {path.name: _numa_node(path / "device") for path in sorted((sysfs / "class" / "infiniband").glob("*"))}
    return {name: node for name, node in nodes.items() if node is not None}


def gpu_sockets(sysfs: Path = Path("/sys"), environ: Mapping[str, str] = os.environ) -> dict[int, int]:
    """NUMA node by GPU, as CUDA numbers the visible ones; none where there is no NVIDIA driver."""
    import pynvml

    try:
        with visible_handles(environ) as handles:
            addresses = [pynvml.nvmlDeviceGetPciInfo(handle).busId for handle in handles]
    except NoDriver:
        return {}
    nodes = {gpu: _numa_node(pci_device(sysfs, address)) for gpu, address in enumerate(addresses)}
    return {gpu: node for gpu, node in nodes.items() if node is not None}


def pci_device(sysfs: Path, address: str | bytes) -> Path:
    """Directory of a PCI device: NVML writes `00000000:1B:00.0`, sysfs `0000:1b:00.0`."""
    text = address.decode() if isinstance(address, bytes) else address
    return sysfs / "bus" / "pci" / "devices" / text.lower()[-12:]
