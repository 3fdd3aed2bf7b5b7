"""Weights of a linear multistep method: what a run gets from the outputs of a few computed steps.

A step that is not computed takes the extrapolation of the last computed outputs. When the next step is computed, its
output shows what the skipped ones should have been: interpolation, which errs less. The difference, as the scheduler
has weighed it into the latents, is put right in the output of the computed step. It is the predictor and corrector of
classical solvers for differential equations, on the pipeline's own grid of steps.

Those solvers take the polynomial of highest order. The outputs of a trained model are rougher: beside the smooth part
they have one that wanders from step to step, and a polynomial carries it on. On five trained models prediction erred
least with two thirds to five sixths of the line's slope, and correction with the mean of line and parabola.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Weights = dict[int, float]
"""Computed step to the weight of its output."""

SLOPE = 0.75
"""Share of the slope of the last two outputs that a prediction follows."""

PARABOLA = 0.5
"""Share of the parabola in what a correction takes the skipped outputs for; the rest is the line."""


def extrapolate(nodes: Sequence[int], step: int, slope: float = SLOPE) -> Weights:
    """Weights of a prediction: the newest output, and a share of the slope between it and the one before.

    Args:
        nodes: Computed steps, newest first; at least one.
        step: The step to be predicted, after all of them.
        slope: The share; 0 repeats the newest output, 1 follows the line.

    Returns:
        Weights that sum to 1.
    """
    if slope == 0 or len(nodes) == 1:
        return {nodes[0]: 1.0}
    ahead = slope * (step - nodes[0]) / (nodes[0] - nodes[1])
    return {nodes[0]: 1 + ahead, nodes[1]: -ahead}


def interpolate(nodes: Sequence[int], step: int) -> Weights:
    """Weights of what a correction takes the output of a skipped step for: the mean of line and parabola.

    Args:
        nodes: Computed steps, newest first; at least one. The line goes through the first two, which the step is
            between, and the parabola through the first three.
        step: The skipped step.

    Returns:
        Weights that sum to 1.
    """
    weights = dict.fromkeys(nodes[:3], 0.0)
    for share, used in ((1 - PARABOLA, nodes[:2]), (PARABOLA, nodes[:3])):
        for node, weight in lagrange(used, step).items():
            weights[node] += share * weight
    return weights


def lagrange(nodes: Sequence[int], step: int) -> Weights:
    """Weights of the polynomial through the outputs of all nodes, taken at a step."""
    weights = {}
    for node in nodes:
        weight = 1.0
        for other in nodes:
            if other != node:
                weight *= (step - other) / (node - other)
        weights[node] = weight
    return weights


def correct(
    nodes: Sequence[int],
    skipped: Mapping[int, Weights],
    final: Sequence[float],
    following: Sequence[float] | None = None,
) -> Weights:
    """Weights of a computed step that puts right what was predicted since the computed step before it.

    With W the weight of each step's output in the final latents and p the prediction that a skipped step has taken,
    the output is y_c + Σ_s W_s (interpolated_s - p_s) / W_c over the skipped steps s. Under schedulers that look back
    (UniPC) an output counts twice as much in the latents of the next step as in the end, so that this would put the
    next latents off by as much as it puts the final ones right. There it is the best compromise between both.

    Args:
        nodes: Computed steps, newest first, the present one included.
        skipped: The steps skipped since the computed step before, with the weights they have taken.
        final: W, one number for each step of the run.
        following: The same for the latents of the next step; None where those are the same, as for Euler's method.

    Returns:
        Weights that sum to 1; only the present step's own where nothing was skipped.
    """
    present = nodes[0]
    weights: Weights = {present: 1.0}
    if final[present] == 0:  # nothing can be put right at a step without weight
        return weights
    for step, taken in skipped.items():
        share = correction(step, present, final, following)
        for node, weight in interpolate(nodes, step).items():
            weights[node] = weights.get(node, 0.0) + share * weight
        for node, weight in taken.items():
            weights[node] = weights.get(node, 0.0) - share * weight
    return weights


def correction(step: int, present: int, final: Sequence[float], following: Sequence[float] | None = None) -> float:
    """How much of what a skipped step was off a computed step's output takes back; see `correct`."""
    rows = (final,) if following is None else (final, following)
    return sum(row[step] * row[present] for row in rows) / sum(row[present] ** 2 for row in rows)
