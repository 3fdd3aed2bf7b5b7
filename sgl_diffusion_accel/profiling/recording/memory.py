"""Memory at a moment: the device's allocator, and the host's anonymous memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class MemoryCheckpoint:
    """Memory at one moment of a run, in MiB. What the machine does not tell is 0.

    Attributes:
        name: When it was taken, such as `"after_DenoisingStage"`.
        allocated_mb: In tensors on the device.
        reserved_mb: Held by PyTorch's allocator.
        peak_allocated_mb: The most that was allocated since the process began, or since the peak was last reset.
        peak_reserved_mb: The most that was reserved.
        peak_host_anon_mb: The most anonymous host memory of the checkpoints so far (Linux).
    """

    name: str
    allocated_mb: float
    reserved_mb: float
    peak_allocated_mb: float
    peak_reserved_mb: float
    peak_host_anon_mb: float


def take_checkpoint(name: str, device: torch.device, host_peak_mb: float) -> MemoryCheckpoint:
    """Takes a checkpoint. The counters are the allocator's own, on the host: nothing waits for the device.

    Args:
        name: When it is taken.
        device: The device.
        host_peak_mb: The most anonymous host memory so far.
    """
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)

    def read(counter: str) -> float:
        found = getattr(module, counter, None)
        return 0.0 if found is None else float(found(device)) / 2**20

    return MemoryCheckpoint(
        name,
        allocated_mb=read("memory_allocated"),
        reserved_mb=read("memory_reserved"),
        peak_allocated_mb=read("max_memory_allocated"),
        peak_reserved_mb=read("max_memory_reserved"),
        peak_host_anon_mb=max(host_peak_mb, host_anonymous_mb()),
    )


def reset_peak(device: torch.device) -> None:
    """Sets the device's peaks to what is in use now."""
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    reset = getattr(module, "reset_peak_memory_stats", None)
    if reset is not None:
        reset(device)


def host_anonymous_mb() -> float:
    """Anonymous memory of this process that is in RAM, in MiB; 0 where the system does not tell."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(found[0]) / 1024 if found else 0.0
