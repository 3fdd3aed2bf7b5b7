"""How an error of the latents grows until the end of a run, found by disturbing a run once.

What a model shows is decided early: an error that is left there may be ten times as large in the end, or smaller,
according to the model, its guidance and the prompt. No product of outputs of undisturbed runs tells. So a run is made
again, and one output is moved as predictions are off, along the bend of the outputs, v_s - 2 v_{s-1} + v_{s-2}. How far
that has moved the final latents, relative to how far it would have without the model's answers, is the growth. On three
trained models it was the same within a few percent for disturbances of 2, 10 and 30 % of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sgl_diffusion_accel.caching.parts.gap_control import GapSettings, late_growth
from sgl_diffusion_accel.loop.scheduler_response import Response, left_at

SHARES = (0.9, 0.85)
"""Where a run is disturbed: the share of the run that is left, for one call after the other."""

_SIZE = 0.3  # of the disturbance, relative to an output
_COARSE, _MOST_COARSE = 0.02, 1.0  # the same in half precision for each step of a run: it is to stand out of rounding
_BEND = 3  # outputs that a bend is seen from
_FEWEST = 10
_NEAR = 0.1
_SAME = 1e-3  # kernels of a GPU may differ from run to run by rounding
_MOST = 20.0


@dataclass
class Disturbance:
    """Moves what a scheduler is given at one step of a run, along the bend of the outputs.

    Attributes:
        step: Which step.
        coarse: Its size in half precision, relative to an output.
        moved: ‖e‖ of the disturbance; 0 until it was made, or where nothing bends.
    """

    step: int
    coarse: float = _SIZE
    moved: float = 0.0
    _seen: int = 0
    _outputs: list[Tensor] = field(default_factory=list)

    def see(self, output: Tensor) -> Tensor | None:
        """Takes the output of the next step, and says what the scheduler is to have instead; None for the output.

        What is given to the scheduler is moved, and not the latents that it returns: what is done to those UniPC's
        corrector takes back. And never in place: an output may be the transformer's own, kept, or not to be written.
        """
        moved = None
        if self._seen <= self.step:
            self._outputs = [*self._outputs, output.detach().float().clone()][-_BEND:]
        if self._seen == self.step:
            newest, middle, oldest = reversed(self._outputs)
            self._outputs = []
            share = _SIZE if output.dtype in (torch.float32, torch.float64) else self.coarse
            bend = newest - 2 * middle + oldest
            size = float(bend.norm())
            if size > 0 and np.isfinite(size):
                moved = (newest + bend * (share * float(newest.norm()) / size)).to(output.dtype)
                self.moved = float((moved.float() - newest).norm())
        self._seen += 1
        return moved


def disturbance_for(call: int, response: Response) -> Disturbance | None:
    """The disturbance for a call of a calibration, counted from 0.

    Args:
        call: Which of the calls that are disturbed.
        response: Of the scheduler, `[S + 1, S]`.

    Returns:
        None for calls after those that are disturbed, for short runs, and where no step is near the wanted place:
        schedules of Stable Diffusion's kind have passed it after two steps.
    """
    steps = response.shape[1]
    if call >= len(SHARES) or steps < _FEWEST:
        return None
    left = left_at(response[-1])
    able = [
        step
        for step in range(_BEND - 1, steps - 1)
        if response[-1, step]  # what leads to a midpoint moves nothing that lasts
    ]
    coarse = min(max(_SIZE, _COARSE * steps), _MOST_COARSE)
    step = min(able, key=lambda each: abs(left[each] - SHARES[call]), default=None)
    return None if step is None or abs(left[step] - SHARES[call]) > _NEAR else Disturbance(step, coarse)


def growth_between(
    made: Disturbance, response: Response, final: Tensor, disturbed: Tensor
) -> tuple[float, float] | None:
    """Share of the run that was left, and the growth.

    Args:
        made: The disturbance.
        response: Of the scheduler, `[S + 1, S]`.
        final: The final latents of the undisturbed run.
        disturbed: Those of the disturbed one.
    """
    distance = float((disturbed.float() - final.float()).norm())
    if not made.moved or not np.isfinite(distance):
        return None
    return float(left_at(response[-1])[made.step]), distance / (abs(float(response[-1, made.step])) * made.moved)


def early_growth(found: Sequence[tuple[float, float]]) -> float:
    """A of `late_growth` for what was found, the mean; without anything what is usual."""
    if not found:
        return GapSettings.early
    return float(np.mean([min(max(growth - 1, 0.0) / (late_growth(left, 1.0) - 1), _MOST) for left, growth in found]))


def same_start(one: Tensor, other: Tensor) -> bool:
    """Whether two runs began alike; else their noise was drawn anew, and nothing can be told from how they end."""
    return bool((one - other).norm() <= _SAME * one.norm())
