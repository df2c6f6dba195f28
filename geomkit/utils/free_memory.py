"""Memory that is free on a device."""

import psutil
import torch


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes of memory that are free on a CPU or an NVIDIA GPU; ``None`` on other devices.

    Limits of a container are not seen.
    """
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for later tensors
    return int(torch.cuda.mem_get_info(device)[0]) + kept
