"""One row of a result: a model as it is, under a cache of this library, or under a peer's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .caches import NEVER_STEPS, STEPS, Apply, computed_steps
from .models import Built, Place
from .timing import DeviceTimes, HostTimes, computed_by_last_block, per_step, run, summary

Row = dict[str, Any]


def unpatched(built: Built, place: Place, reference: Tensor | None, host: bool = True) -> Row:
    """The model as it is.

    Args:
        built: The pipeline and its call.
        place: Where.
        reference: The output of an earlier run, to see whether the model gives the same twice.
        host: Whether the host's part is measured as well, in a second run.
    """
    device = run(built, place, NEVER_STEPS, DeviceTimes(place.device))
    alone = run(built, place, NEVER_STEPS, HostTimes(place.device)) if host else None
    row = summary(device, alone, [True] * NEVER_STEPS)
    return row if reference is None else row | {"bitwise": torch.equal(device.output, reference)}


def never_skipping(built: Built, place: Place, apply: Apply, reference: Tensor) -> Row:
    """A cache that computes every step: what it costs, and whether the output is the unpatched one to the bit."""
    with apply(built.pipe) as patch:
        device = run(built, place, NEVER_STEPS, DeviceTimes(place.device))
        computed = computed_steps(patch, NEVER_STEPS)
    return summary(device, None, computed) | {"bitwise": torch.equal(device.output, reference)}


def skipping(built: Built, place: Place, apply: Apply) -> Row:
    """A cache that skips."""
    with apply(built.pipe) as patch:
        device = run(built, place, STEPS, DeviceTimes(place.device))
        computed = computed_steps(patch, STEPS)
        host = run(built, place, STEPS, HostTimes(place.device))
        is_same = computed_steps(patch, STEPS) == computed  # else the host's times belong to other steps
    return summary(device, host if is_same else None, computed)


def peer(built: Built, place: Place, enable: Callable[[Any], AbstractContextManager[object]]) -> Row:
    """A peer's cache; which steps it computed is seen from outside."""
    with enable(built.pipe):
        with computed_by_last_block(built) as calls:
            device = run(built, place, STEPS, DeviceTimes(place.device))
        host = run(built, place, STEPS, HostTimes(place.device))
    return summary(device, host, per_step(calls, STEPS))
