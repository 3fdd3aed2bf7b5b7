"""Magnitude ratios: how much larger or smaller what the blocks add is at each step than at the step before."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.validate import FrozenSettings, count, real

Ratios = tuple["float | None", ...]
"""γ of each denoising step of a run; None where it is unknown."""


@dataclass(frozen=True)
class MagnitudeRatios:
    """The magnitude ratios of MagCache, for each transformer of a pipeline and each branch; `calibrate` records them.

    γ_s = mean over tokens of ‖r_s‖₂ / ‖r_s-1‖₂, with r_s `[B, T, C]` what all blocks together have added to the hidden
    states at step s, and the mean of that over the calls.

    Attributes:
        ratios: Component name to branch to γ of each denoising step of the run. None where it is unknown: at the first
            step of a transformer, at the last step of a run, where another transformer runs.
        spread: Component name to branch to the standard deviation of γ over the calls (root mean square over the
            steps); 0 for a single call, and where none is given.
        calls: How many calls they are the mean of.

    Raises:
        ConfigError: A ratio or a spread is not a finite number from 0, branches have different numbers of steps, no
            ratio of a branch is known, or `spread` has other branches than `ratios`.
        ConfigTypeError: Something has a wrong type.

    Source: MagCache, https://arxiv.org/abs/2506.09045, equation 5.

    Example:
        >>> ratios = MagnitudeRatios({"transformer": {"cond": [None, 1.02, 0.98, None]}})
        >>> ratios.steps, ratios.of("transformer", "uncond")
        (4, (None, 1.02, 0.98, None))
    """

    ratios: Mapping[str, Mapping[str, Sequence[float | None]]]
    spread: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    calls: int = 1

    def __post_init__(self) -> None:
        ratios = {
            component: FrozenSettings({branch: _checked(values) for branch, values in branches.items()})
            for component, branches in _nested("ratios", self.ratios).items()
        }
        found = {component: set(branches) for component, branches in ratios.items()}
        if not ratios or not all(ratios.values()):
            raise ConfigError("ratios has no branch. Record them: plan = calibrate(pipe, calls).")
        if len(lengths := {len(values) for branches in ratios.values() for values in branches.values()}) > 1:
            raise ConfigError(f"ratios has branches of {_listed(lengths)} steps; allowed: as many for each.")
        unknown = {component: dict.fromkeys(branches, 0.0) for component, branches in ratios.items()}
        spread = {
            component: FrozenSettings({branch: _finite("spread", value) for branch, value in branches.items()})
            for component, branches in (_nested("spread", self.spread) or unknown).items()
        }
        if {component: set(branches) for component, branches in spread.items()} != found:
            raise ConfigError("spread has other branches than ratios; allowed: a number for each of theirs.")
        object.__setattr__(self, "ratios", FrozenSettings(ratios))
        object.__setattr__(self, "spread", FrozenSettings(spread))
        object.__setattr__(self, "calls", count("calls", self.calls, 1))

    @property
    def steps(self) -> int:
        """Denoising steps of the runs that they were recorded in."""
        return len(next(iter(next(iter(self.ratios.values())).values())))

    @property
    def noise(self) -> float:
        """How steady they are: the largest over all branches of spread / mean |1 - γ|; from about 1 on they say little.

        0 for a single call, which tells nothing of it.
        """
        shares = []
        for component, branches in self.ratios.items():
            for branch, values in branches.items():
                size = fmean(abs(1 - value) for value in values if value is not None)
                spread = self.spread[component][branch]
                shares.append(spread / size if size else (math.inf if spread else 0.0))
        return max(shares)

    def of(self, component: str, branch: str) -> Ratios:
        """The ratios of one branch; the mean of all those known for a branch that was not recorded.

        Args:
            component: Name of the transformer.
            branch: Such as `"cond"`.

        Raises:
            ConfigError: The transformer was not recorded.
        """
        if component not in self.ratios:
            raise ConfigError(
                f"there are no magnitude ratios for {component!r}, only for {_listed(map(repr, self.ratios))}. Record "
                "them on this pipeline, with as many steps as you run: plan = calibrate(pipe, calls)."
            )
        branches = self.ratios[component]
        if branch in branches:
            return tuple(branches[branch])
        return tuple(_mean_of_known(step, [1] * len(branches)) for step in zip(*branches.values(), strict=True))

    def merge(self, *others: MagnitudeRatios) -> MagnitudeRatios:
        """Joins recordings, as if all calls had been made in one: means and spreads weighted by calls.

        Raises:
            ConfigError: They have different numbers of steps.
        """
        parts = (self, *others)
        if len(lengths := {part.steps for part in parts}) > 1:
            raise ConfigError(
                f"magnitude ratios of {_listed(lengths)} steps cannot be merged. Calibrate with calls alike."
            )
        names = {(name, branch): None for part in parts for name in part.ratios for branch in part.ratios[name]}
        ratios: dict[str, dict[str, Ratios]] = {}
        spread: dict[str, dict[str, float]] = {}
        for name, branch in names:
            having = [part for part in parts if branch in part.ratios.get(name, {})]
            mean, deviation = _pooled(
                [(part.calls, part.ratios[name][branch], part.spread[name][branch]) for part in having]
            )
            ratios.setdefault(name, {})[branch] = mean
            spread.setdefault(name, {})[branch] = deviation
        return MagnitudeRatios(ratios, spread, sum(part.calls for part in parts))


@functools.lru_cache(maxsize=256)
def nearest(ratios: Ratios, total: int) -> tuple[float, ...]:
    """The ratios for a run of `total` steps: at each step that of the nearest one known, in parts of the run.

    Example:
        >>> nearest((None, 1.1, 1.2, 1.3, None), 3)
        (1.1, 1.2, 1.3)
    """
    known = {step: ratio for step, ratio in enumerate(ratios) if ratio is not None}
    scale = (len(ratios) - 1) / max(total - 1, 1)
    wanted = [round(step * scale) for step in range(total)]
    return tuple(known[min(known, key=lambda each, at=at: abs(each - at))] for at in wanted)  # type: ignore[misc]


def _pooled(parts: Sequence[tuple[int, Sequence[float | None], float]]) -> tuple[Ratios, float]:
    """Mean ratios and spread of (calls, ratios, spread)."""
    weights, recorded, spreads = zip(*parts, strict=True)
    mean = tuple(_mean_of_known(step, weights) for step in zip(*recorded, strict=True))
    # Total variance: what the calls of each part differ among themselves, and what the parts' means do.
    variance = 0.0
    for weight, ratios, spread in zip(weights, recorded, spreads, strict=True):
        pairs = [(ratio, at) for ratio, at in zip(ratios, mean, strict=True) if ratio is not None]
        variance += weight / sum(weights) * (spread**2 + fmean((ratio - at) ** 2 for ratio, at in pairs))
    return mean, math.sqrt(variance)


def _mean_of_known(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None


def _nested(name: str, given: Any) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(given, Mapping) or not all(isinstance(branches, Mapping) for branches in given.values()):
        raise ConfigTypeError(
            f"{name} is a {type(given).__name__}; allowed: a dict of dicts, such as "
            '{"transformer": {"cond": …, "uncond": …}}.'
        )
    return given


def _checked(values: Any) -> Ratios:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigTypeError(
            f"ratios has a {type(values).__name__}; allowed: a number for each denoising step, None where unknown."
        )
    if all(value is None for value in values):
        raise ConfigError(f"no ratio of the {len(values)} steps is known; allowed: a number for at least one of them.")
    return tuple(None if value is None else _finite("ratios", value) for value in values)


def _finite(name: str, value: Any) -> float:
    number = real(name, value, "a number from 0")
    if not 0 <= number < math.inf:
        raise ConfigError(f"{name} has {number}; allowed: finite numbers from 0.")
    return number


def _listed(names: Iterable[Any]) -> str:
    return " and ".join(str(each) for each in names)
