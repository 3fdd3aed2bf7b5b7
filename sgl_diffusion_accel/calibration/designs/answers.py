"""How a model answers to latents that are off, found by holding a disturbed run against the same run undisturbed.

Where latents are off by δ_s, the output is off by n_s. Part of that lies along δ_s, the rest across it:
n_s = (a_s δ_s + b_s e_s) / σ_s with |e_s| = |δ_s| and e_s ⊥ δ_s, σ the share of the run that is left. At a = 1, b = 0
the model still shows the picture that it would have shown, and the error fades with σ. Below 0 the error grows of
itself, as it does on rough models in the first half of a run; across, it turns into other errors. No product of outputs
of undisturbed runs tells any of it.

One disturbed run tells it for all steps that follow the disturbance. The latents are looked at, and not only worked out
from the outputs: in half precision their rounding is part of what the model answers to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sgl_diffusion_accel.loop.scheduler_response import Response, left_at

Array = npt.NDArray[np.float64]
Answers = tuple[tuple[float, float, float], ...]
"""Of one disturbed run: for each step after the disturbance the share of the run that is left, a, and b."""

LEAST_LEFT = 1e-6
MOST = 20.0
"""Largest a and b that are taken: just after the disturbance they may be anything."""

_USUAL = 2.0  # b / σ where nothing was measured; the median of four trained models is near it in mid-run


@dataclass(frozen=True)
class Answer:
    """How outputs are off where the latents are, times the share of the run that is left; `[S]` each.

    Attributes:
        along: a, in the direction of the error.
        across: b, in other directions.
    """

    along: Array
    across: Array


Run = tuple[Tensor, Tensor]
"""Outputs of a run, and the latents before each step, the same elements of both; `[S, E]` each."""


def answers_between(response: Response, plain: Run, disturbed: Run, step: int) -> Answers:
    """Compares the outputs of two runs.

    Args:
        response: Of the scheduler, `[S + 1, S]`.
        plain: The undisturbed run.
        disturbed: The disturbed one.
        step: Which step was disturbed.

    Returns:
        Nothing for steps where the latents are not off, as where the scheduler has forgotten what it was given.
    """
    scale, left = 1 / scale_of(response), left_in(response)
    found = []
    for each in range(step + 1, len(left)):
        change, off = (one[each].double() - other[each].double() for one, other in zip(disturbed, plain, strict=True))
        square = float(off.square().sum())
        if not (0 < square < np.inf):
            continue
        along = float(change @ off) / square
        across = float((change - along * off).norm()) / square**0.5
        pair = np.clip([along / scale[each], across / scale[each]], -MOST, MOST)
        if np.isfinite(pair).all():
            found.append((float(left[each]), float(pair[0]), float(pair[1])))
    return tuple(found)


def answer_at(left: Array, answers: Sequence[Answers]) -> Answer:
    """The answer at other steps: the mean over disturbed runs of what lies between the measured ones.

    Args:
        left: Share of the schedule that is left at each step, `[S]`.
        answers: One for each disturbed run.

    Returns:
        What is usual where nothing was measured.
    """
    known = [np.array(each).T for each in answers if each]
    if not known:
        return Answer(np.zeros(len(left)), _USUAL * left)
    along, across = (np.stack([np.interp(left, each[0][::-1], each[row][::-1]) for each in known]) for row in (1, 2))
    return Answer(along.mean(0), np.sqrt(np.square(across).mean(0)))


def scale_of(response: Response) -> Array:
    """What an answer is divided by at each step: the share that is left, in units of the latents; `[S]`.

    The sum over all steps is the size of the latents in units of the outputs: 1 for flow matching, about 15 for noise
    levels of Stable Diffusion.
    """
    found: Array = left_in(response) * np.abs(response[-1]).sum()
    return found


def left_in(response: Response) -> Array:
    """Share of the run that is left at each step, from 1 down; σ for Euler's method on flow matching. `[S]`."""
    # It is divided by, and the last output may have no weight at all (DEIS).
    found: Array = np.maximum(left_at(response[-1]), LEAST_LEFT)
    return found
