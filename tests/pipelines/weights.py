"""How much each output of the transformer weighs in the final latents, found by trying it on the whole pipeline.

A run is made again with the outputs of the run before, and once more with something added to those of one step. What
that changes at the end is what the library's own number says, which it gets from the scheduler alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from sgl_diffusion_accel.caching.cache_patch import put_around
from sgl_diffusion_accel.caching.parts.gap_control import GapControl, GapSettings
from sgl_diffusion_accel.loop.scheduler_response import Response
from sgl_diffusion_accel.targets import find_targets

from .base import Case, values
from .trace import Trace, denoisers

_ADDED = 1e-2


def off_by(case: Case, pipe: Any, trace: Trace) -> float | None:
    """How far a weight is off, relative to it and to that of the last step; None where the library has none."""
    response = _of_last_run(case, pipe)
    if response is None:
        return None
    last = trace.lengths[trace.calls[-1].loop] - 1
    seen: list[Any] = []
    with _hooked(pipe, seen.append):
        case.run(pipe)
    steps = [step for step in (1, last // 2, last) if response[-1, step]]
    plain = _with(case, pipe, trace, seen, None)
    changes = [float((_with(case, pipe, trace, seen, step) - plain).norm()) for step in steps]
    expected = np.abs(response[-1, steps])
    return float(np.abs(np.array(changes) / changes[-1] / (expected / expected[-1]) - 1).max())


def _of_last_run(case: Case, pipe: Any) -> Response | None:
    found: list[Response | None] = []

    def policy(run: Any) -> GapControl:
        found.append(run.response())
        return GapControl(GapSettings(0.0), np.ones(run.total), corrects=False)

    with put_around(find_targets(pipe), "watching", policy):
        case.run(pipe)
    return found[-1] if found else None


def _with(case: Case, pipe: Any, trace: Trace, seen: list[Any], step: int | None) -> Tensor:
    """What a run gives with these outputs of the transformer, those of a step of the last loop changed."""
    left = iter(zip(trace.calls, seen, strict=True))
    loop = trace.calls[-1].loop

    def exchanged(_: Any) -> Any:
        call, output = next(left)
        return _changed(output) if (call.loop, call.step) == (loop, step) else output

    with _hooked(pipe, exchanged):
        return case.run(pipe)


@contextmanager
def _hooked(pipe: Any, what: Any) -> Iterator[None]:
    hooks = [each.register_forward_hook(lambda _, __, output: what(output)) for each in denoisers(pipe).values()]
    yield
    for hook in hooks:
        hook.remove()


def _changed(output: Any) -> Any:
    """The same is added for each branch, also where they come as one batch: guidance leaves that as it is."""
    if isinstance(output, Tensor):
        return output + _ADDED * values(1, *output.shape[1:], key="added").to(output.dtype)
    if isinstance(output, dict):
        return type(output)(**{key: _changed(value) for key, value in output.items()})
    return type(output)(map(_changed, output)) if isinstance(output, (tuple, list)) else output
