"""What a measurement ran on, for its report."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("sgl-diffusion-accel", "torch", "diffusers", "transformers", "accelerate", "cache-dit", "numpy")


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, hardware, threads and date.

    Args:
        device: Where it ran; with a CUDA device its name is told, without any that of the current one.
    """
    has_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if has_gpu else None,
    }


def cpu_name() -> str:
    """Model name of the processor, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
