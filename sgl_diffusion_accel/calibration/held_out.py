"""Whether a plan has seen enough calls: how it would have done on the last of them, had it not seen that one."""

from __future__ import annotations

import numpy as np

from sgl_diffusion_accel.calibration.design import Design, Moments
from sgl_diffusion_accel.calibration.design_search import best_design

ENOUGH = 1.4
"""Below it, 3 dB, another call is not worth its run."""

_SPEEDUP = 3.0
_MOST_STEPS = 100  # the search takes seconds up to here, and a minute at 200


def held_out_ratio(before: Moments, after: Moments, last: Moments) -> float | None:
    """Error on the last call by the plan that had not seen it, over that by the plan that has.

    Both are designed for a third of the steps, and held against the moments of the last call alone; the model is not
    run.

    Args:
        before: Of all calls but the last.
        after: Of all calls.
        last: Of the last call.

    Returns:
        None for runs of so many steps that the search would take longer than it is worth, and of so few that there is
        nothing to choose.
    """
    computed = round(last.steps / _SPEEDUP)
    if last.steps > _MOST_STEPS or computed < 2:
        return None
    unseen, seen = (_error(best_design(computed, moments), last) for moments in (before, after))
    return unseen / seen if seen else None


def _error(design: Design, moments: Moments) -> float:
    """Root mean square of what a design leaves in the final latents, as far as the moments tell."""
    off = -np.eye(moments.steps)
    for step, weights in enumerate(design.weights):
        for node, weight in weights.items():
            off[step, node] += weight
    in_v = moments.response[-1] @ off
    return float(np.sqrt(max(in_v @ moments.gram @ in_v, 0.0)))
