"""The GPUs that CUDA would show, by NVML: no CUDA context is made, and nothing on them is touched."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

VISIBLE = "CUDA_VISIBLE_DEVICES"


class NoDriver(Exception):
    """There is no NVIDIA driver; the message is one line."""


@contextmanager
def visible_handles(environ: Mapping[str, str]) -> Iterator[list]:
    """NVML handles of the GPUs that CUDA_VISIBLE_DEVICES leaves, in CUDA's order. Raises NoDriver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoDriver(f"no NVIDIA driver ({error})") from None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
        yield [handles[i] for i in visible_indices(len(handles), uuids, environ.get(VISIBLE))]
    finally:
        pynvml.nvmlShutdown()


def visible_indices(count: int, uuids: Sequence[str], cuda_visible_devices: str | None) -> list[int]:
    """Indices of the devices that CUDA would show, in its order; its list ends at the first entry that names none."""
    if cuda_visible_devices is None:
        return list(range(count))
    indices = []
    for entry in cuda_visible_devices.split(","):
        entry = entry.strip()
        by_uuid = [i for i, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        if entry.isdecimal() and int(entry) < count:
            indices.append(int(entry))
        elif len(by_uuid) == 1:
            indices.append(by_uuid[0])
        else:
            break
    return indices
