"""Clocks, and memory at checkpoints."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sgl_diffusion_accel.clocks import DeviceClock, HostClock, clock_for, synchronise
from sgl_diffusion_accel.profiling.recording import memory
from sgl_diffusion_accel.profiling.recording.memory import host_anonymous_mb, reset_peak, take_checkpoint

CPU = torch.device("cpu")


class Device:
    """A device whose queue runs behind: an event is passed when the device is waited for."""

    def __init__(self) -> None:
        self.queue: list[Any] = []
        self.waits = 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at: float | None = None

            def record(self, stream: str) -> None:
                assert stream == "stream of cuda:0"
                device.queue.append(self)

            def elapsed_time(self, later: Any) -> float:
                assert self.at is not None, "read before the device has passed it"
                return float(later.at - self.at)

        self.Event = Event

    def current_stream(self, device: torch.device) -> str:
        return f"stream of {device}"

    def synchronize(self, device: torch.device) -> None:
        self.waits += 1
        for moment, event in enumerate(self.queue):
            event.at = 10.0 * moment


def test_events_are_read_after_one_wait() -> None:
    clock = DeviceClock(torch.device("cuda:0"), device := Device())
    begin, middle, end = (clock.now() for _ in range(3))
    assert device.waits == 0
    clock.settle()
    assert clock.milliseconds(begin, middle) == 10.0
    assert clock.milliseconds(begin, end) == 20.0
    assert device.waits == 1
    assert clock.name == "events of cuda:0"


def test_host_clock_counts_milliseconds() -> None:
    clock = HostClock()
    begin = clock.now()
    time.sleep(0.02)
    clock.settle()
    assert 20 <= clock.milliseconds(begin, clock.now()) < 2000


def test_clock_goes_with_the_device() -> None:
    assert isinstance(clock_for(CPU), HostClock)
    assert isinstance(clock_for(torch.device("meta")), HostClock)
    clock = clock_for(torch.device("cuda:1"))
    assert isinstance(clock, DeviceClock)
    assert clock.name == "events of cuda:1"


def test_nothing_is_waited_for_on_a_cpu() -> None:
    synchronise(CPU)
    reset_peak(CPU)


def test_the_device_itself_is_waited_for_and_not_the_current_one(monkeypatch: Any) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    synchronise(torch.device("cuda:1"))
    assert waited == [torch.device("cuda:1")]


def test_checkpoint_on_a_cpu_has_the_host_alone() -> None:
    taken = take_checkpoint("here", CPU, 0.0)
    assert (taken.name, taken.allocated_mb, taken.peak_reserved_mb) == ("here", 0.0, 0.0)
    assert taken.peak_host_anon_mb == pytest.approx(host_anonymous_mb(), rel=0.2)
    assert take_checkpoint("later", CPU, 1e9).peak_host_anon_mb == 1e9


def test_host_memory_is_zero_where_the_system_does_not_tell(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    assert host_anonymous_mb() == 0.0


def test_checkpoint_of_a_device_is_in_mebibytes(monkeypatch: Any) -> None:
    counters = {
        "memory_allocated": lambda _: 3 * 2**20,
        "memory_reserved": lambda _: 4 * 2**20,
        "max_memory_allocated": lambda _: 5 * 2**20,
    }
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(**counters))
    taken = take_checkpoint("here", torch.device("cuda:0"), 0.0)
    assert (taken.allocated_mb, taken.reserved_mb, taken.peak_allocated_mb, taken.peak_reserved_mb) == (3, 4, 5, 0)


@pytest.mark.gpu
def test_checkpoint_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda is not available")
    device = torch.device("cuda")
    kept = torch.zeros(2**22, device=device)
    taken = take_checkpoint("here", device, 0.0)
    assert taken.allocated_mb >= 16
    assert taken.peak_reserved_mb >= taken.reserved_mb >= 16
    del kept
