"""What a pipeline does in a run, seen from outside: which transformer is called when, with what conditioning.

It knows nothing of how the library places calls. A step ends where the scheduler takes the latents on, and a loop
begins where the scheduler is given its timesteps; two calls are of one branch if what stays the same through the run is
the same in both.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from classes import found as found_models


@dataclass
class Seen:
    """One transformer call.

    Attributes:
        component: Which transformer.
        loop: In which loop of the run.
        step: At which step of it; the number of its steps for one that comes after the last of them.
        given: What it is given, in numbers, by name.
    """

    component: str
    loop: int
    step: int
    given: dict[str, Any]


@dataclass
class Trace:
    """One run of a pipeline.

    Attributes:
        calls: The transformer calls, in their order.
        loops: How many loops have begun.
        lengths: How many steps each loop had.
    """

    calls: list[Seen] = field(default_factory=list)
    loops: int = -1
    lengths: dict[int, int] = field(default_factory=dict)
    _is_open: bool = False
    _has_calls: bool = False

    def began(self) -> None:
        """The scheduler was given its timesteps."""
        if self._has_calls or self.loops < 0:
            self.loops += 1
            self.lengths[self.loops] = 0
        self._is_open = self._has_calls = False

    def stepped(self) -> None:
        """The scheduler has taken some latents on."""
        self.lengths[self.loops] += self._is_open  # what several latents have in a row is one step
        self._is_open = False

    def called(self, component: str, given: dict[str, Any]) -> None:
        """A transformer was called."""
        self._is_open = self._has_calls = True
        self.calls.append(Seen(component, self.loops, self.lengths[self.loops], given))

    def is_in_loop(self, call: Seen) -> bool:
        """Whether the scheduler has made use of a call."""
        return call.step < self.lengths[call.loop]

    def branches(self) -> list[Any]:
        """For each call something that is the same for the calls of one branch, and for them alone."""
        most = max(self._within_steps().values())
        lasting = {loop: self._lasting(loop, most) for loop in {call.loop for call in self.calls}}
        found: list[Any] = [
            (call.loop, *((name, call.given.get(name)) for name in lasting[call.loop])) for call in self.calls
        ]
        nth: dict[Any, int] = defaultdict(int)
        for index, (call, same) in enumerate(zip(self.calls, found, strict=True)):
            nth[call.loop, call.step, same] += 1  # the same conditioning twice in a step is two branches
            found[index] = (same, nth[call.loop, call.step, same])
        return found

    def _lasting(self, loop: int, most: int) -> list[str]:
        """The arguments that stay the same through a loop, for each branch: of any two steps, which may differ in how
        many branches they have, the values of one are among those of the other."""
        calls = [call for call in self.calls if call.loop == loop and self.is_in_loop(call)]
        found = []
        for name in sorted({name for call in calls for name in call.given}):
            by_step: dict[int, set[Any]] = defaultdict(set)
            for call in calls:
                by_step[call.step].add(call.given.get(name))
            widest = max(by_step.values(), key=len)
            if len(widest) <= most and all(each <= widest for each in by_step.values()):
                found.append(name)
        return found

    def _within_steps(self) -> Mapping[tuple[int, int], int]:
        counts: dict[tuple[int, int], int] = defaultdict(int)
        for call in filter(self.is_in_loop, self.calls):
            counts[call.loop, call.step] += 1
        return counts

    def shape(self) -> str:
        """In words: how many calls in how many steps."""
        steps = [self.lengths[loop] for loop in sorted({call.loop for call in self.calls})]
        each = sorted(set(self._within_steps().values()))
        loops = f"{len(steps)} loops of {' and '.join(map(str, sorted(set(steps))))}" if len(steps) > 1 else steps[0]
        return f"{loops} steps, {' or '.join(map(str, each))} call{'s' if each[-1] > 1 else ''} each"


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that are transformers which denoise."""
    kinds = tuple(found_models().values())
    return {name: part for name, part in pipe.components.items() if isinstance(part, kinds)}


@contextmanager
def recording(pipe: Any) -> Iterator[Trace]:
    """Records an unpatched run."""
    trace = Trace()
    hooks = []
    for name, part in denoisers(pipe).items():

        def note(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            trace.called(name, {key: in_numbers(value) for key, value in given.items() if key != "self"})

        hooks.append(part.register_forward_pre_hook(note, with_kwargs=True))
    schedulers = {name: each for name, each in vars(pipe).items() if isinstance(each, diffusers.SchedulerMixin)}
    kinds = {name: type(each) for name, each in schedulers.items()}
    for each in schedulers.values():
        each.__class__ = _watched(type(each), trace)
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()
        for name, each in schedulers.items():
            each.__class__ = kinds[name]


def _watched(kind: Any, trace: Trace) -> Any:
    """A scheduler's class that tells of its steps, also where a pipeline copies the scheduler."""

    class Watched(kind):  # type: ignore[misc]
        def set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
            trace.began()
            return super().set_timesteps(*args, **kwargs)

        def step(self, *args: Any, **kwargs: Any) -> Any:
            trace.stepped()
            return super().step(*args, **kwargs)

    Watched.set_timesteps.__signature__ = inspect.signature(kind.set_timesteps)  # pipelines look at both
    Watched.step.__signature__ = inspect.signature(kind.step)
    return Watched


def in_numbers(value: Any) -> Any:
    """Something by which two values are compared."""
    if isinstance(value, Tensor):
        numbers = (torch.view_as_real(value) if value.is_complex() else value).detach().double()
        weights = torch.arange(1, numbers.numel() + 1, dtype=torch.float64).reshape(numbers.shape).cos()
        return tuple(value.shape), float((numbers * weights).nan_to_num().sum())
    if isinstance(value, (list, tuple)):
        return tuple(in_numbers(each) for each in value)
    if isinstance(value, dict):
        return tuple((key, in_numbers(each)) for key, each in value.items())
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__
