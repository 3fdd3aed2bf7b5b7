"""Pipelines that make something else of what the transformer says before they hand it to the scheduler.

A correction goes by how much each output of the transformer weighs in the final latents. The scheduler tells how much
its own input weighs (`scheduler_response.py`). Nearly always that is the transformer's output, guidance included, which
has the same factor at each step. A pipeline that converts it by the noise level of the step, and by the latents, has
other weights: as the scheduler's alone they would multiply errors instead of taking them away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Conversion = Callable[[Tensor, Tensor, Any, int], Tensor]
"""Of the transformer's output, the latents before the step, the scheduler and the index in its schedule, what the
scheduler is given. Linear in output and latents."""

_LEAST_TIME = 0.05


def _clean_to_velocity(output: Tensor, latents: Tensor, scheduler: Any, index: int) -> Tensor:
    """PRX on pixels: the transformer says the clean picture."""
    time = float(scheduler.timesteps[index]) / float(scheduler.config.num_train_timesteps)
    return (latents - output) / max(time, _LEAST_TIME)


def _preconditioned(output: Tensor, latents: Tensor, scheduler: Any, index: int) -> Tensor:
    """Cosmos-Predict 2: of latents x at noise level σ, the clean ones are (x − σ · output) / (1 + σ)."""
    return (latents + output) / (1.0 + float(scheduler.sigmas[index]))


CONVERSIONS: dict[str, Conversion] = {
    "PRXPixelPipeline": _clean_to_velocity,
    "Cosmos2TextToImagePipeline": _preconditioned,
    "Cosmos2VideoToWorldPipeline": _preconditioned,
}
"""Names of pipeline classes of diffusers, and what they do."""


def conversion_of(pipeline: object) -> Conversion | None:
    """What a pipeline does with the outputs of its transformer; None for one that hands them on."""
    if getattr(pipeline, "scheduler", None) is None:
        return None
    return next((CONVERSIONS[kind.__name__] for kind in type(pipeline).__mro__ if kind.__name__ in CONVERSIONS), None)
