"""Memory that is free on a device."""

import psutil
import torch


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes of memory that are free on a CPU or an NVIDIA GPU; ``None`` on other devices."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
