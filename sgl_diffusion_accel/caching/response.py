"""How a scheduler turns what the transformer says into latents: its response to each output, found by trying.

Every deterministic scheduler of diffusers is linear: the latents before step s are `Σ_j C[s, j] · output_j` plus a part
that comes from the starting noise. The weights C are found by running a copy of the scheduler on numbers instead of
pictures, so that they hold for Euler, Heun, UniPC, DPM-Solver, DDIM and those that are still to come.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Response = npt.NDArray[np.float64]
"""`[S + 1, S]`: weight of the output at each step in the latents before each step, and in the final ones."""

_IMPULSE = 1e-3  # small, for schedulers that clip
_NOISE = 1e-7  # what may come of nothing, relative to the impulse


def response_of(scheduler: Any, total: int) -> Response | None:
    """Finds the response of a scheduler to the outputs of a run.

    Args:
        scheduler: With the timesteps of the run set. It is not changed.
        total: Denoising steps of the run, S.

    Returns:
        The response `[S + 1, S]`; None for a scheduler that adds noise of its own, is not linear, or takes more than
        output, timestep and sample.
    """
    try:
        with torch.no_grad():
            return _respond(_on_cpu(scheduler), total)
    except Exception as error:  # a scheduler is code of others, which may do anything
        logger.debug("%s tells no response: %s", type(scheduler).__name__, error)
        return None


def euler(sigmas: list[float]) -> Response:
    """The response of Euler's method on a schedule of noise levels, the last of them the final one; `[S + 1, S]`."""
    widths = np.diff(np.asarray(sigmas, dtype=np.float64))
    return np.tril(np.broadcast_to(widths, (len(widths) + 1, len(widths))), -1)


def _on_cpu(scheduler: Any) -> Any:
    """A copy as it is before the first step, with its tensors where numbers are quick."""
    twin = copy.copy(scheduler)
    vars(twin).pop("step", None)  # if somebody watches the scheduler, then not its twin
    for name, value in vars(twin).items():
        if isinstance(value, Tensor):
            setattr(twin, name, value.detach().to("cpu", copy=True))
        elif isinstance(value, (list, dict)) and name != "_internal_dict":
            setattr(twin, name, [None] * len(value) if isinstance(value, list) else dict(value))
    for name, start in (("_step_index", None), ("lower_order_nums", 0), ("last_sample", None), ("this_order", 0)):
        if hasattr(twin, name):
            setattr(twin, name, start)
    return twin


def _respond(twin: Any, total: int) -> Response | None:
    timesteps = twin.timesteps
    if len(timesteps) != total:
        return None
    # One channel for each step's impulse, and one that stays empty: what appears there is the scheduler's own noise.
    sample = torch.zeros(1, total + 1, 1, 1, dtype=torch.float64)
    before = [sample]
    for step, timestep in enumerate(timesteps):
        output = torch.zeros_like(sample)
        output[0, step] = _IMPULSE
        sample = twin.step(output, timestep, sample, return_dict=False)[0].double()
        before.append(sample)
    response = torch.stack(before)[:, 0, :, 0, 0].numpy() / _IMPULSE
    weights, noise = response[:, :total], response[:, total]
    is_sound = np.isfinite(response).all() and np.abs(noise).max() <= _NOISE and np.abs(weights[-1]).min() > 0
    return weights if is_sound else None
