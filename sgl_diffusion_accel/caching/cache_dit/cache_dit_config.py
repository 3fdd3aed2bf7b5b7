"""Settings of `apply_cache_dit`."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict

from sgl_diffusion_accel.caching.cache_config import SECOND, CacheConfig
from sgl_diffusion_accel.caching.parts.masks import StepsMask
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.validate import choice, count, flag, within

_ACROSS = "a mask counts the pipeline's denoising steps across both transformers. Give {} beside secondary."


@dataclass(frozen=True)
class CacheDiTConfig(CacheConfig):
    """Settings of the block cache: DBCache, TaylorSeer prediction and step computation masks.

    The defaults are SGLang-Diffusion's. A config is checked when it is made and never changed.

    Attributes:
        fn_compute_blocks: First blocks that are computed at every step; what they add is the signal. 0 only with a
            tolerance or a static mask, which need no signal.
        bn_compute_blocks: Last blocks that are computed at every step; they correct the prediction.
        max_warmup_steps: Steps at the start that are computed in full.
        warmup_interval: Compute every n-th step of the warm-up; the others may be skipped.
        residual_diff_threshold: Skip while the relative L1 change of the signal since the last computed step stays
            below. 0 never skips.
        max_continuous_cached_steps: Longest run of skipped steps; None or -1 for no limit.
        max_cached_steps: Most skipped steps in a run; None or -1 for no limit.
        max_accumulated_residual_diff: Compute when the changes since the last computed step sum up to it; None for no
            limit.
        taylorseer_order: Order of the Taylor prediction of what the skipped blocks add; 0 reuses the last computed.
        taylorseer_spacing: What the prediction counts in: `"step"`, or `"sigma"` for the scheduler's noise levels.
        steps_mask: Which denoising steps are computed: `"slow"`, `"medium"`, `"fast"`, `"ultra"`, a list of 0 and 1, or
            a `StepsMask`. None for no mask.
        steps_policy: `"dynamic"`: a 0 in the mask allows a skip, and warm-up, limits and threshold decide. `"static"`:
            a 0 is a skip, and the mask alone decides.
        secondary: Settings of `transformer_2` that differ, by the same names; None for none.
        enabled: False makes `apply_cache_dit` change nothing (for SGLANG_CACHE_DIT_ENABLED=false).
        tolerance: Gap control instead of the threshold, and without a signal: skip while the error that a gap leaves in
            the final latents stays below, as estimated from the errors of the last predictions, relative to how far
            the latents move in the run; 0 never skips. Warm-up, limits and a dynamic mask hold as well. None leaves
            it to the threshold.

    Raises:
        ConfigError: A value is not allowed.
        ConfigTypeError: A value has the wrong type.
    """

    fn_compute_blocks: int = 1
    bn_compute_blocks: int = 0
    max_warmup_steps: int = 4
    warmup_interval: int = 1
    residual_diff_threshold: float = 0.24
    max_continuous_cached_steps: int | None = 3
    max_cached_steps: int | None = None
    max_accumulated_residual_diff: float | None = None
    taylorseer_order: int = 0
    taylorseer_spacing: Literal["step", "sigma"] = "step"
    steps_mask: str | Sequence[int] | StepsMask | None = None
    steps_policy: Literal["dynamic", "static"] = "dynamic"
    secondary: Mapping[str, Any] | None = None
    enabled: bool = True
    tolerance: float | None = None

    function: ClassVar[tuple[str, str]] = (
        "apply_cache_dit",
        "apply_cache_dit(pipe, residual_diff_threshold=0.12)",
    )
    aliases: ClassVar[Mapping[str, str]] = {
        "Fn_compute_blocks": "fn_compute_blocks",
        "Bn_compute_blocks": "bn_compute_blocks",
        "max_accumulated_residual_diff_threshold": "max_accumulated_residual_diff",
        "steps_computation_mask": "steps_mask",
        "steps_computation_policy": "steps_policy",
        "threshold": "residual_diff_threshold",
    }
    only_first: ClassVar[Mapping[str, str]] = {
        "enabled": "",
        "steps_mask": _ACROSS.format("steps_mask"),
        "steps_policy": _ACROSS.format("steps_policy"),
    }

    def __post_init__(self) -> None:
        self._check_numbers()
        choice("taylorseer_spacing", self.taylorseer_spacing, ("step", "sigma"))
        choice("steps_policy", self.steps_policy, ("dynamic", "static"))
        flag("enabled", self.enabled)
        if self.steps_mask is not None:
            object.__setattr__(self, "steps_mask", StepsMask.of(self.steps_mask))
        if self.steps_policy == "static" and self.steps_mask is None:
            raise ConfigError(
                "steps_policy='static' needs a steps_mask. Type: steps_mask='medium', or a list of 0 and 1."
            )
        self._check_tolerance()
        self._check_signal()
        object.__setattr__(self, "secondary", self._checked_secondary(self.secondary))
        if self.secondary:
            self.for_component(SECOND)

    def _check_numbers(self) -> None:
        for name, lowest in _COUNTS.items():
            object.__setattr__(self, name, count(name, getattr(self, name), lowest))
        for name in _LIMITS:
            limit = getattr(self, name)
            unlimited = limit is None or (isinstance(limit, numbers.Integral) and limit == -1)  # -1: the peers' word
            object.__setattr__(self, name, None if unlimited else count(name, limit, 0))
        for name in ("residual_diff_threshold", "max_accumulated_residual_diff"):
            if name == "residual_diff_threshold" or getattr(self, name) is not None:
                object.__setattr__(self, name, within(name, getattr(self, name), _THRESHOLDS))

    def _check_tolerance(self) -> None:
        if self.tolerance is None:
            return
        value = within("tolerance", self.tolerance, _TOLERANCES, highest=1.0)
        object.__setattr__(self, "tolerance", value)
        if self.steps_policy == "static":
            raise ConfigError(
                f"tolerance={value:g} has nothing to decide under steps_policy='static', where the mask alone decides. "
                "Type: steps_policy='dynamic', or leave tolerance out."
            )
        if self.max_accumulated_residual_diff is not None:
            raise ConfigError(
                f"max_accumulated_residual_diff={self.max_accumulated_residual_diff:g} sums up the changes of a "
                f"signal, and with tolerance={value:g} none is taken. Leave one of them out."
            )

    def _check_signal(self) -> None:
        is_free = self.steps_policy == "static" or self.tolerance is not None or self.residual_diff_threshold == 0
        if self.fn_compute_blocks == 0 and not is_free:
            raise ConfigError(
                "fn_compute_blocks=0 leaves no block to take the signal from. Type: fn_compute_blocks=1, or give a "
                "tolerance, or a steps_mask with steps_policy='static'."
            )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> CacheDiTConfig:
        """Reads SGLang-Diffusion's environment variables, `SGLANG_CACHE_DIT_*`.

        What is not set keeps its default. `SGLANG_CACHE_DIT_ENABLED=false` gives a config with which nothing is
        changed; where it is not set, calling this function is taken as the wish to have the cache.

        Args:
            environ: Variables to read instead of the process's own.

        Raises:
            ConfigError: Unknown `SGLANG_CACHE_DIT_*` name, a value that cannot be read, or one of the two bins alone.
        """
        from sgl_diffusion_accel.caching.cache_dit.config_sources import knobs_from_env

        return cls(**knobs_from_env(environ))

    @classmethod
    def from_file(cls, path: str) -> CacheDiTConfig:
        """Reads the YAML or JSON that SGLang-Diffusion and cache-dit read (`cache_config:` with their names).

        Args:
            path: A `.yaml`, `.yml` or `.json` file.

        Raises:
            ConfigError: Unknown key, with the nearest known one; or a value that is not allowed.
            MissingPackageError: A YAML file, and PyYAML is not installed.
        """
        from sgl_diffusion_accel.caching.cache_dit.config_sources import knobs_from_file

        return cls(**knobs_from_file(path))


class CacheDiTSettings(TypedDict, total=False):
    """The settings of `CacheDiTConfig`, as they are given by name: its own or those of cache-dit."""

    fn_compute_blocks: int
    bn_compute_blocks: int
    max_warmup_steps: int
    warmup_interval: int
    residual_diff_threshold: float
    max_continuous_cached_steps: int | None
    max_cached_steps: int | None
    max_accumulated_residual_diff: float | None
    taylorseer_order: int
    taylorseer_spacing: Literal["step", "sigma"]
    steps_mask: str | Sequence[int] | StepsMask | None
    steps_policy: Literal["dynamic", "static"]
    secondary: Mapping[str, Any] | None
    enabled: bool
    tolerance: float | None
    Fn_compute_blocks: int
    Bn_compute_blocks: int
    max_accumulated_residual_diff_threshold: float | None
    steps_computation_mask: str | Sequence[int] | StepsMask | None
    steps_computation_policy: Literal["dynamic", "static"]
    threshold: float


_COUNTS = {
    "fn_compute_blocks": 0,
    "bn_compute_blocks": 0,
    "max_warmup_steps": 0,
    "warmup_interval": 1,
    "taylorseer_order": 0,
}
_LIMITS = ("max_continuous_cached_steps", "max_cached_steps")
_THRESHOLDS = "a finite number from 0 (never skips), such as 0.24"
_TOLERANCES = "a number from 0 (computes every step) to 1, such as 0.002, or None"
