"""What a measurement ran on, for its report: versions, hardware, threads, date."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion_accel._version import __version__

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "cache-dit", "numpy", "peft", "safetensors")
"""Packages that results may depend on."""


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, hardware, threads and date.

    Args:
        device: Where it ran; with a CUDA device its name is told, without any that of the current one.
    """
    has_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if has_gpu else None,
    }


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Package to version, of this package and those of the names that are installed."""
    found = {name: version for name in names if (version := _version(name)) is not None}
    return {"sgl-diffusion-accel": __version__} | found


def cpu_name() -> str:
    """Model name of the processor, or its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)  # with its build, such as +cu128, which the metadata may lack
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
