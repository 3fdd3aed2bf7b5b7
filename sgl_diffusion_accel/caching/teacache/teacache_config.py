"""Settings of `apply_teacache`."""

from __future__ import annotations

import dataclasses
import logging
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgl_diffusion_accel.caching.teacache.polynomial import Polynomial
from sgl_diffusion_accel.caching.teacache.skip_window import Window
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, unknown_name
from sgl_diffusion_accel.validate import FrozenSettings, count, real

logger = logging.getLogger(__name__)

RET_STEPS = 5
"""Steps at the start that are computed with `use_ret_steps=True`."""

_SPEEDUP = re.compile(r"\s*(\d+(?:\.\d+)?)\s*x\s*", re.IGNORECASE)
_SLACK = 1.05  # how far a wanted speed-up may lie outside of those for which a threshold is known


@dataclass(frozen=True, repr=False)
class TeaCacheCoefficients:
    """A fitted polynomial of TeaCache, and the thresholds that go with it.

    Wherever coefficients are taken, five plain numbers do as well; see `fit_teacache` for how to get them for a model.
    To keep a fit, write `json.dumps(dataclasses.asdict(fit))`; `TeaCacheCoefficients(**json.loads(text))` reads it.

    Attributes:
        coefficients: c₀ … c₄ of c₀x⁴ + c₁x³ + c₂x² + c₃x + c₄, highest degree first, as `numpy.polyfit` gives them.
            x is the relative L1 change of the signal from one step to the next, the value that of the model's output.
        thresholds: Speed-up to the threshold that gives about that speed-up.
        low: Smallest change in the data of the fit; a smaller one is taken as that. None if unknown.
        high: Largest one; a step with a larger one is computed. None if unknown.
        r_squared: Share of the variance of the output's change that the fit explains, at most 1. None if unknown.
        use_ret_steps: For Wan: the signal that they were fitted on; None if unknown, or where there is one only.
        secondary: The same for `transformer_2`, for models with two experts.
        steps: Denoising steps of the runs that they were fitted on; None if unknown.

    Raises:
        ConfigError: Not five finite numbers, or a range or threshold that cannot be.
        ConfigTypeError: Something is not a number.
    """

    coefficients: tuple[float, ...]
    thresholds: Mapping[float, float] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    r_squared: float | None = None
    use_ret_steps: bool | None = None
    secondary: TeaCacheCoefficients | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        polynomial = Polynomial(self.coefficients, self.low, self.high)
        for name in ("coefficients", "low", "high"):
            object.__setattr__(self, name, getattr(polynomial, name))
        object.__setattr__(self, "thresholds", FrozenSettings(_checked_thresholds(self.thresholds)))
        if self.r_squared is not None:
            object.__setattr__(self, "r_squared", real("r_squared", self.r_squared))
        if self.use_ret_steps is not None and not isinstance(self.use_ret_steps, bool):
            raise ConfigTypeError(f"use_ret_steps={self.use_ret_steps!r}: allowed are True, False and None.")
        if self.steps is not None:
            object.__setattr__(self, "steps", count("steps", self.steps, 1))
        other: Any = self.secondary
        if isinstance(other, Mapping):
            object.__setattr__(self, "secondary", TeaCacheCoefficients(**other))
        elif other is not None and not isinstance(other, TeaCacheCoefficients):
            raise ConfigTypeError(
                f"secondary is a {type(other).__name__}; allowed: TeaCacheCoefficients for transformer_2."
            )

    @property
    def polynomial(self) -> Polynomial:
        """The polynomial with its range."""
        return Polynomial(self.coefficients, self.low, self.high)

    def threshold(self, wanted: float | str | None, is_strict: bool = True) -> tuple[float, str]:
        """Finds a threshold.

        Args:
            wanted: The threshold itself; a speed-up such as `"2x"`, for the nearest one known, of two the more careful;
                or None for the most careful one known.
            is_strict: Whether a speed-up outside of those known is refused.

        Returns:
            The threshold, and a word on where it comes from.

        Raises:
            ConfigError: No threshold is known for that.
        """
        if wanted is not None and not isinstance(wanted, str):
            return real("teacache_thresh", wanted), ""
        known = ", ".join(f"'{speedup:g}x' ({threshold:g})" for speedup, threshold in self.thresholds.items())
        if not self.thresholds:
            raise ConfigError(
                f"no threshold is known for coefficients={list(self.coefficients)}. Give one as a number: "
                "teacache_thresh=0.1, smaller for a picture closer to the uncached one; or get thresholds by speed-up "
                "together with the coefficients from fit_teacache(pipe, calls)."
            )
        speedups = sorted(self.thresholds)
        speedup = speedups[0] if wanted is None else _speedup(wanted)
        if is_strict and not speedups[0] / _SLACK <= speedup <= speedups[-1] * _SLACK:
            raise ConfigError(f"teacache_thresh={wanted!r}: none is known for that. Known: {known}; or give a number.")
        nearest = min(speedups, key=lambda each: (round(abs(each - speedup), 9), each))
        if not speedup / _SLACK <= nearest <= speedup * _SLACK:
            logger.warning("no threshold is known for %gx: taken is that for %gx. Known: %s.", speedup, nearest, known)
        return self.thresholds[nearest], f" for {nearest:g}x"

    def __iter__(self) -> Any:
        return iter(self.coefficients)

    def __len__(self) -> int:
        return len(self.coefficients)

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name, value in vars(self).items() if value not in (None, {})]
        return f"TeaCacheCoefficients({', '.join(given)})"


@dataclass(frozen=True)
class TeaCacheConfig:
    """Settings of TeaCache. None stands for the model's own.

    A config is checked when it is made and never changed.

    Attributes:
        teacache_thresh: Compute a step when the estimated changes of the output since the last computed step sum up to
            it; larger is faster and less faithful. Or a speed-up for which a threshold was published, such as
            `"1.6x"`. None for the most careful of those.
        coefficients: Five numbers, highest degree first, or `TeaCacheCoefficients`.
        start_skipping: First denoising step that may be skipped: a step index, negative from the end, or a float as a
            share of the steps. None: 5 with `use_ret_steps`, else 1. The first step is always computed.
        end_skipping: First step that is computed again at the end, in the same units. None: -1. The last step is
            always computed.
        use_ret_steps: For Wan: whether the signal is the projected time embedding and the first 5 steps are computed
            (True), or the time embedding itself (False). None: as the coefficients were fitted, else False.
        variant: Which published coefficients to take, by name, such as `"wan2.1-t2v-14b"`. None: by the model's config.
        taylorseer_order: Order of a Taylor prediction of what the blocks add, 0 reuses the last computed.
        secondary: Settings of `transformer_2` that differ, by the same names; None for none.

    Raises:
        ConfigError: A value is not allowed.
        ConfigTypeError: A value has the wrong type.
    """

    teacache_thresh: float | str | None = None
    coefficients: Sequence[float] | TeaCacheCoefficients | None = None
    start_skipping: int | float | None = None
    end_skipping: int | float | None = None
    use_ret_steps: bool | None = None
    variant: str | None = None
    taylorseer_order: int | None = 0
    secondary: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacache_thresh", _threshold(self.teacache_thresh))
        if self.coefficients is not None and not isinstance(self.coefficients, TeaCacheCoefficients):
            values: Any = self.coefficients
            object.__setattr__(self, "coefficients", TeaCacheCoefficients(values))
        if self.use_ret_steps is not None and not isinstance(self.use_ret_steps, bool):
            raise ConfigTypeError(f"use_ret_steps={self.use_ret_steps!r}: allowed are True, False and None.")
        if self.variant is not None and not isinstance(self.variant, str):
            raise ConfigTypeError(f"variant is a {type(self.variant).__name__}; allowed: the name of a model, or None.")
        if self.variant is not None and self.coefficients is not None:
            raise ConfigError(f"variant={self.variant!r} and coefficients exclude each other: give one of them.")
        order = 0 if self.taylorseer_order is None else self.taylorseer_order
        object.__setattr__(self, "taylorseer_order", count("taylorseer_order", order, 0))
        self.window(bool(self.use_ret_steps))
        self._check_secondary()

    def _check_secondary(self) -> None:
        if self.secondary is None:
            return
        if not isinstance(self.secondary, Mapping):
            raise ConfigTypeError(
                f"secondary is a {type(self.secondary).__name__}; allowed: a dict of settings, or None."
            )
        for name in self.secondary:
            if name not in TEACACHE_KNOBS or name == "secondary":
                raise unknown_name("setting", str(name), set(TEACACHE_KNOBS) - {"secondary"}, "secondary")
        settings = dict(self.secondary)
        given = settings.get("coefficients")
        if given is not None and not isinstance(given, TeaCacheCoefficients):
            settings["coefficients"] = TeaCacheCoefficients(given)
        object.__setattr__(self, "secondary", FrozenSettings(settings))
        self.for_component("transformer_2")

    @property
    def fitted(self) -> TeaCacheCoefficients | None:
        """The coefficients that were given."""
        return self.coefficients if isinstance(self.coefficients, TeaCacheCoefficients) else None

    def window(self, use_ret_steps: bool) -> Window:
        """The steps that may be skipped."""
        end: Any = -1 if self.end_skipping is None else self.end_skipping
        if self.start_skipping is not None:
            return Window(self.start_skipping, end)
        if use_ret_steps and not isinstance(end, float) and end in range(RET_STEPS + 1):
            raise ConfigError(
                f"end_skipping={end} leaves no step to skip, since use_ret_steps=True computes the first {RET_STEPS} "
                "steps. Give start_skipping as well, or a later end_skipping."
            )
        return Window(RET_STEPS if use_ret_steps else 1, end)

    def for_component(self, name: str) -> TeaCacheConfig:
        """Returns the settings for one transformer of a pipeline: `secondary` applies to `"transformer_2"`."""
        if name != "transformer_2":
            return dataclasses.replace(self, secondary=None)
        changes = dict(self.secondary or {})
        for one, other in (("coefficients", "variant"), ("variant", "coefficients")):
            if changes.get(one) is not None:
                changes.setdefault(other, None)
        if self.fitted is not None and self.fitted.secondary is not None:
            changes.setdefault("coefficients", self.fitted.secondary)
        return dataclasses.replace(self, secondary=None, **changes)


TEACACHE_KNOBS = tuple(each.name for each in dataclasses.fields(TeaCacheConfig))
"""Names of all settings."""


def _checked_thresholds(given: Any) -> dict[float, float]:
    if not isinstance(given, Mapping):
        raise ConfigTypeError(
            f"thresholds is a {type(given).__name__}; allowed: a dict of speed-up to threshold, such as {{2.0: 0.1}}."
        )
    found = {_key(speedup): real("thresholds", threshold) for speedup, threshold in given.items()}
    for value in (*found, *found.values()):
        if not 0 < value < float("inf"):
            raise ConfigError(f"thresholds has {value}; allowed: positive numbers, such as {{2.0: 0.1}}.")
    return found


def _key(speedup: Any) -> float:
    """A speed-up as a number; JSON has made a string of it."""
    if isinstance(speedup, str) and re.fullmatch(r"\d+(\.\d+)?", speedup):
        return float(speedup)
    return real("thresholds", speedup)


def _speedup(wanted: str) -> float:
    match = _SPEEDUP.fullmatch(wanted)
    if match is None:
        raise ConfigError(
            f"teacache_thresh={wanted!r}; allowed: a positive number such as 0.1, or a speed-up such as '1.6x'."
        )
    return float(match[1])


def _threshold(value: Any) -> float | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        _speedup(value)
        return value
    if isinstance(value, TeaCacheConfig):
        raise ConfigTypeError("teacache_thresh is a TeaCacheConfig. Type: apply_teacache(pipe, config=...).")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigTypeError(
            f"teacache_thresh={value!r} is a {type(value).__name__}; allowed: a positive number, a speed-up such as "
            "'1.6x', or None."
        )
    if not 0 < real("teacache_thresh", value) < float("inf"):
        raise ConfigError(
            f"teacache_thresh={value!r}; allowed: a positive number such as 0.1 (smaller is closer to uncached, larger "
            "is faster), or a speed-up such as '1.6x'. To skip nothing, do not apply the patch."
        )
    return float(value)
