"""NVTX ranges for Nsight Systems, and the switch of its capture."""

from __future__ import annotations

from typing import Any

import torch

from sgl_diffusion_accel.errors import ConfigError


class NvtxEmitter:
    """Marks ranges with NVTX, and tells Nsight Systems when to record (`--capture-range=cudaProfilerApi`)."""

    def prepare(self) -> None:
        """Nothing: Nsight Systems has been set up before the process began."""

    def start(self, label: str) -> None:  # noqa: ARG002
        """Begins the capture."""
        self._profiler().cudaProfilerStart()

    def stop(self) -> None:
        """Ends the capture."""
        self._profiler().cudaProfilerStop()

    def push(self, name: str) -> None:
        """Opens a range."""
        torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]

    def pop(self) -> None:
        """Closes the last one."""
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    def _profiler(self) -> Any:
        return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def refuse_without_cuda() -> None:
    """Raises ConfigError where there are no NVTX ranges, since PyTorch would raise in mid-run."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "nvtx=True needs a CUDA device, and torch.cuda.is_available() is False here. For ranges that need none, "
            "leave nvtx out: the torch profiler's trace has the same ones."
        )
