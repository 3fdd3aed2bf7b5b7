"""Finds the best steps to compute, by exchanging one computed step for another while the expected error falls."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sgl_diffusion_accel.calibration.designs.design import Design, DesignSettings, Draft, Moments

_ROUNDS = 3
_NEAR, _FAR = 3, 4  # exchanges tried for each computed step: with its neighbours, and with some drawn at random
_BETTER = 0.999


def best_design(computed: int, moments: Moments, settings: DesignSettings | None = None) -> Design:
    """Finds a good design with a given number of computed steps.

    The first step is always computed. The search begins with evenly spaced steps, and takes about two seconds for
    50 steps; it is a descent, so that what it finds is good and not proven to be best. The same input gives the same
    design, and is searched for once in a process: what a plan has shown or tried costs no second search where it runs.

    Args:
        computed: How many steps are computed, from 1 to the steps of the run.
        moments: Of the runs.
        settings: See `DesignSettings`; None for those of the scheduler.
    """
    return _search(computed, _Known(_digest(moments), moments), settings or DesignSettings.of(moments))


@dataclass(frozen=True)
class _Known:
    """Moments that are looked up by what they hold, since arrays cannot be."""

    digest: bytes
    moments: Moments = field(compare=False)


def _digest(moments: Moments) -> bytes:
    """Of all that a design depends on."""
    arrays = [each.astype(np.float64).tobytes() for each in (moments.gram, moments.response)]
    return hashlib.sha256(b"".join([*arrays, repr((moments.answers, moments.reach)).encode()])).digest()


@functools.lru_cache(maxsize=128)
def _search(computed: int, known: _Known, settings: DesignSettings) -> Design:
    moments, start = known.moments, np.zeros(known.moments.steps, dtype=bool)
    start[np.round(np.linspace(0, moments.steps - 1, computed)).astype(int)] = True
    return _descend(Draft(moments, settings).then(start.tolist())).design()


def fewest_steps(error: Callable[[int], float], steps: int, wanted: float) -> int:
    """The fewest computed steps whose expected error is within what is wanted; `steps` if none is.

    Args:
        error: Of a number of computed steps; it falls with them, but for small bumps.
        steps: Of the run.
        wanted: Largest error.
    """
    low, high = 1, steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= wanted else (middle + 1, high)
    return low


def _descend(draft: Draft) -> Draft:
    # A fixed seed: the same plan and schedule must give the same steps in every run.
    random = np.random.default_rng(0)
    best = draft.design().error
    for _ in range(_ROUNDS):
        improved = False
        for step in random.permutation(
            # The first step stays computed: there is nothing to predict it from.
            [step for step, computed in enumerate(draft.mask) if computed and step]
        ).tolist():
            free = [other for other, computed in enumerate(draft.mask) if not computed]
            near = [other for other in free if abs(other - step) <= _NEAR]
            far = [other for other in free if abs(other - step) > _NEAR]
            drawn = random.choice(far, min(_FAR, len(far)), replace=False).tolist() if far else []
            tried = [_exchanged(draft, step, other) for other in near + drawn]
            errors = [each.design().error for each in tried]
            if tried and min(errors) < _BETTER * best:
                best = min(errors)
                draft, improved = tried[errors.index(best)], True
        if not improved:
            break
    return draft


def _exchanged(draft: Draft, off: int, on: int) -> Draft:
    """The same steps but for two, from the first of them on designed anew."""
    changed = list(draft.mask)
    changed[off], changed[on] = False, True
    first = min(off, on)
    return draft.until(first).then(changed[first:])
