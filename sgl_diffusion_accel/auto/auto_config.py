"""The settings of `apply_auto`."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_diffusion_accel.calibration.plan import CachePlan
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.validate import choice, of_type, text, within

TOLERANCES: dict[str, float] = {"lossless": 0.0, "high": 0.0003, "balanced": 0.001, "fast": 0.003}
"""Quality to the tolerance of the adaptive cache; 0 for no cache."""

_ALONE = "lossless"
_EXAMPLE = "apply_auto(pipe, speedup=2.5, plan=plan)"


@dataclass(frozen=True)
class AutoConfig:
    """Settings of `apply_auto`.

    Attributes:
        quality: `"lossless"`, `"high"`, `"balanced"` or `"fast"`: no cache, or the adaptive one with a tolerance of
            0.0003, 0.001 or 0.003.
        speedup: With a plan: steps of a run for each computed one.
        plan: Of `calibrate`, in the place of the adaptive cache.

    Raises:
        ConfigError: A quality that is not known, a plan without a speed-up or the reverse, or with `"lossless"`.
        ConfigTypeError: Something has a wrong type.
    """

    quality: str = "balanced"
    speedup: float | None = None
    plan: CachePlan | None = None

    def __post_init__(self) -> None:
        allowed = ", ".join(map(repr, TOLERANCES))
        choice("quality", text("quality", self.quality, allowed), tuple(TOLERANCES))
        if self.plan is not None:
            of_type("plan", self.plan, CachePlan, "a CachePlan: calibrate(pipe, calls), or CachePlan.load(path)")
        if self.speedup is not None:
            allowed = "a number from 1, such as 2.5"
            object.__setattr__(self, "speedup", within("speedup", self.speedup, allowed, lowest=1.0))
        if self.speedup is not None and self.plan is None:
            raise ConfigError(
                f"speedup={self.speedup:g} without a plan: how fast a run may be is known of a calibrated model. Type: "
                f"plan = calibrate(pipe, calls), then {_EXAMPLE}; or leave speedup out, and take quality='fast'."
            )
        if self.plan is not None and self.speedup is None:
            raise ConfigError(f"a plan without a speedup: it has to be told how much to compute. Type: {_EXAMPLE}")
        if self.plan is not None and self.quality == _ALONE:
            raise ConfigError(
                f"quality={_ALONE!r} computes every step, and a plan leaves some out. Leave one of them out: {_EXAMPLE}"
            )

    @property
    def tolerance(self) -> float:
        """Of the adaptive cache, in runs of 50 steps; 0 for none."""
        return TOLERANCES[self.quality]

    @property
    def has_cache(self) -> bool:
        """Whether denoising steps may be skipped."""
        return self.tolerance > 0

    @property
    def cache(self) -> str:
        """What skips denoising steps, in a few words."""
        if self.plan is not None:
            return f"cache plan (speedup={self.speedup:g})"
        return f"adaptive cache (tolerance {self.tolerance:g})"
