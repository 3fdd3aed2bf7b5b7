"""Denoising loops of one's own: the loop itself says where it is, and every patch goes by that.

A pipeline of diffusers is read from outside (`locate.py`). A loop that somebody writes by hand cannot be; it says so:

    for t in denoising_steps(scheduler.timesteps, scheduler=scheduler, guidance=4.0):
        with branch("cond"):
            noise = transformer(latents, t, text)

What is entered lives in context variables, so that threads and tasks are apart. A generator that stops in mid-loop
leaves its variables behind for whoever goes on meanwhile; so a loop also knows the frame that it runs in, and counts
there alone.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.frames import Locals, Place, asking, frames_from
from sgl_diffusion_accel.loop.code_loops import loops_around
from sgl_diffusion_accel.loop.step_proof import Schedule
from sgl_diffusion_accel.validate import finite, is_number, names_checked

_TYPE = "for t in denoising_steps(scheduler.timesteps, scheduler=scheduler):"
_ALLOWED = "a tensor of one dimension, such as scheduler.timesteps, or a list of numbers, one a step"


class DenoisingSteps:
    """The steps of a denoising loop; each `for` over it is a run of its own. Made by `denoising_steps`."""

    def __init__(
        self, given: Any, timesteps: Tensor, scheduler: Any, guidance: float | None, boundary: float | None
    ) -> None:
        self._given = given
        self._rest = (timesteps, scheduler, guidance, boundary)

    def __len__(self) -> int:
        return len(self._given)

    def __iter__(self) -> StepIterator:
        return StepIterator(self._given, *self._rest)


class StepIterator:
    """One pass through a denoising loop. It lives exactly as long as the loop, and so does what is kept for its run.

    Attributes:
        timesteps: One for each step, `[S]`.
        scheduler: What steps the latents, or None.
        guidance: The scale with which the loop combines cond and uncond, or None.
        boundary: The timestep below which a second transformer takes over, or None.
        step: Index of the step that is under way; -1 before the first.
        timestep: What the loop was given for it.
        place: The frame that asked for it; None before the first.
        is_run_in_place: Whether calls come from the frame that asks for the steps itself.
        begun: When it began, and `moved`: when it moved last, in a count of all moves.
    """

    def __init__(
        self, given: Any, timesteps: Tensor, scheduler: Any, guidance: float | None, boundary: float | None
    ) -> None:
        self.timesteps = timesteps
        self.scheduler = scheduler
        self.guidance = guidance
        self.boundary = boundary
        self.step = -1
        self.timestep: Any = None
        self.place: Place | None = None
        self.is_run_in_place = False
        self.begun = self.moved = 0
        self._given = given
        self._called: set[int] = set()  # modules of calls that were placed though no frame tells of them

    def __iter__(self) -> StepIterator:
        return self

    def __next__(self) -> Any:
        others = tuple(each for each in _entered.get() if each() not in (None, self))
        if self.step + 1 >= len(self._given):
            self.step, self.timestep = len(self._given), None
            _entered.set(others)
            raise StopIteration
        self.step += 1
        # An element of a tensor is a view: it is known by its place in memory, to whatever function it is handed on.
        self.timestep = self._given[self.step]
        self.place = asking()
        self.moved = next(_moves)
        self.begun = self.begun or self.moved
        self._called.clear()
        _entered.set((*others, weakref.ref(self)))
        return self.timestep

    def step_in(self, frame: FrameType) -> int:
        """The step that the frame which runs the loop is at: `pairwise` asks for one more than it hands out first."""
        loops = loops_around(frame.f_code, frame.f_lasti) or ()
        return self.step - 1 if any("pairwise" in loop.names for loop in loops) else self.step

    def is_around(self, frame: FrameType | None) -> bool:
        """Whether a call from a frame, which is in none that asked for a step, belongs to the loop.

        An ordinary function that asked for the step has returned since, or waits for a call that it has made in another
        thread: the loop goes on. A generator may have stopped: then it is looked for, or whoever it gave the step to.
        """
        if self.place is None or not self.place.may_stop:
            return True
        if self.is_run_in_place:  # whoever goes on meanwhile does so for his own ends
            return False
        schedule = Schedule(self.timesteps)
        return any(self._is_at(value, schedule) for each in frames_from(frame) for value in _values_of(each))

    def _is_at(self, value: Any, schedule: Schedule) -> bool:
        # As `enumerate` and `zip` hand it on.
        if type(value) is tuple and len(value) <= _MOST_IN_A_TUPLE:
            return any(self._is_at(each, schedule) for each in value)
        if isinstance(value, Tensor):
            return value is self.timestep or schedule.index_of(value) == self.step
        # By identity: another variable may hold an equal number.
        return isinstance(value, float) and value is self.timestep

    def is_new(self, module: object) -> bool:
        """Whether a call without a name is the first in this step; asked where no frame tells that it is of the loop.

        A loop that was left in the middle, and is kept by somebody, must not take the calls of others for its own.
        """
        is_new = id(module) not in self._called
        self._called.add(id(module))
        return is_new


_moves = itertools.count(1)
_MOST_IN_A_TUPLE = 8


def _values_of(frame: FrameType) -> list[Any]:
    """Values of a frame's variables."""
    if not frame.f_code.co_nlocals:
        return []
    with Locals(frame) as local:
        return list(local.values())


# Weak: a loop that is left by `break` or an error does not say so. Its iterator goes then, and takes the run with it.
_entered: ContextVar[tuple[weakref.ref[StepIterator], ...]] = ContextVar("denoising_steps", default=())


def loops_entered() -> list[StepIterator]:
    """The denoising loops that this context is in, the one that moved last at the end."""
    return [loop for each in _entered.get() if (loop := each()) is not None]


@names_checked
def denoising_steps(
    timesteps: Tensor | Sequence[float],
    scheduler: Any = None,
    guidance: float | None = None,
    *,
    boundary: float | None = None,
) -> DenoisingSteps:
    """Goes through the timesteps of a denoising loop of one's own, and lets every patch know where the loop is.

    Caches, plans, attention by steps and profiles find the loops of diffusers' pipelines by themselves. In a loop that
    is written by hand they act from the first `for` over this function on. Each `for` is a run of its own, which ends
    with it, however that ends.

    Args:
        timesteps: One for each denoising step, in order: a tensor `[S]` or a list. The loop gets its elements.
        scheduler: What steps the latents, with the timesteps of the run set. A calibrated plan needs it; with it the
            adaptive cache puts right what it has predicted, and weighs steps as the scheduler does.
        guidance: The scale with which the loop combines the branches `"cond"` and `"uncond"` (see `branch`), so that
            their errors are combined in the same way.
        boundary: For two transformers that take turns, such as Wan2.2's: the timestep below which the second one runs.

    Returns:
        An iterable with a length, for `for`, `enumerate`, `zip` or a progress bar.

    Raises:
        ConfigError: There are no timesteps, more than the scheduler has, or a number is not finite.
        ConfigTypeError: Something has a wrong type.

    Example:
        >>> pipe.scheduler.set_timesteps(20)
        >>> for t in denoising_steps(pipe.scheduler.timesteps, scheduler=pipe.scheduler, guidance=4.0):
        ...     with branch("cond"):
        ...         noise = pipe.transformer(latents, t, text).sample
        ...     with branch("uncond"):
        ...         noise = noise * 4.0 - 3.0 * pipe.transformer(latents, t, no_text).sample
        ...     latents = pipe.scheduler.step(noise, t, latents).prev_sample
    """
    given: Any = timesteps
    if isinstance(given, np.ndarray) and given.ndim == 1:
        given = given.tolist()
    schedule = _schedule(given)
    if scheduler is not None:
        if isinstance(scheduler, type) or not callable(getattr(scheduler, "step", None)):
            raise ConfigTypeError(
                f"scheduler is a {_kind(scheduler)}; allowed: a scheduler of diffusers, or what has a step() "
                f"like it. Type: {_TYPE}"
            )
        known = getattr(scheduler, "timesteps", None)
        if isinstance(known, Tensor) and len(known) < len(schedule):
            raise ConfigError(
                f"there are {len(schedule)} timesteps, and the scheduler has {len(known)}: set them first, with "
                f"scheduler.set_timesteps({len(schedule)})."
            )
    given = given if isinstance(given, Tensor) else tuple(given)  # a list may change while the loop runs
    return DenoisingSteps(given, schedule, scheduler, _number("guidance", guidance), _number("boundary", boundary))


def _kind(given: object) -> str:
    """What something is, for an error."""
    return f"class, {given.__name__}" if isinstance(given, type) else type(given).__name__


def _number(name: str, given: Any) -> float | None:
    return None if given is None else finite(name, given, "a finite number, or None")


def _schedule(given: Any) -> Tensor:
    """The timesteps as a tensor `[S]`."""
    if callable(getattr(given, "set_timesteps", None)):
        raise ConfigTypeError(f"timesteps is a scheduler; allowed: {_ALLOWED}. Type: {_TYPE}")
    if isinstance(given, Tensor):
        if given.ndim != 1 or given.is_complex() or given.dtype == torch.bool:
            shown = f"the shape {list(given.shape)} and {given.dtype}"
            raise ConfigTypeError(f"timesteps has {shown}; allowed: {_ALLOWED}.")
        schedule = given
    elif isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        wrong = [each for each in given if not is_number(each)]
        if wrong:
            raise ConfigTypeError(f"timesteps holds {wrong[0]!r}, which is no number; allowed: {_ALLOWED}.")
        schedule = torch.tensor([float(each) for each in given], dtype=torch.float32)
    else:
        raise ConfigTypeError(
            f"timesteps is a {type(given).__name__}; allowed: {_ALLOWED}. Where it is an iterator, type: "
            "denoising_steps(list(timesteps))"
        )
    if len(schedule) == 0:
        raise ConfigError(f"timesteps is empty; allowed: {_ALLOWED}.")
    # On another device the check would wait for it.
    if schedule.device.type == "cpu" and not bool(schedule.isfinite().all()):
        raise ConfigError("timesteps holds a number that is not finite.")
    return schedule
