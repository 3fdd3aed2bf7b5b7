"""The denoising runs that are under way, and what is kept for each of them until it ends."""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.parts.stats import RunStats
from sgl_diffusion_accel.errors import UnsupportedModelError
from sgl_diffusion_accel.loop.given import Kind
from sgl_diffusion_accel.loop.places import LoopCall
from sgl_diffusion_accel.loop.scheduler_response import Response, response_of
from sgl_diffusion_accel.loop.step_proof import first_of


class Kept(ABC):
    """What a patch keeps for a run, tensors among it."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""

    def close(self) -> None:  # noqa: B027  # most have put nothing anywhere
        """Takes away what it has put on other objects: the run is over."""


@dataclass
class _Passed:
    """A tensor that a transformer was called with.

    Attributes:
        tensor: The tensor.
        step: At which it came first.
        branches: To which it was passed.
        is_lasting: Whether it came at a later step as well, as conditioning does.
    """

    tensor: weakref.ref[Tensor]
    step: int
    branches: set[str] = field(default_factory=set)
    is_lasting: bool = False


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """What a prompt has in common with another one, which may be longer."""
    return tensor.ndim, tensor.dtype, tensor.shape[-1:]


class Run:
    """One pass through a denoising loop.

    Attributes:
        total: Number of denoising steps, the length of the run's timesteps.
        number: Which run of its patch it is, from 1; 0 for one that nobody counts.
        stats: What is noted of it; None for one of which nothing is, and after its end.
        kept: What the patch keeps for it, until it ends.
        latents: Shape of what the transformer was called with at first, `[B, C, (F,) H, W]` or `[B, T, C]`; None where
            it takes no tensor.
        guidance: The scale with which the pipeline combines the branches at the present step, None where unknown.
        boundary: The timestep below which a second transformer takes over, None if there is none.
        given: Of what kind is what the transformer is given at the present call.
        first: Where in the scheduler's timesteps those of the run begin; None where that is not known.
        ends_with_loop: Whether its end is sure to be seen, since the loop itself ends then.
        is_published: Whether the loop is code of diffusers itself, of which is known how it combines the branches.
        conversion: What the pipeline makes of the outputs before the scheduler gets them; None if nothing.
    """

    def __init__(self, call: LoopCall) -> None:
        self.total = call.total
        self.number = 0
        self.stats: RunStats | None = None
        self.kept: Kept | None = None
        self.latents: torch.Size | None = None
        self.guidance: float | None = None
        self.boundary = call.boundary
        self.given: Kind = frozenset()
        self.first: int | None = None
        if call.timesteps is not None:
            self.first = first_of(call.timesteps, getattr(call.scheduler, "timesteps", None))
        self.ends_with_loop = call.owner is call.loop
        self.is_published = call.is_published
        self.conversion = call.conversion
        # All weak: the end of a run is noticed by these objects going, so that it must not keep them.
        self._loop = weakref.ref(call.loop)
        self._timesteps = weakref.ref(call.timesteps) if call.timesteps is not None else lambda: None
        self._scheduler = weakref.ref(call.scheduler) if call.scheduler is not None else lambda: None
        self._owner = weakref.ref(call.owner) if _has_weakrefs(call.owner) else None
        self._sigmas: list[float] | None = None
        self._ends: list[weakref.ref[Any]] = []
        self._step = -1
        self._called: set[tuple[int, str]] = set()
        self._conditioning: dict[int, _Passed] = {}

    @property
    def scheduler(self) -> Any:
        """The scheduler that steps the run, None if it is gone."""
        return self._scheduler()

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of the run, `[S]` on the run's device.

        Raises:
            UnsupportedModelError: The loop does not tell them.
        """
        timesteps: Tensor | None = self._timesteps()
        if timesteps is None:
            raise UnsupportedModelError(
                "what was applied goes by the timesteps of the run, and this loop tells its steps by cache_context "
                "alone. Type: for t in denoising_steps(scheduler.timesteps, scheduler=scheduler):"
            )
        return timesteps[: self.total]  # a loop may leave the last of them off

    @property
    def has_timesteps(self) -> bool:
        """Whether the timesteps of the run are known."""
        return self._timesteps() is not None

    def response(self) -> Response | None:
        """How much each output weighs in the latents, `[S + 1, S]`; None where that is no number (`response_of`)."""
        return response_of(self.scheduler, self.total, self.first, self.conversion)

    def switch(self) -> int | None:
        """The first step of the second transformer, None if there is none. Copies the timesteps from the device."""
        timesteps = self._timesteps()
        if self.boundary is None or timesteps is None:
            return None
        later = [step for step, timestep in enumerate(timesteps[: self.total].tolist()) if timestep < self.boundary]
        return later[0] if later else None

    def is_of(self, call: LoopCall) -> bool:
        """Whether the call belongs to this run: same loop, and not further back in it."""
        if self._loop() is not call.loop or self.total != call.total:
            return False
        # The timesteps may outlive a run, after an error for example, and serve another one. Its progress bar does not.
        if self._owner is not None and self._owner() is not call.owner:
            return False
        return call.step >= self._step

    def advance(self, module: nn.Module, call: LoopCall) -> tuple[int, str]:
        """Moves the run on to the call.

        Returns:
            The step index, and the branch: a further one of the same name within a step is `"name#2"`, ….
        """
        self.guidance = call.guidance
        if call.step != self._step:
            self._step = call.step
            self._called.clear()
            # The latents of earlier steps are gone by now; what is noted of them would pile up.
            self._conditioning = {key: each for key, each in self._conditioning.items() if each.tensor() is not None}
        branch = self._branch_of(id(module), call)
        self._called.add((id(module), branch))
        for tensor in call.passed:
            passed = self._passed(tensor)
            passed.branches.add(branch)
            passed.is_lasting |= passed.step < call.step
        return call.step, branch

    def _branch_of(self, module: int, call: LoopCall) -> str:
        """The branch whose conditioning is passed, else the first of the call's name that is free in this step.

        A name is not free for another prompt: where something new comes in the place of what was passed to its calls
        alone, at several steps, and is still there.
        """
        passed = {id(tensor) for tensor in call.passed}
        new = {_form(tensor) for tensor in call.passed[1:] if self._is_new(tensor)}  # the first is the latents
        others: set[str] = set()
        for key, each in self._conditioning.items():
            held = each.tensor() if each.is_lasting and len(each.branches) == 1 and key not in passed else None
            if held is not None and _form(held) in new:
                others |= each.branches

        def free(label: str) -> bool:
            return (module, label) not in self._called and label not in others

        # What several branches are given, such as the timestep, tells none of them.
        known = [each.branches for each in map(self._passed, call.passed) if len(each.branches) == 1]
        tied = {label for label in set().union(*known) if label.partition("#")[0] == call.branch and free(label)}
        if len(tied) == 1:
            return tied.pop()
        names = (call.branch if n == 1 else f"{call.branch}#{n}" for n in itertools.count(1))
        return next(filter(free, names))

    def _is_new(self, tensor: Tensor) -> bool:
        known = self._conditioning.get(id(tensor))
        return known is None or known.tensor() is not tensor

    def _passed(self, tensor: Tensor) -> _Passed:
        """What is known of a tensor that is passed."""
        known = self._conditioning.get(id(tensor))
        if known is None or self._is_new(tensor):
            known = self._conditioning[id(tensor)] = _Passed(weakref.ref(tensor), self._step)
        return known

    def sigmas(self) -> list[float]:
        """The noise level at each step: the scheduler's sigmas, or the timesteps where it has none.

        Copied from the device once a run.

        Raises:
            UnsupportedModelError: The loop does not tell its timesteps.
        """
        if self._sigmas is None:
            timesteps = self.timesteps
            values = getattr(self._scheduler(), "sigmas", None)
            if isinstance(values, Tensor) and len(values) > self.total:
                first = self.first if self.first is not None else len(values) - 1 - self.total  # the last of them is 0
                values = values[first : first + self.total]
            else:
                values = timesteps
            self._sigmas = values.tolist()
        return self._sigmas

    def end_with(self, tied: object, forget: Callable[[object], None]) -> None:
        """Has `forget` called when an object goes that lives exactly as long as the run."""
        if _has_weakrefs(tied):
            self._ends.append(weakref.ref(tied, forget))

    def end(self) -> None:
        """Lets go of all that was kept."""
        if self.kept is not None:
            self.kept.close()
        self.kept = self.stats = self._sigmas = None
        self._ends.clear()


def _has_weakrefs(candidate: object) -> bool:
    return candidate is not None and type(candidate).__weakrefoffset__ != 0


class Runs:
    """The runs that are under way, each forgotten when its loop ends, however it ends."""

    def __init__(self) -> None:
        self._runs: dict[int, Run] = {}

    def find(self, call: LoopCall) -> tuple[Run, bool]:
        """Returns the run of a call, and whether it is a new one."""
        key = id(call.loop)
        run = self._runs.get(key)
        if run is not None and run.is_of(call):
            return run, False
        for older in self:
            if older.scheduler is call.scheduler is not None and not older.ends_with_loop:
                # It failed, and somebody keeps its traceback.
                self.discard(older)
        run = self._runs[key] = Run(call)
        # Whichever goes first: after an error the scheduler still holds the timesteps, and the progress bar is gone.
        for tied in {id(each): each for each in (call.loop, call.owner)}.values():
            run.end_with(tied, self._forgetter(key, run))
        return run, True

    def _forgetter(self, key: int, run: Run) -> Callable[[object], None]:
        # Weak: the run holds this function, which must not hold the run and its tensors in turn.
        runs, this = weakref.ref(self), weakref.ref(run)

        def forget(_: object) -> None:
            registry, ended = runs(), this()
            if ended is not None:
                ended.end()
                # The key is an id: another run may have it by now.
                if registry is not None and registry._runs.get(key) is ended:
                    del registry._runs[key]

        return forget

    def __iter__(self) -> Iterator[Run]:
        # A copy: a run may end, and drop out, while they are gone through.
        return iter(list(self._runs.values()))

    def discard(self, run: Run) -> None:
        """Forgets one run and what was kept for it."""
        run.end()
        for key, known in list(self._runs.items()):
            if known is run:
                del self._runs[key]

    def clear(self) -> None:
        """Forgets all runs and what was kept for them."""
        for run in self:
            run.end()
        self._runs.clear()
