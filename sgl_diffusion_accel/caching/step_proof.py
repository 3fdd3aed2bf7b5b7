"""Which step of its schedule a pipeline's loop is at: proved from its variables, never guessed.

A loop over a tensor hands out views of its elements: where such a view lies in memory is the step, without reading a
value from the device. Only what the running loop has set counts, since a variable may be left over from another loop.
Where nothing is such a view (a loop over `timesteps.tolist()`, over `range(len(timesteps))`), the values decide if one
step alone has them, or the index of the only loop that is around the call if that loop runs over the timesteps.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel.caching.code_loops import CodeLoop, loops_around

_COUNTING = {"enumerate", "range", "len", "timesteps", "self", "scheduler", "tolist", "cpu", "progress_bar", "tqdm"}


class Schedule:
    """The timesteps of a run, and where it is known the noise level of each.

    Args:
        timesteps: `[S]`.
        sigmas: The scheduler's, `[at least S + 1]`, the last S + 1 of them those of the run; None if it has none.
    """

    def __init__(self, timesteps: Tensor, sigmas: Tensor | None = None) -> None:
        self.timesteps = timesteps
        self._steps = len(timesteps)
        self._tables = [(timesteps, _memory_of(timesteps), 0)]
        if sigmas is not None:
            self._tables.append((sigmas, _memory_of(sigmas), len(sigmas) - 1 - self._steps))

    def __len__(self) -> int:
        return self._steps

    def index_of(self, candidate: Tensor) -> int | None:
        """The step whose timestep or noise level a tensor is a view of, also where it is expanded."""
        size = candidate.numel()
        if size == 0 or candidate.layout is not torch.strided or (size > 1 and any(candidate.stride())):
            return None
        memory = _memory_of(candidate)
        for table, its_memory, before in self._tables:
            if memory == its_memory and candidate.dtype == table.dtype and candidate.device == table.device:
                offset, stride = int(candidate.storage_offset() - table.storage_offset()), table.stride(0)
                index = offset // stride - before if stride and offset % stride == 0 else -1
                if 0 <= index < self._steps:
                    return index
        return None


def schedule_of(timesteps: Tensor, scheduler: Any) -> Schedule:
    """A schedule with the noise levels of its scheduler, if they belong to it."""
    sigmas = getattr(scheduler, "sigmas", None)
    fits = isinstance(sigmas, Tensor) and sigmas.ndim == 1 and len(sigmas) > len(timesteps)
    return Schedule(timesteps, sigmas if fits else None)


def proved_step(frame: FrameType, local: Mapping[str, Any], schedule: Schedule, passed: Iterable[Any]) -> int | None:
    """Tells the step that a function is at.

    Args:
        frame: Of the function.
        local: Its variables.
        schedule: Of the run.
        passed: What the transformer is given.

    Returns:
        The step, or None where nothing proves one.
    """
    loops = loops_around(frame.f_code, frame.f_lasti)
    found = _indices(schedule, [local.get(name) for loop in loops or () for name in loop.targets])
    if len(found) == 1 or (len(found) == 2 and found[1] == found[0] + 1):  # the second a loop over pairs of neighbours
        return found[0]
    found = _indices(schedule, passed)
    if len(found) == 1 or loops is None:
        return found[0] if len(found) == 1 else None
    # A function without a loop around the call has been given the step by its caller: any of its variables tells.
    names: Iterable[str] = {name for loop in loops for name in loop.stored} if loops else local
    found = _indices(schedule, [local.get(name) for name in names])
    if found:
        return found[0] if len(found) == 1 else None
    step = _by_value(loops, local, schedule.timesteps)
    return _by_index(loops, local, schedule) if step is None else step


def _indices(schedule: Schedule, candidates: Iterable[Any]) -> list[int]:
    """The steps that candidates are of, each once, in their order."""
    found = (schedule.index_of(each) for each in candidates if isinstance(each, Tensor))
    return list(dict.fromkeys(index for index in found if index is not None))


def _by_value(loops: Sequence[CodeLoop], local: Mapping[str, Any], timesteps: Tensor) -> int | None:
    kind = float if timesteps.is_floating_point() else int
    numbers = [local[name] for loop in loops for name in loop.targets if type(local.get(name)) is kind]
    if not numbers or (kind is int and len(numbers) > 1):  # a count may be equal to a timestep
        return None
    values = _values_of(timesteps)
    found = {index for number in numbers for index, value in enumerate(values) if value == number}
    return found.pop() if len(found) == 1 else None


def _by_index(loops: Sequence[CodeLoop], local: Mapping[str, Any], schedule: Schedule) -> int | None:
    if len(loops) != 1 or not loops[0].is_plain:
        return None
    (loop,) = loops
    others = [local.get(name) for name in loop.names - _COUNTING]
    is_over_steps = "timesteps" in loop.names or others
    if not is_over_steps or any(type(each) is not int or each != len(schedule) for each in others):
        return None
    if not {"enumerate", "range"} & loop.names:
        return None
    index = next((local[name] for name in loop.targets if type(local.get(name)) is int), None)
    return index if index is not None and 0 <= index < len(schedule) else None


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_known_values: dict[int, tuple[weakref.ref[Tensor], list[float]]] = {}


def _values_of(timesteps: Tensor) -> list[float]:
    """The timesteps on the host; copied once a run, by a pipeline that has copied them itself."""
    known = _known_values.get(id(timesteps))
    if known is None or known[0]() is not timesteps:
        key = id(timesteps)
        known = _known_values[key] = (
            weakref.ref(timesteps, lambda _: _known_values.pop(key, None)),
            timesteps.tolist(),
        )
    return known[1]
