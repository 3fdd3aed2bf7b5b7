"""Clocks: on a GPU, events in its queue that are read at the end of a run; elsewhere the host's clock.

An event is a mark that the device passes when everything queued before it is done. So the time between two events is
the device's own, and nothing waits for it while the pipeline runs. Where the device has nothing to do an event is
passed as soon as it is queued, so that times in which only the host works are counted as well.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Takes moments, and tells how much time lies between two of them.

    Attributes:
        name: What kind of clock it is, for the report.
    """

    name: str

    def now(self) -> Any:
        """Takes a moment."""

    def settle(self) -> None:
        """Waits until all moments can be read."""

    def milliseconds(self, begin: Any, end: Any) -> float:
        """Milliseconds from one moment to a later one, once settled."""


class HostClock:
    """The host's clock, for devices that have no queue."""

    name = "host clock"

    def now(self) -> float:
        """Takes a moment, in seconds."""
        return time.perf_counter()

    def settle(self) -> None:
        """Nothing is under way."""

    def milliseconds(self, begin: float, end: float) -> float:
        """Milliseconds between two moments."""
        return (end - begin) * 1000


class DeviceClock:
    """Events in the queue of a device.

    Args:
        device: The device.
        module: Its module of torch, with `Event`, `current_stream` and `synchronize`.
    """

    def __init__(self, device: torch.device, module: Any) -> None:
        self.name = f"events of {device}"
        self._device = device
        self._module = module

    def now(self) -> Any:
        """Puts an event into the queue."""
        event = self._module.Event(enable_timing=True)
        event.record(self._module.current_stream(self._device))
        return event

    def settle(self) -> None:
        """Waits for the device."""
        self._module.synchronize(self._device)

    def milliseconds(self, begin: Any, end: Any) -> float:
        """Milliseconds of the device between two events."""
        return float(begin.elapsed_time(end))


def clock_for(device: torch.device) -> Clock:
    """The clock for what runs on a device: events for CUDA (also AMD's) and XPU, the host's clock for others."""
    if device.type in ("cuda", "xpu"):
        return DeviceClock(device, torch.get_device_module(device))
    return HostClock()


def synchronise(device: torch.device) -> None:
    """Waits for a device, if it has a queue."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
