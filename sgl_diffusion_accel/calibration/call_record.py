"""Records what a scheduler is given at each step of uncached runs, as products of sketches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel.calibration.designs.design import Matrix
from sgl_diffusion_accel.calibration.growth import Disturbance
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.shadow import stand_before
from sgl_diffusion_accel.slots import Instead, original_class

SKETCH = 1 << 18
"""Elements that are kept of an output: with 262,144 of them products are off by about 0.2 %, at 1 MiB a step."""

LATENTS = 1 << 16
"""Elements of these that are kept of the latents."""


class Recording:
    """One run, step by step.

    Attributes:
        timesteps: One for each step.
        shape: Of the latents.
        final: The latents after the last step so far, as the scheduler returned them.
    """

    def __init__(self) -> None:
        self.timesteps: list[float] = []
        self.shape: tuple[int, ...] = ()
        self.final: Tensor | None = None
        self._sketches: list[Tensor] = []
        self._latents: list[Tensor] = []
        self._picked: Tensor | None = None

    def add(self, output: Tensor, timestep: Any, sample: Tensor) -> None:
        """Takes one step: what the scheduler was given.

        Args:
            output: `[B, …]`, with guidance applied.
            timestep: Of the step.
            sample: The latents before it, of the same shape.
        """
        if not self._sketches:
            self.shape = tuple(sample.shape)
        if self._picked is None:
            self._picked = _picked(output.numel()).to(output.device)
        self._sketches.append(_kept(output, self._picked))
        if sample.shape == output.shape:
            self._latents.append(_kept(sample, _fewer(self._picked)))
        self.timesteps.append(float(timestep))

    def seen(self) -> tuple[Tensor, Tensor] | None:
        """What is kept of all outputs and of the latents before each step, the same elements of both, `[S, E]` each.

        None where the two are of unlike shapes.
        """
        if not self._latents or len(self._latents) < len(self._sketches):
            return None
        return torch.stack([_fewer(each) for each in self._sketches]), torch.stack(self._latents)

    @property
    def first(self) -> Tensor:
        """What is kept of the first step's output."""
        return self._sketches[0]

    @property
    def nbytes(self) -> int:
        """Bytes that are held on the host."""
        return sum(each.numel() * each.element_size() for each in self._sketches + self._latents)

    def gram(self) -> Matrix:
        """Mean products of the outputs, `[S, S]`.

        Raises:
            ConfigError: An output is not finite.
        """
        outputs = torch.stack(self._sketches).double()
        if not outputs.isfinite().all():
            raise ConfigError(
                "the pipeline gave its scheduler numbers that are not finite, without any cache: nothing can be "
                "learned from this call. Check the call, or run it in float32."
            )
        products: Matrix = (outputs @ outputs.T / outputs.shape[1]).numpy()
        return products


def _picked(elements: int) -> Tensor:
    """Which elements are kept: all of a small output, else a fixed random choice."""
    if elements <= SKETCH:
        return torch.arange(elements)
    # A seed of its own: products are between steps and runs are averaged, so all have to pick the same elements; and
    # the user's random state stays.
    return torch.randint(elements, (SKETCH,), generator=torch.Generator().manual_seed(0)).sort().values


def _kept(tensor: Tensor, picked: Tensor) -> Tensor:
    return tensor.detach().flatten()[picked].float().cpu()


def _fewer(picked: Tensor) -> Tensor:
    return picked[:: max(1, SKETCH // LATENTS)] if len(picked) > LATENTS else picked


class Watch:
    """Stands in front of the `step` of one scheduler. A copy of the scheduler is not watched: it is of the plain class.

    Where a pipeline moves two things at once (LTX-2 its picture and its sound), it gives the second one a copy, so that
    what is recorded is the picture.

    Attributes:
        runs: The recordings, one for each run, growing.
        disturbance: What moves an output of the next run; None for a run as it is.
        call: The scheduler's own step.
    """

    is_watching = True

    def __init__(self) -> None:
        self.runs: list[Recording] = []
        self.disturbance: Disturbance | None = None
        self.call: Callable[..., Any]
        self._timesteps: Any = None

    def enter(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording | Instead:
        """Takes a step. The one that is disturbed it makes itself, with the moved output."""
        if self._begins(scheduler.timesteps):
            self._timesteps = scheduler.timesteps
            self.runs.append(Recording())
        given = dict(zip(_GIVEN, args, strict=False)) | kwargs
        rest = args[len(_GIVEN) :]
        self.runs[-1].add(*(given[name] for name in _GIVEN))
        run = self.runs[-1]
        moved = None if self.disturbance is None else self.disturbance.see(given[_GIVEN[0]])
        if moved is None:
            return run
        return Instead(
            self.leave(
                scheduler, run, self.call(moved, *(given.pop(name) for name in _GIVEN[1:]), *rest, **_others(given))
            )
        )

    def leave(self, _: Any, run: Recording, stepped: Any) -> Any:
        """Keeps the latents that it led to."""
        run.final = (stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample).detach()
        return stepped

    def fail(self, _: Any, run: Recording) -> None:
        """Nothing: the call ends with the error."""

    def _begins(self, timesteps: Any) -> bool:
        """Whether a run begins: mostly the timesteps are set anew for it; else the schedule is through."""
        return not self.runs or timesteps is not self._timesteps or len(self.runs[-1].timesteps) >= len(timesteps)


def _others(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in _GIVEN}


_GIVEN = ("model_output", "timestep", "sample")


@contextmanager
def recording(pipe: Any) -> Iterator[Watch]:
    """Records the runs of a pipeline for as long as the context lasts; its scheduler is put back exactly.

    Yields:
        The watch, with its recordings.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not callable(getattr(scheduler, "step", None)):
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has no scheduler with a step to be watched: it cannot be calibrated. Use "
            "apply_adaptive_cache(pipe), which needs no calibration."
        )
    watch = Watch()
    undo = _watch(scheduler, watch)
    try:
        yield watch
    finally:
        undo()


def _watch(scheduler: Any, watch: Watch) -> Callable[[], None]:
    """Puts the watch in front of a scheduler's `step`, and returns what takes it away."""
    # Of a kind there is one handler at a time: two recordings at once must not replace each other.
    kind_of: Any = original_class(scheduler)
    watch.call = vars(scheduler).get("step") or partial(kind_of.step, scheduler)
    return partial(stand_before(scheduler, "step", f"recording {id(watch):x}", watch), scheduler)
