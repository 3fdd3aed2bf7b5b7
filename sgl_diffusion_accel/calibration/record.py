"""Records what a scheduler is given at each step of uncached runs, as products of sketches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel.calibration.design import Matrix
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError

SKETCH = 1 << 18
"""Elements that are kept of an output: with 262,144 of them products are off by about 0.2 %, at 1 MiB a step."""


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
        self._picked: Tensor | None = None

    def add(self, output: Tensor, timestep: Any, sample: Tensor) -> None:
        """Takes one step: what the scheduler was given.

        Args:
            output: `[B, …]`, with guidance applied.
            timestep: Of the step.
            sample: The latents before it, of the same shape.
        """
        if self._picked is None:
            self.shape = tuple(sample.shape)
            self._picked = _picked(output.numel()).to(output.device)
        flat = output.detach().flatten()
        self._sketches.append(flat[self._picked].float().cpu())
        self.timesteps.append(float(timestep))

    @property
    def nbytes(self) -> int:
        """Bytes that are held on the host."""
        return sum(each.numel() * each.element_size() for each in self._sketches)

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
    return torch.randint(elements, (SKETCH,), generator=torch.Generator().manual_seed(0)).sort().values


@contextmanager
def recording(pipe: Any) -> Iterator[list[Recording]]:
    """Records the runs of a pipeline for as long as the context lasts; its scheduler is put back exactly.

    Yields:
        The recordings, one for each run, growing.
    """
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not callable(getattr(scheduler, "step", None)):
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has no scheduler with a step to be watched: it cannot be calibrated. Use "
            "apply_adaptive_cache(pipe), which needs no calibration."
        )
    runs: list[Recording] = []
    seen: list[Any] = []
    step = scheduler.step
    own = vars(scheduler).get("step")

    def watched(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not seen or seen[-1] is not scheduler.timesteps:  # set anew at the start of each run
            seen.append(scheduler.timesteps)
            runs.append(Recording())
        runs[-1].add(model_output, timestep, sample)
        stepped = step(model_output, timestep, sample, *args, **kwargs)
        runs[-1].final = (stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample).detach()
        return stepped

    scheduler.step = watched
    try:
        yield runs
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own
