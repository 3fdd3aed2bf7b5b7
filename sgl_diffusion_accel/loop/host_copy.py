"""Values of a whole run that are on their way from the device."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a small tensor in the host's memory, made without waiting for the device.

    The copy is queued where it is made; the first reading waits until it has been carried out, not for what was queued
    on the device later. So a copy that is made before a step and read at the next one costs no synchronisation.

    Args:
        values: A float32 tensor of one dimension, on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=torch.float32, device="cpu", pin_memory=True)
            self._host = pinned.numpy()
            pinned.copy_(values, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()
        else:
            host = torch.empty(values.shape, dtype=torch.float32, device="cpu")
            self._host = host.numpy()
            host.copy_(values)

    def __getitem__(self, index: int) -> float:
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        return float(self._host[index])
