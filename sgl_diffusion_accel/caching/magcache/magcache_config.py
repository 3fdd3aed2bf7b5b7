"""Settings of `apply_magcache`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

from sgl_diffusion_accel.caching.cache_config import CacheConfig
from sgl_diffusion_accel.caching.magcache.magnitudes import MagnitudeRatios
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError
from sgl_diffusion_accel.validate import count, within


@dataclass(frozen=True)
class MagCacheConfig(CacheConfig):
    """Settings of MagCache. The defaults are those of diffusers.

    A config is checked when it is made and never changed.

    Attributes:
        magnitude_ratios: `plan.magnitude_ratios` of a plan by `calibrate`; or one number for each denoising step, the
            same for all branches, such as the `mag_ratios` of diffusers (the first one is not used). For runs with
            another number of steps those of the nearest steps are taken.
        threshold: Compute a step when the errors since the last computed step sum up to it; larger is faster and less
            faithful, 0 never skips.
        max_skip_steps: Longest run of skipped steps.
        retention_ratio: Share of the steps, at the start, that are computed.
        taylorseer_order: Order of a Taylor prediction of what the blocks add, 0 reuses the last computed.

    Raises:
        ConfigError: A value is not allowed, or there are no ratios.
        ConfigTypeError: A value has the wrong type.
    """

    magnitude_ratios: MagnitudeRatios | Sequence[float] | None = None
    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    taylorseer_order: int = 0

    aliases: ClassVar[Mapping[str, str]] = {"mag_ratios": "magnitude_ratios"}
    main: ClassVar[str] = "magnitude_ratios"
    function: ClassVar[tuple[str, str]] = ("apply_magcache", "apply_magcache(pipe, plan.magnitude_ratios)")

    def __post_init__(self) -> None:
        object.__setattr__(self, "magnitude_ratios", _ratios(self.magnitude_ratios))
        object.__setattr__(self, "threshold", within("threshold", self.threshold, _THRESHOLDS))
        object.__setattr__(self, "max_skip_steps", count("max_skip_steps", self.max_skip_steps, 0))
        object.__setattr__(self, "retention_ratio", within("retention_ratio", self.retention_ratio, _SHARES, highest=1))
        object.__setattr__(self, "taylorseer_order", count("taylorseer_order", self.taylorseer_order, 0))

    def ratios(self, components: Sequence[str]) -> MagnitudeRatios:
        """The ratios by component and branch: a plain list is for all."""
        given: Any = self.magnitude_ratios
        if isinstance(given, MagnitudeRatios):
            return given
        # No branch has this name: each takes the mean of those that are known, and this is the only one.
        return MagnitudeRatios({name: {"all": [None, *given[1:]]} for name in components})


class MagCacheSettings(TypedDict, total=False):
    """The settings of `MagCacheConfig`, as they are given by name: its own or those of diffusers."""

    magnitude_ratios: MagnitudeRatios | Sequence[float] | None
    threshold: float
    max_skip_steps: int
    retention_ratio: float
    taylorseer_order: int
    mag_ratios: MagnitudeRatios | Sequence[float] | None


_THRESHOLDS = "a finite number from 0 (0 never skips)"
_SHARES = "a finite number from 0 to 1 (a share of the steps, such as 0.2)"


def _ratios(given: Any) -> MagnitudeRatios | tuple[float, ...]:
    """What the user has given, as ratios or plain numbers."""
    if isinstance(given, MagnitudeRatios):
        return given
    values = given.tolist() if callable(getattr(given, "tolist", None)) else given  # diffusers' are a tensor
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ConfigTypeError(
            f"magnitude_ratios is a {type(given).__name__}; allowed: plan.magnitude_ratios of a plan by "
            "calibrate(pipe, calls), or a list with a number for each denoising step."
        )
    if len(values) < 2:
        raise ConfigError(
            f"magnitude_ratios has {len(values)} numbers; allowed: one for each denoising step, two or more."
        )
    MagnitudeRatios({"transformer": {"all": [None, *values[1:]]}})  # refuses what is no ratio
    return tuple(values)
