"""Cache settings that are measured, in one form for this library and for cache-dit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

PRESETS = ("slow", "medium", "fast", "ultra")
LATE_PRESETS = tuple(f"late-{preset}" for preset in PRESETS)
Way = Literal["dynamic", "static"]
POLICIES: tuple[Way, ...] = ("dynamic", "static")
_LATE: tuple[tuple[int, Way, int], ...] = ((0, "static", 1), (0, "static", 2), (1, "dynamic", 2))


@dataclass(frozen=True)
class Setting:
    """One setting of DBCache; the names are those of `apply_cache_dit`, the defaults SGLang's."""

    fn: int = 1
    bn: int = 0
    warmup: int = 4
    threshold: float = 0.24
    continuous: int | None = 3
    order: int = 0
    preset: str | None = None
    policy: Way = "dynamic"
    spacing: Literal["step", "sigma"] = "step"
    tolerance: float | None = None
    calibrator: Literal["DMD", "FoCa"] | None = None
    """What cache-dit alone has in the place of TaylorSeer."""

    @property
    def knobs(self) -> dict[str, Any]:
        """What `apply_cache_dit` is given."""
        return {
            "fn_compute_blocks": self.fn,
            "bn_compute_blocks": self.bn,
            "max_warmup_steps": self.warmup,
            "residual_diff_threshold": self.threshold,
            "max_continuous_cached_steps": self.continuous,
            "taylorseer_order": self.order,
            "steps_mask": self.preset,
            "steps_policy": self.policy,
            "taylorseer_spacing": self.spacing,
            "tolerance": self.tolerance,
        }

    @property
    def name(self) -> str:
        """A short name, such as `F1 W4 MC3 R.24 TS1`, `fast, static, TS1` or `gap control .008, F0, TS2`."""
        order = self.calibrator or (f"TS{self.order}" if self.order else "reuse")
        if self.spacing != "step":
            order += f" in {self.spacing}"
        if self.tolerance is not None:
            return f"gap control {self.tolerance:g}, F{self.fn}, {order}".replace(" 0.", " .")
        if self.preset:
            return f"SCM {self.preset} {self.policy}, {order}"
        limit = "" if self.continuous is None else f" MC{self.continuous}"
        ends = f"F{self.fn}" + (f" B{self.bn}" if self.bn else "")
        return f"{ends} W{self.warmup}{limit} R{self.threshold:g}, {order}".replace("R0.", "R.")


def dbcache_settings() -> list[Setting]:
    """SGLang's default and cache-dit's, and what a sweep of cache-dit's knobs found best at several costs."""
    return [
        Setting(order=0),
        Setting(order=1),
        Setting(order=2),
        Setting(fn=8, warmup=8, threshold=0.08, continuous=None),
        Setting(fn=8, warmup=8, threshold=0.08, continuous=None, order=1),
        Setting(warmup=3, threshold=0.16, order=1),
        Setting(warmup=3, threshold=0.16, order=2),
        Setting(warmup=3, threshold=0.16, continuous=5, order=2),
        Setting(warmup=3, threshold=0.16, continuous=8, order=2),
        Setting(warmup=3, threshold=0.3, continuous=5, order=2),
        Setting(warmup=3, threshold=0.3, continuous=8, order=1),
    ]


def calibrator_settings() -> list[Setting]:
    """cache-dit's other predictors, at its default and where its TaylorSeer was the best at some cost."""
    places = ((4, 0.24, 3), (3, 0.16, 5), (3, 0.3, 8))
    return [
        Setting(warmup=warmup, threshold=threshold, continuous=continuous, calibrator=calibrator)
        for calibrator in ("DMD", "FoCa")
        for warmup, threshold, continuous in places
    ]


def preset_settings() -> list[Setting]:
    """Every preset of the step computation mask, static and dynamic, with reuse and with first-order prediction."""
    return [
        Setting(preset=preset, policy=policy, order=order)
        for preset in PRESETS
        for policy in POLICIES
        for order in (0, 1)
    ]


def late_settings() -> list[Setting]:
    """This library's own step masks, which compute ever more densely towards the end; they need no first block."""
    return [
        Setting(fn=fn, preset=preset, policy=policy, order=order)
        for preset in LATE_PRESETS
        for fn, policy, order in _LATE
    ]


def sigma_settings() -> list[Setting]:
    """Prediction that counts in noise levels and not in steps, which the peers do not have."""
    late = [Setting(fn=0, preset=preset, policy="static", order=2, spacing="sigma") for preset in LATE_PRESETS]
    return [Setting(order=1, spacing="sigma"), Setting(order=2, spacing="sigma"), *late]


def gap_settings() -> list[Setting]:
    """Gap control in place of the threshold, which the peers do not have."""
    return [
        Setting(fn=fn, order=order, tolerance=tolerance)
        for fn in (0, 1)
        for order in (1, 2)
        for tolerance in GAP_TOLERANCES
    ]


@dataclass(frozen=True)
class TeaCacheSetting:
    """One setting of TeaCache, with coefficients fitted to the model; the names are those of `apply_teacache`."""

    speedup: str = "2x"
    order: int = 0
    use_ret_steps: bool | None = None

    @property
    def name(self) -> str:
        """A short name, such as `TeaCache 2x, fitted, TS1`."""
        signal = ", ret steps" if self.use_ret_steps else ""
        return f"TeaCache {self.speedup}, fitted{signal}, " + (f"TS{self.order}" if self.order else "reuse")


TEACACHE_SPEEDUPS = ("1.5x", "2x", "2.5x", "3x")


def teacache_settings(model: str) -> list[TeaCacheSetting]:
    """Four thresholds, with reuse as published and with first-order prediction; on Wan both signals."""
    signals = (None, True) if model == "wan" else (None,)
    return [TeaCacheSetting(wanted, order, ret) for ret in signals for order in (0, 1) for wanted in TEACACHE_SPEEDUPS]


@dataclass(frozen=True)
class MagCacheSetting:
    """One setting of MagCache, with ratios recorded from the model; the names are those of `apply_magcache`."""

    threshold: float = 0.06
    skips: int = 3
    order: int = 0
    retention: float = 0.2

    @property
    def name(self) -> str:
        """A short name, such as `MagCache .06 MS3, calibrated, TS1`."""
        order = f"TS{self.order}" if self.order else "reuse"
        retention = "" if self.retention == MagCacheSetting.retention else f" RR{self.retention:g}"
        return f"MagCache {self.threshold:g} MS{self.skips}{retention}, calibrated, {order}".replace("0.", ".")


def magcache_settings() -> list[MagCacheSetting]:
    """Three thresholds and two limits, with reuse as published and with first-order prediction, which retains less."""
    published = [
        MagCacheSetting(threshold, skips, order)
        for order in (0, 1)
        for threshold in (0.06, 0.12, 0.24)
        for skips in (3, 5)
    ]
    return published + [MagCacheSetting(each, skips, 1, 0.06) for each, skips in ((0.06, 1), (0.12, 2), (0.12, 3))]


TOLERANCES = (0.0003, 0.0006, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008)
"""Tolerances of the adaptive cache, the default among them."""

GAP_TOLERANCES = (0.004, 0.008, 0.016)
"""Tolerances of gap control on residuals. Nothing is put right there, so the same number costs more steps."""

_PLANNED = (1.5, 2.0, 2.4, 2.8, 3.3, 3.8, 5.0, 6.25)


def planned_speedups(steps: int) -> tuple[float, ...]:
    """Speed-ups that are asked of a calibrated plan.

    Of 30 steps 3 times too: fewer steps and peers compute ten there, and must not be held against a plan of nine.

    Args:
        steps: Of the run.
    """
    return (*_PLANNED, 3.0) if steps == 30 else _PLANNED


_SHOWN: tuple[Setting | TeaCacheSetting | MagCacheSetting, ...] = (
    Setting(),
    Setting(warmup=3, threshold=0.16, continuous=5, order=2),
    Setting(warmup=3, threshold=0.3, continuous=5, order=2),
    Setting(warmup=3, threshold=0.3, continuous=8, order=1),
    Setting(fn=1, preset="late-fast", order=2),
    *(Setting(fn=0, preset=late, policy="static", order=order) for late in LATE_PRESETS[2:] for order in (1, 2)),
    *(Setting(fn=0, preset=late, policy="static", order=2, spacing="sigma") for late in LATE_PRESETS[2:]),
    *(Setting(fn=fn, order=2, tolerance=each) for fn in (0, 1) for each in GAP_TOLERANCES),
    *(TeaCacheSetting(wanted, 1) for wanted in TEACACHE_SPEEDUPS),
    *(MagCacheSetting(each, skips, 1, 0.06) for each, skips in ((0.06, 1), (0.12, 2), (0.12, 3))),
)
SHOWN = frozenset(each.name for each in _SHOWN)
"""Settings of this library that were the best of their method at some cost on some model; the others need `--full`."""
