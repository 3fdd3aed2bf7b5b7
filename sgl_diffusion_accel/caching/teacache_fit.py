"""`fit_teacache`: TeaCache's coefficients for any model, from a few calls of the user's own."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.blocks import divide
from sgl_diffusion_accel.caching.cache_patch import KIND, apply_cache, refuse_foreign_cache
from sgl_diffusion_accel.caching.cached_model import Parts
from sgl_diffusion_accel.caching.policies import AccumulatingPolicy, Change, Decision, Policy, Position, Tally
from sgl_diffusion_accel.caching.polynomial import DEGREE
from sgl_diffusion_accel.caching.predictors import Reuse
from sgl_diffusion_accel.caching.signals import relative_l1
from sgl_diffusion_accel.caching.stats import RunStats
from sgl_diffusion_accel.caching.teacache import check_signal, uses_ret_steps
from sgl_diffusion_accel.caching.teacache_config import TeaCacheCoefficients, TeaCacheConfig
from sgl_diffusion_accel.caching.teacache_models import family_of
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, UnsupportedModelError
from sgl_diffusion_accel.patch import patches_of
from sgl_diffusion_accel.targets import find_transformers, unwrap

logger = logging.getLogger(__name__)

_SPEEDUPS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
_CLOSE = 0.08  # a speed-up that no threshold comes this near to is left out
_GRID = 160
_POOR = 0.5  # R² below which the user is warned


@final
@dataclass(frozen=True)
class _Recording(Policy):
    """Computes every step and measures every change."""

    @property
    def needs_signal(self) -> bool:
        return True

    def decide(self, position: Position, tally: Tally, change: Change) -> Decision:  # noqa: ARG002
        return Decision(True, "recording", change())


Trace = list[tuple[int, float, float]]
"""One branch of one run: step, change of the signal, change of the output."""


@dataclass
class _Recorder:
    """Collects the changes of the outputs of one transformer, by run and branch."""

    outputs: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    changes: dict[tuple[int, str], dict[int, float]] = field(default_factory=dict)

    def __call__(self, run: int, branch: str, step: int, output: Any) -> None:
        """Sees what the transformer has returned."""
        now = _first_tensor(output).detach()
        key = (run, branch)
        before = self.outputs.get(key)
        if before is not None and before.shape == now.shape:
            self.changes.setdefault(key, {})[step] = relative_l1(now, before)
        self.outputs = {each: kept for each, kept in self.outputs.items() if each[0] >= run - 1}
        self.outputs[key] = now.clone()


def _first_tensor(output: Any) -> Tensor:
    """The tensor that a transformer has predicted; several of one shape, one a sample, as one."""
    parts = tuple(output.values()) if isinstance(output, Mapping) else output
    if isinstance(parts, Tensor):
        return parts
    if isinstance(parts, (list, tuple)) and parts:
        if isinstance(parts[0], Tensor) and isinstance(output, list):
            return torch.cat([part.flatten() for part in parts])
        return _first_tensor(parts[0])
    raise UnsupportedModelError(f"the transformer returns a {type(output).__name__}, and no tensor in it.")


def fit_teacache(
    pipe: Any, calls: Iterable[Mapping[str, Any]], use_ret_steps: bool | None = None
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
    calls = check_calls(pipe, calls, "fit_teacache")
    transformers = find_transformers(pipe)
    refuse_foreign_cache(transformers)
    for module in transformers.values():
        if any(patch.kind == KIND for patch in patches_of(unwrap(module))):
            raise ConfigError("a cache is on this pipeline, and a fit needs uncached runs. Type: remove(pipe)")
    with TeaCacheRecording(pipe, use_ret_steps) as recording:
        for call in calls:
            recording.run(call)
    return recording.fit()


class TeaCacheRecording:
    """Records the changes of signal and output of a pipeline's runs, for a fit; a context manager.

    Args:
        pipe: The pipeline, with no cache on it.
        use_ret_steps: See `fit_teacache`.
    """

    def __init__(self, pipe: Any, use_ret_steps: bool | None = None) -> None:
        self._pipe = pipe
        self._transformers = find_transformers(pipe)
        self._recorders = {name: _Recorder() for name in self._transformers}
        self._traces: dict[str, list[tuple[int, Trace]]] = {name: [] for name in self._transformers}
        self._retained: dict[str, bool] = {}
        parts = {}
        for name, module in self._transformers.items():
            family = family_of(unwrap(module))
            self._retained[name] = retains = uses_ret_steps(unwrap(module), use_ret_steps)
            signal = family.retained if retains and family.retained is not None else family.signal
            check_signal(unwrap(module), signal)
            layout = divide(unwrap(module), 0, 0)
            parts[name] = Parts(layout, _Recording(), Reuse(), signal, observe=self._recorders[name])
        self._patch = apply_cache("TeaCache, recording", self._transformers, parts)

    @staticmethod
    def is_possible(transformers: Mapping[str, nn.Module]) -> bool:
        """Whether the models have blocks and a signal."""
        try:
            for module in transformers.values():
                divide(unwrap(module), 0, 0)
                check_signal(unwrap(module), family_of(unwrap(module)).signal)
        except UnsupportedModelError:
            return False
        return True

    def __enter__(self) -> TeaCacheRecording:
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.remove()

    def run(self, call: Mapping[str, Any]) -> None:
        """Runs one call, uncached.

        Raises:
            ConfigError: The call took the recording off.
            UnsupportedModelError: The pipeline ran without a loop that is known.
        """
        patch, started = self._patch, self._patch.stats.started
        self._pipe(**call)
        if not patch.active:
            raise ConfigError("the call took the recording off, by removing it or by applying another cache.")
        if patch.stats.started == started:
            raise UnsupportedModelError(
                f"{type(self._pipe).__name__} ran without a denoising loop that is known: nothing was recorded."
            )
        for name, recorder in self._recorders.items():
            runs = patch.stats.runs[started - patch.stats.started :]
            for number, run in enumerate(runs, patch.stats.started - len(runs) + 1):
                self._traces[name] += _traces(run, number, name, recorder)
            recorder.outputs.clear()
            recorder.changes.clear()

    def fit(self) -> TeaCacheCoefficients:
        """The coefficients that the runs so far give.

        Raises:
            ConfigError: Too few steps.
        """
        return _joined(
            [
                _fit(name, self._traces[name], self._retained[name], family_of(unwrap(module)).retained is not None)
                for name, module in self._transformers.items()
            ]
        )


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


def check_calls(pipe: Any, calls: Iterable[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The calls as a list.

    Args:
        pipe: A pipeline that can be called.
        calls: Keyword arguments of `pipe(...)`, one dict for each run.
        name: Of the function that was given them.

    Raises:
        ConfigError: There are none.
        ConfigTypeError: Something has a wrong type.
    """
    if not callable(pipe) or not isinstance(getattr(pipe, "components", None), dict):
        raise ConfigTypeError(
            f"{name} needs a pipeline that it can call, and got {type(pipe).__name__}. Type: {name}(pipe, "
            "calls=[dict(prompt=..., num_inference_steps=50), ...])"
        )
    if isinstance(calls, (Mapping, str)) or not isinstance(calls, Iterable):
        raise ConfigTypeError(
            f"calls is a {type(calls).__name__}; allowed: a list of dicts, each the keyword arguments of pipe(...)."
        )
    calls = list(calls)
    for call in calls:
        if not isinstance(call, Mapping):
            raise ConfigTypeError(
                f"calls holds a {type(call).__name__}; allowed: dicts, each the keyword arguments of pipe(...)."
            )
    if not calls:
        raise ConfigError("calls is empty: give the keyword arguments of at least one pipe(...) call, as a dict.")
    return calls


def _traces(run: RunStats, number: int, component: str, recorder: _Recorder) -> list[tuple[int, Trace]]:
    """(steps of the run, trace) of each branch of a run."""
    found = []
    for branch, records in run.branches.items():
        moved = recorder.changes.get((number, branch), {})
        trace = [
            (record.step, record.change, moved[record.step])
            for record in records.records
            if record.component == component and record.change is not None and record.step in moved
        ]
        trace = [point for point in trace if math.isfinite(point[1]) and math.isfinite(point[2])]
        if trace:
            found.append((run.steps, trace))
    return found


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.RankWarning)
        coefficients = np.polyfit(changes, moved, DEGREE)
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
        policy = AccumulatingPolicy(threshold, fit.polynomial, window)
        flags = [flag for total, trace in traces for flag in replay(policy, total, trace)]
        return len(flags) / sum(flags)

    largest = sum(max(fit.polynomial(x), 0.0) for _, trace in traces for _, x, _ in trace) or 1.0
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
