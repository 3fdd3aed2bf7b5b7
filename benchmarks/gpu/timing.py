"""Times of the denoising steps of a run, on the device and on the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from sgl_diffusion_accel.clocks import clock_for, synchronise

from .models import Built, Place, block_lists

_GIB = 2**30


class StepTimes(Protocol):
    """Takes the time at the end of each step; a pipeline's `callback_on_step_end`."""

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Takes the time and hands back the tensors as they are."""

    def milliseconds(self) -> list[float]:
        """One time a step, from the second step on."""


class DeviceTimes:
    """Times between the ends of the steps as the device sees them, by events; nothing waits meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._clock, self._marks = clock_for(device), list[Any]()

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Marks the end of a step in the device's queue."""
        del pipe, step, timestep
        self._marks.append(self._clock.now())
        return tensors

    def milliseconds(self) -> list[float]:
        """One time a step, from the second step on."""
        self._clock.settle()
        return [self._clock.milliseconds(begin, end) for begin, end in pairwise(self._marks)]


@dataclass
class HostTimes:
    """The host's own time for a step: from an empty queue until all that the step asks of the device is queued.

    It waits for the device after each step. In a step that asks for more than the queue holds (about a thousand
    kernels) the host waits within the step, too, so that the time of a computed step says little.
    """

    device: torch.device
    begin: float | None = None
    spans: list[float] = field(default_factory=list)

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Takes the time of a step, and waits until the device is idle before the next one begins."""
        del pipe, step, timestep
        now = time.perf_counter()
        if self.begin is not None:
            self.spans.append((now - self.begin) * 1e3)
        synchronise(self.device)
        self.begin = time.perf_counter()
        return tensors

    def milliseconds(self) -> list[float]:
        """One time a step, from the second step on."""
        return self.spans


@dataclass(frozen=True)
class Run:
    """One run of a pipeline: its output, the times of its steps from the second on, seconds, most memory allocated."""

    output: Tensor
    milliseconds: list[float]
    seconds: float
    peak_gib: float | None


def run(built: Built, place: Place, steps: int, clock: StepTimes) -> Run:
    """Runs a pipeline, always from the same noise."""
    synchronise(place.device)
    is_cuda = place.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(place.device)
    begin = time.perf_counter()
    generator = torch.Generator("cpu").manual_seed(0)
    output = built.pipe(
        **built.call, num_inference_steps=steps, generator=generator, callback_on_step_end=clock, return_dict=False
    )[0]
    synchronise(place.device)
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated(place.device) / _GIB if is_cuda else None
    return Run(output, clock.milliseconds(), seconds, peak)


@contextmanager
def computed_by_last_block(built: Built) -> Iterator[list[bool]]:
    """A list that says afterwards, for each denoising step, whether the last block ran: for caches without statistics.

    Each call of the transformer must belong to a step; all calls of a step decide alike.
    """
    calls: list[bool] = []

    def begun(*ignored: Any) -> None:
        del ignored
        calls.append(False)

    def ran(*ignored: Any) -> None:
        del ignored
        calls[-1] = True

    transformer = built.pipe.transformer
    hooks = [transformer.register_forward_pre_hook(begun)]
    hooks += [block_lists(transformer)[-1][-1].register_forward_pre_hook(ran)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def relative_difference(output: Tensor, reference: Tensor) -> float:
    """‖output - reference‖ / ‖reference‖."""
    return float((output.float() - reference.float()).norm() / reference.float().norm())


def per_step(calls: Sequence[bool], steps: int) -> list[bool]:
    """One entry for each step, from one for each call: computed if one of its calls was."""
    each = max(1, len(calls) // steps)
    return [any(calls[begin : begin + each]) for begin in range(0, steps * each, each)]


def summary(device: Run, host: Run | None, computed: Sequence[bool]) -> dict[str, Any]:
    """The row of a result.

    Args:
        device: A run with a `DeviceTimes`.
        host: The same with a `HostTimes`.
        computed: Whether each step was computed, the first one included.
    """
    row: dict[str, Any] = {"steps": "".join("x" if each else "." for each in computed)}
    for name, measured in (("device", device), ("host", host)):
        if measured is None:
            continue
        for kind, wanted in (("computed", True), ("skipped", False)):
            chosen = [ms for ms, flag in zip(measured.milliseconds, computed[1:], strict=True) if flag is wanted]
            row[f"{kind}_{name}_ms"] = statistics.median(chosen) if chosen else None
        row[f"{name}_ms"] = [round(ms, 4) for ms in measured.milliseconds]
    finite = bool(torch.isfinite(device.output.float()).all())
    return row | {"seconds": device.seconds, "peak_gib": device.peak_gib, "finite": finite}
