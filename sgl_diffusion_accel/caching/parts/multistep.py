"""Weights of a linear multistep method: what a run gets from the outputs of a few computed steps.

A step that is not computed takes the extrapolation of the last computed outputs. When the next step is computed, its
output shows what the skipped ones should have been: interpolation, which errs several times less. The difference, as
the scheduler has weighed it into the latents, is put right in the output of the computed step. It is the predictor and
corrector of classical solvers for differential equations, on the pipeline's own grid of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sgl_diffusion_accel.caching.parts.predictors import Taylor

Weights = dict[int, float]
"""Computed step to the weight of its output."""


def extrapolate(nodes: Sequence[int], step: int, order: int = 1) -> Weights:
    """Weights of a prediction.

    Args:
        nodes: Computed steps, newest first; at least one.
        step: The step to be predicted, after all of them.
        order: 0 repeats the newest output, 1 follows the line through two.

    Returns:
        Weights that sum to 1.
    """
    if order == 0 or len(nodes) == 1:
        return {nodes[0]: 1.0}
    used = nodes[: order + 1]
    return dict(zip(used, Taylor(order).weights([float(node) for node in used], float(step)), strict=True))


def interpolate(nodes: Sequence[int], step: int) -> Weights:
    """Weights of the polynomial through the outputs of all nodes (Lagrange), taken at a step."""
    weights = {}
    for node in nodes:
        weight = 1.0
        for other in nodes:
            if other != node:
                weight *= (step - other) / (node - other)
        weights[node] = weight
    return weights


def correct(nodes: Sequence[int], skipped: Mapping[int, Weights], final: Sequence[float]) -> Weights:
    """Weights of a computed step that puts right what was predicted since the computed step before it.

    With W the weight of each step's output in the final latents and p the prediction that a skipped step has taken, the
    output is y_c + Σ_s W_s (interpolated_s - p_s) / W_c over the skipped steps s.

    Args:
        nodes: Computed steps, newest first, the present one included.
        skipped: The steps skipped since the computed step before, with the weights they have taken.
        final: W, one number for each step of the run.

    Returns:
        Weights that sum to 1; only the present step's own where nothing was skipped.
    """
    present = nodes[0]
    weights: Weights = {present: 1.0}
    if final[present] == 0:  # nothing can be put right at a step without weight
        return weights
    for step, taken in skipped.items():
        share = final[step] / final[present]
        for node, weight in interpolate(nodes, step).items():
            weights[node] = weights.get(node, 0.0) + share * weight
        for node, weight in taken.items():
            weights[node] = weights.get(node, 0.0) - share * weight
    return weights
