"""On which CPU socket the NICs and GPUs of this machine sit."""

from pathlib import Path


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


def gpu_sockets(sysfs: Path = Path("/sys")) -> dict[int, int]:
    """NUMA node by GPU, as NVML numbers them; none where there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        addresses = [pynvml.nvmlDeviceGetPciInfo(handle).busId for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    nodes = {gpu: _numa_node(pci_device(sysfs, address)) for gpu, address in enumerate(addresses)}
    return {gpu: node for gpu, node in nodes.items() if node is not None}


def pci_device(sysfs: Path, address: str | bytes) -> Path:
    """Directory of a PCI device: NVML writes `00000000:1B:00.0`, sysfs `0000:1b:00.0`."""
    text = address.decode() if isinstance(address, bytes) else address
    return sysfs / "bus" / "pci" / "devices" / text.lower()[-12:]
