"""What kind of scheduler a pipeline has, found by running a copy of it on numbers."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from sgl_diffusion_accel.auto.checking.findings import FoundScheduler
from sgl_diffusion_accel.loop.scheduler_response import adds_noise, looks_back, response_of

logger = logging.getLogger(__name__)

_STEPS = 12
_WAYS: tuple[dict[str, Any], ...] = ({}, {"mu": 1.0})
"""Further arguments of `set_timesteps`: those that shift by the size of the picture ask for one."""


def scheduler_of(pipe: object) -> FoundScheduler:
    """What is known of a pipeline's scheduler before a run; it is not changed.

    Args:
        pipe: The pipeline, or a transformer, which has none.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        what = "scheduler: none is known; in a loop of your own type denoising_steps(timesteps, scheduler=scheduler)"
        return FoundScheduler("", None, False, False, what)
    name = type(scheduler).__name__
    twin = _ready(scheduler)
    if twin is None:
        what = f"scheduler: {name}; how it works is found out at the start of a run"
        return FoundScheduler(name, None, False, False, what)
    response = response_of(twin, len(twin.timesteps))
    if response is None:
        is_noisy = adds_noise(twin)
        does = "adds noise of its own" if is_noisy else "is not linear in what the transformer says"
        return FoundScheduler(name, False, is_noisy, False, f"scheduler: {name} {does}: nothing can be corrected")
    # The second stage of a step (Heun) overwrites what the first one leads to: that is no look back.
    looks_at_earlier = getattr(twin, "order", 1) == 1 and looks_back(response)
    back = ", and looks back at earlier steps: in short runs little is skipped" if looks_at_earlier else ""
    what = f"scheduler: {name} is linear, so that predictions are corrected{back}"
    return FoundScheduler(name, True, False, looks_at_earlier, what)


def _ready(scheduler: Any) -> Any:
    """A copy with the timesteps of a short run, None where it cannot be had."""
    made = (_copy_of(scheduler, more) for more in _WAYS)
    return next((twin for twin in made if twin is not None), None)


def _copy_of(scheduler: Any, more: dict[str, Any]) -> Any:
    try:
        with torch.random.fork_rng(devices=[]):
            twin = copy.deepcopy(scheduler)
            twin.set_timesteps(_STEPS, **more)
    except Exception as error:  # a scheduler is code of others, which may do anything
        logger.debug("%s cannot be tried: %s", type(scheduler).__name__, error)
        return None
    if hasattr(twin, "is_scale_input_called"):
        twin.is_scale_input_called = True  # some warn where their input is not scaled, which does not matter here
    return twin
