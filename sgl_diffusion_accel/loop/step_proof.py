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

from sgl_diffusion_accel.loop.code_loops import CodeLoop, loops_around

# All that an iterable which counts steps may be made of. Any other name may stand for something else that is counted:
# tiles, frames, segments.
_COUNTING = {"enumerate", "range", "len", "timesteps", "self", "scheduler", "tolist", "cpu", "progress_bar", "tqdm"}
_COUNT = "num_inference_steps"
_CURRENT = ("t", "timestep", "t_cur", "t_curr", "cur_t", "current_timestep", "sigma", "time")
"""Names under which a function holds the timestep that it is at. One that is held under another name may be the next
one, or the one before."""


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
        # `t.expand(batch)` is still one element: all of its strides are 0.
        if size == 0 or candidate.layout is not torch.strided or (size > 1 and any(candidate.stride())):
            return None
        memory = _memory_of(candidate)
        for table, its_memory, before in self._tables:
            # An address says nothing on another device, and an offset nothing in another dtype.
            if memory == its_memory and candidate.dtype == table.dtype and candidate.device == table.device:
                offset, stride = int(candidate.storage_offset() - table.storage_offset()), table.stride(0)
                index = offset // stride - before if stride and offset % stride == 0 else -1
                if 0 <= index < self._steps:
                    return index
        return None

    def has_any(self, candidates: Iterable[object]) -> bool:
        """Whether one of several things is of a step."""
        return any(isinstance(each, Tensor) and self.index_of(each) is not None for each in candidates)


def schedule_of(timesteps: Tensor, scheduler: Any) -> Schedule:
    """A schedule with the noise levels of its scheduler, if it is sure which of them belong to it."""
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
        return Schedule(timesteps)
    known = getattr(scheduler, "timesteps", ())
    first = 0 if len(known) == len(timesteps) else first_of(timesteps, known)
    if first is None or len(sigmas) != len(known) + 1:
        return Schedule(timesteps)
    return Schedule(timesteps, sigmas[first : first + len(timesteps) + 1])


def first_of(timesteps: Tensor, known: Any) -> int | None:
    """Where in a scheduler's timesteps those of a run begin, told by where they lie in memory; None if they do not."""
    if not isinstance(known, Tensor) or known.ndim != 1 or known.dtype != timesteps.dtype:
        return None
    if _memory_of(known) != _memory_of(timesteps) or timesteps.stride(0) != known.stride(0) or not known.stride(0):
        return None
    first = int(timesteps.storage_offset() - known.storage_offset()) // known.stride(0)
    return first if 0 <= first <= len(known) - len(timesteps) else None


def proved_step(frame: FrameType, local: Mapping[str, Any], schedule: Schedule, passed: Iterable[Any]) -> int | None:
    """Tells the step that a function is at.

    Args:
        frame: Of the function.
        local: Its variables.
        schedule: Of the run.
        passed: What the transformer is given.

    Returns:
        The step, or None where nothing proves one, or one thing speaks against another.
    """
    loops = loops_around(frame.f_code, frame.f_lasti)
    targets = _indices(schedule, [local.get(name) for loop in loops or () for name in loop.targets])
    if len(targets) == 2 and targets[1] == targets[0] + 1:  # a loop over pairs of neighbours
        targets = targets[:1]
    given = _indices(schedule, passed)
    if len(targets) == 1 and (not given or targets[0] in given):  # a model may be told the next step as well
        return targets[0]
    # Elements that disagree prove nothing: in `for k, following in enumerate(timesteps[1:])` it is the next one.
    if targets or given or loops is None:
        return given[0] if len(given) == 1 and not targets else None
    held = _by_name(loops, local, schedule)
    if held is not None:
        return held
    for way in (_by_row, _by_value, _by_index):
        step = way(loops, local, schedule)
        if step is not None:
            return step
    return None


def _by_name(loops: Sequence[CodeLoop], local: Mapping[str, Any], schedule: Schedule) -> int | None:
    """The step of an element that a variable holds, set in this turn or given by the caller.

    It counts under a name that means the present step, or where it is the only one and a loop counts the same.
    """
    # A helper without a loop of its own holds nothing of an earlier turn: all of its variables count.
    names: Iterable[str] = {name for loop in loops for name in loop.fresh} if loops else local
    held = {name: local[name] for name in names if isinstance(local.get(name), Tensor)}
    indices = {name: index for name, value in held.items() if (index := schedule.index_of(value)) is not None}
    counted = {local.get(name) for loop in loops for name in loop.targets if type(local.get(name)) is int}
    found = {index for name, index in indices.items() if name in _CURRENT} or set(indices.values()) & counted
    is_sure = len(found) == 1 and (len(set(indices.values())) == 1 or any(name in _CURRENT for name in indices))
    return found.pop() if is_sure else None


def _indices(schedule: Schedule, candidates: Iterable[Any]) -> list[int]:
    """The steps that candidates are of, each once, in their order."""
    found = (schedule.index_of(each) for each in candidates if isinstance(each, Tensor))
    return list(dict.fromkeys(index for index in found if index is not None))


def _by_row(loops: Sequence[CodeLoop], local: Mapping[str, Any], schedule: Schedule) -> int | None:
    """The row of a matrix that a loop runs over: a timestep for each frame, as in diffusion forcing.

    Only where it has as many rows as there are steps. Each frame takes all steps, one a row at most, so that then all
    frames are at the same one; where they go one after another, rows are more, and no step is that of all.
    """
    for loop in loops:
        rows = [each for name in loop.targets if isinstance(each := local.get(name), Tensor) and each.ndim == 1]
        for matrix in (each for name in loop.names if isinstance(each := local.get(name), Tensor)):
            if loop.is_plain and len(rows) == 1 and matrix.ndim == 2 and len(matrix) == len(schedule):
                return Schedule(matrix[:, 0]).index_of(rows[0][:1])
    return None


def _by_value(loops: Sequence[CodeLoop], local: Mapping[str, Any], schedule: Schedule) -> int | None:
    timesteps = schedule.timesteps
    kind = float if timesteps.is_floating_point() else int
    numbers = [local[name] for loop in loops for name in loop.targets if type(local.get(name)) is kind]
    if not numbers or (kind is int and len(numbers) > 1):  # a count may be equal to a timestep
        return None
    values = _values_of(timesteps)
    found = {index for number in numbers for index, value in enumerate(values) if value == number}
    return found.pop() if len(found) == 1 else None


def _by_index(loops: Sequence[CodeLoop], local: Mapping[str, Any], schedule: Schedule) -> int | None:
    """The count of the only loop around the call, if that loop counts the timesteps."""
    # Of two loops one counts something else, such as tiles, and nothing tells which.
    if len(loops) != 1 or not loops[0].is_plain:
        return None
    (loop,) = loops
    own = local.get("timesteps")
    # A list of another length is a part of the schedule, or none of it: its count does not begin at the first step.
    lengths = [len(own) if isinstance(own, (Tensor, list, tuple)) else None] if "timesteps" in loop.names else []
    lengths += [local.get(_COUNT)] if _COUNT in loop.names else []
    is_over_steps = bool(lengths) and all(length in (None, len(schedule)) for length in lengths)
    if not is_over_steps or loop.names - _COUNTING - {_COUNT} or not {"enumerate", "range"} & loop.names:
        return None
    index = next((local[name] for name in loop.targets if type(local.get(name)) is int), None)
    # A variable that holds an element of another step: the loop over the steps is then the caller's, and this one
    # counts something else.
    speaks_against = any(found != index for found in _indices(schedule, local.values()))
    return index if index is not None and 0 <= index < len(schedule) and not speaks_against else None


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_known_values: dict[int, tuple[weakref.ref[Tensor], list[float]]] = {}


def _values_of(timesteps: Tensor) -> list[float]:
    """The timesteps on the host; copied once a run, by a pipeline that has copied them itself."""
    known = _known_values.get(id(timesteps))
    # An id comes again with another tensor; the reference tells. The tensor cannot be the key: it compares by elements.
    if known is None or known[0]() is not timesteps:
        key = id(timesteps)
        known = _known_values[key] = (
            weakref.ref(timesteps, lambda _: _known_values.pop(key, None)),
            timesteps.tolist(),
        )
    return known[1]
