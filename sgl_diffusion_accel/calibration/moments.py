"""Carries what was measured on one schedule of timesteps over to another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sgl_diffusion_accel.calibration.design import Matrix

_NODES = 4  # the cubic through the nearest measured steps


def carry_over(gram: Matrix, measured: Sequence[float], wanted: Sequence[float]) -> Matrix:
    """The Gram matrix for other timesteps, by cubic interpolation of the outputs in the timestep.

    Args:
        gram: Of the outputs at the measured timesteps, `[S, S]`.
        measured: Their timesteps, falling.
        wanted: Timesteps of the other schedule; outside of the measured range the nearest measured one is taken.

    Returns:
        Of the outputs at the wanted timesteps, `[S', S']`.
    """
    weights = np.stack([_weights(measured, float(np.clip(each, measured[-1], measured[0]))) for each in wanted])
    # The outputs are interpolated, and not the entries: so the result is the Gram matrix of something.
    carried: Matrix = weights @ gram @ weights.T
    return carried


def _weights(measured: Sequence[float], wanted: float) -> Matrix:
    times = np.asarray(measured, dtype=np.float64)
    row = np.zeros(len(times))
    _, distinct = np.unique(-times, return_index=True)  # methods of second order come to a timestep twice
    # Timesteps fall, and the search wants rising numbers.
    place = np.searchsorted(-times[distinct], -wanted) - _NODES // 2
    start = int(np.clip(place, 0, max(len(distinct) - _NODES, 0)))
    near = distinct[start : start + _NODES].tolist()
    for node in near:
        others = [other for other in near if other != node]
        row[node] = np.prod([(wanted - times[other]) / (times[node] - times[other]) for other in others])
    return row
