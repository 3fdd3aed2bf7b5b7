"""How a model answers to latents that are off, found by holding a disturbed run against the same run undisturbed.

Where latents are off by δ_s, the output is off by n_s. Part of that lies along δ_s, the rest across it:
n_s = (a_s δ_s + b_s e_s) / σ_s with |e_s| = |δ_s| and e_s ⊥ δ_s, σ the share of the run that is left. At a = 1, b = 0
the model still shows the picture that it would have shown, and the error fades with σ. Below 0 the error grows of
itself, as it does on rough models in the first half of a run; across, it turns into other errors. No product of outputs
of undisturbed runs tells any of it.

One disturbed run tells it for all steps that follow the disturbance. The latents are looked at, and not only worked out
from the outputs: in half precision their rounding is part of what the model answers to. A run by a plan tells it of the
errors that the plan really leaves, which lie in other directions, at the steps that it computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sgl_diffusion_accel.caching.parts.multistep import Weights
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.loop.scheduler_response import Response, left_at
from sgl_diffusion_accel.validate import finite, listed

Array = npt.NDArray[np.float64]
Answers = tuple[tuple[float, float, float], ...]
"""Of one run whose latents were off: for each step where they were, the share of the run that is left, a, and b."""

LEAST_LEFT = 1e-6
MOST = 20.0
"""Largest a and b that are taken: just after the disturbance they may be anything."""

MOST_STEPS = 1000
"""Of a run."""

_LEAST_OWN = 0.05  # weight of a computed output in what the scheduler is given, below which it cannot be told from it
_LIKE = 0.05
"""How far what the scheduler is given may be from the weighed outputs.

The normed guidance of Qwen-Image is up to 0.03 off. That is as much as the change that is looked for, so that answers
are up to 1.8 times too large there; designs that rest on them are still among the best of a trained one.
"""
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
    return _compared(response, plain, disturbed, range(step + 1, response.shape[1]))


def answers_of_plan(response: Response, plain: Run, cached: Run, weights: Sequence[Weights]) -> Answers:
    """Compares a run by a plan with the uncached one, at the steps that it computed after it had left one out.

    The weights are those of the model's outputs, and what is known is what the scheduler was given, after guidance.
    That is the same where guidance is linear and the same at all steps. Whether it is shows at the steps that were left
    out: there nothing but earlier outputs was given. Where it nearly is, the answers are estimates.

    Args:
        response: Of the scheduler, `[S + 1, S]`.
        plain: The uncached run.
        cached: The run by the plan: what the scheduler was given, and the latents.
        weights: For each step, the weights of computed steps' outputs in what the scheduler was given.

    Returns:
        Nothing from a step on whose output has next to no weight in what the scheduler was given there, and nothing at
        all where the scheduler was given something else than the weights say.
    """
    given, latents = cached
    outputs: dict[int, Tensor] = {}
    is_off, found = False, []
    for step, used in enumerate(weights):
        shown = given[step].double()
        others = torch.zeros_like(shown)
        for node, weight in used.items():
            others = others if node == step else others + weight * outputs[node]
        if step not in used:
            is_off = True
            if not (shown - others).norm() <= _LIKE * shown.norm():
                return ()
        elif abs(used[step]) < _LEAST_OWN:
            break
        else:
            outputs[step] = (shown - others) / used[step]
            if is_off:
                found.append(step)
    return _compared(response, plain, (outputs, latents), found)


def _compared(
    response: Response, plain: Run, other: tuple[Tensor | Mapping[int, Tensor], Tensor], steps: Iterable[int]
) -> Answers:
    """The answers at some steps of a run whose latents are off."""
    scale, left = 1 / scale_of(response), left_in(response)
    found = []
    for each in steps:
        change, off = (one[each].double() - known[each].double() for one, known in zip(other, plain, strict=True))
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
    """The answer at other steps: the mean over runs of what lies between the measured ones.

    Args:
        left: Share of the schedule that is left at each step, `[S]`.
        answers: One for each run.

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


def checked_answers(name: str, value: Any) -> Answers:
    """Answers as they are kept: shares of a run, not rising, and what was off along and across.

    Raises:
        ConfigError: A value that is not allowed.
        ConfigTypeError: Something has a wrong type.
    """
    found = listed(name, value, _triple, "a list of triples, such as (0.9, -0.5, 1.2)", 1, MOST_STEPS)
    if any(one[0] < other[0] for one, other in pairwise(found)):
        raise ConfigError(f"{name}: the shares of the run rise; allowed: those of later and later steps.")
    return found


def _triple(name: str, value: Any) -> tuple[float, float, float]:
    left, along, across = listed(name, value, finite, "three numbers, such as (0.9, -0.5, 1.2)", 3, 3)
    if not LEAST_LEFT <= left <= 1 or abs(along) > MOST or not 0 <= across <= MOST:
        raise ConfigError(
            f"{name}=({left:g}, {along:g}, {across:g}); allowed: a share from {LEAST_LEFT} to 1, a number from "
            f"{-MOST:g} to {MOST:g}, and one from 0 to {MOST:g}."
        )
    return left, along, across
