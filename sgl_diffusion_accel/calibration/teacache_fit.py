"""`fit_teacache`: TeaCache's coefficients for any model, from a few calls of the user's own."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sgl_diffusion_accel.caching.cache_patch import refuse_cached
from sgl_diffusion_accel.caching.parts.policies import Policy, Position, Tally
from sgl_diffusion_accel.caching.teacache.accumulating_policy import AccumulatingPolicy
from sgl_diffusion_accel.caching.teacache.coefficients import DEGREE, TeaCacheCoefficients
from sgl_diffusion_accel.caching.teacache.teacache_config import TeaCacheConfig
from sgl_diffusion_accel.caching.teacache.teacache_models import family_of
from sgl_diffusion_accel.calibration.block_record import BlockRecording, Trace
from sgl_diffusion_accel.calls import read_calls
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.targets import Pipeline, Target, find_targets
from sgl_diffusion_accel.validate import names_checked

logger = logging.getLogger(__name__)

_SPEEDUPS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
_CLOSE = 0.08  # a speed-up that no threshold comes this near to is left out
_GRID = 160
_POOR = 0.5  # R² below which the user is warned


@names_checked
def fit_teacache(
    pipe: Pipeline, calls: Iterable[Mapping[str, Any]], use_ret_steps: bool | None = None
) -> TeaCacheCoefficients:
    """Fits TeaCache's polynomial to a model, on uncached runs of calls like those that will be made later.

    At each step the relative L1 change of the signal and that of the transformer's output are recorded, on every
    branch; `numpy.polyfit` of degree 4 turns the one into the other. Thresholds for several speed-ups are found by
    replaying the recorded changes. The fit holds for the number of steps, scheduler and guidance of the calls; more
    prompts make it steadier (TeaCache's authors took tens of them, a handful is usable).

    Args:
        pipe: A diffusers pipeline with a diffusion transformer (two for Wan2.2), with no cache on it.
        calls: Keyword arguments of `pipe(...)`, one dict for each run.
        use_ret_steps: For Wan: which of the two signals; see `TeaCacheConfig`.

    Returns:
        The coefficients, with thresholds, the range and the R² of the fit; for `apply_teacache(coefficients=...)`.

    Raises:
        ConfigError: No calls, too few steps in them, or a cache is on the pipeline.
        ConfigTypeError: `pipe` cannot be called, or a call is no dict.
        UnsupportedModelError: The pipeline has no transformer whose blocks could be cached.

    Source: TeaCache, https://arxiv.org/abs/2411.19108, section 3.3.

    Example:
        >>> coefficients = fit_teacache(pipe, calls=[call])
        >>> patch = apply_teacache(pipe, "2x", coefficients=coefficients)
        >>> patch.remove()
    """
    read = read_calls(pipe, calls, "fit_teacache(pipe, calls=…)")
    refuse_cached(find_targets(pipe), "a fit")
    with BlockRecording(pipe, use_ret_steps) as recording:
        for call in read:
            recording.run(call.fresh())
    return fit_recording(recording)


def fit_recording(recording: BlockRecording) -> TeaCacheCoefficients:
    """The coefficients that the runs recorded so far give.

    Raises:
        ConfigError: Too few steps.
    """
    second = [target for target in recording.targets if target.name == "transformer_2"]
    first = [target for target in recording.targets if target not in second]
    return _joined([_fit_together(recording, targets) for targets in (first, second) if targets])


def _fit_together(recording: BlockRecording, targets: Sequence[Target]) -> TeaCacheCoefficients:
    """The coefficients that components share: a model for each branch is fitted as the branches of one model are."""
    ran = [target for target in targets if recording.traces[target.name]] or targets[:1]
    has_choice = family_of(ran[0].module).retained is not None
    traces = [trace for target in ran for trace in recording.traces[target.name]]
    names = " and ".join(target.name for target in ran)
    return _fit(names, traces, recording.retained[ran[0].name], has_choice)


def _joined(fits: Sequence[TeaCacheCoefficients]) -> TeaCacheCoefficients:
    """The coefficients of one transformer or two, with thresholds for the speed-ups that both can have."""
    if len(fits) == 1:
        return fits[0]
    shared = set(fits[0].thresholds) & set(fits[1].thresholds)
    first, second = (
        dataclasses.replace(fit, thresholds={key: value for key, value in fit.thresholds.items() if key in shared})
        for fit in fits
    )
    return dataclasses.replace(first, secondary=second)


def _fit(component: str, traces: Sequence[tuple[int, Trace]], retains: bool, has_choice: bool) -> TeaCacheCoefficients:
    """The coefficients for one transformer."""
    changes = np.array([point[1] for _, trace in traces for point in trace])
    moved = np.array([point[2] for _, trace in traces for point in trace])
    if len(np.unique(changes)) <= DEGREE:
        raise ConfigError(
            f"the calls give {len(np.unique(changes))} different changes of the signal of {component}, which ran "
            f"{max((len(trace) + 1 for _, trace in traces), default=1)} steps at most; a polynomial of degree {DEGREE} "
            f"needs more than {DEGREE} changes. Give calls of 10 denoising steps or more for each transformer."
        )
    coefficients = np.polyfit(changes, moved, DEGREE, full=True)[0]  # in full, it does not warn of a low rank
    residual = moved - np.polyval(coefficients, changes)
    spread = float(((moved - moved.mean()) ** 2).sum())
    r_squared = 1 - float((residual**2).sum()) / spread if spread else 1.0
    if r_squared < _POOR:
        logger.warning(
            "%s: the fit explains only %.0f %% of how much the output changes (R² = %.2f): TeaCache will choose its "
            "steps little better than at random.",
            component,
            max(r_squared, 0) * 100,
            r_squared,
        )
    fit = TeaCacheCoefficients(
        tuple(map(float, coefficients)),
        low=float(changes.min()),
        high=float(changes.max()),
        r_squared=r_squared,
        use_ret_steps=retains if has_choice else None,
        steps=totals.pop() if len(totals := {total for total, _ in traces}) == 1 else None,
    )
    fit = dataclasses.replace(fit, thresholds=_thresholds(fit, traces, retains))
    if not fit.thresholds:
        logger.warning(
            "%s: the calls are too short for a threshold by speed-up. Give calls of 10 denoising steps or more, or "
            "teacache_thresh as a number.",
            component,
        )
    return fit


def _thresholds(fit: TeaCacheCoefficients, traces: Sequence[tuple[int, Trace]], retains: bool) -> dict[float, float]:
    """Speed-up to the threshold that gives it, as far as there is one."""
    window = TeaCacheConfig().window(retains)

    def speedup(threshold: float) -> float:
        policy = AccumulatingPolicy(threshold, fit, window)
        flags = [flag for total, trace in traces for flag in replay(policy, total, trace)]
        return len(flags) / sum(flags)

    largest = sum(max(fit(x), 0.0) for _, trace in traces for _, x, _ in trace) or 1.0
    found = {}
    for wanted in _SPEEDUPS:
        threshold = float(f"{_threshold_for(speedup, wanted, largest):.6g}")
        if abs(speedup(threshold) / wanted - 1) < _CLOSE:
            found[wanted] = threshold
    return found


def _threshold_for(speedup: Callable[[float], float], wanted: float, largest: float) -> float:
    """A threshold that gives a speed-up as near as can be to what is wanted.

    The speed-up climbs in jumps with the threshold, so that many thresholds give the same. The middle of them is taken:
    it stands most firmly where the changes of another call differ a little.
    """
    low, high = math.log(largest * 1e-6), math.log(largest)
    for _ in range(2):  # the whole range, then closely around what was found
        grid = np.linspace(low, high, _GRID)
        reached = [speedup(math.exp(each)) for each in grid]
        best = min(reached, key=lambda each: abs(each - wanted))
        first = reached.index(best)
        last = next((i for i in range(first, _GRID) if reached[i] != best), _GRID) - 1
        low, high = grid[max(first - 1, 0)], grid[min(last + 1, _GRID - 1)]
    return math.exp((grid[first] + grid[last]) / 2)


def replay(policy: Policy, total: int, trace: Trace) -> list[bool]:
    """Whether each step of a branch would be computed, by recorded changes; its first step is."""
    flags, tally = [True], Tally()
    for step, change, _ in trace:
        decision = policy.decide(Position(step, total, step), tally, lambda change=change: change)  # type: ignore[misc]
        tally = tally.after(decision)
        flags.append(decision.compute)
    return flags
