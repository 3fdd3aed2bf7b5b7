"""Settings of `apply_teacache`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

from sgl_diffusion_accel.caching.cache_config import SECOND, CacheConfig
from sgl_diffusion_accel.caching.teacache.coefficients import TeaCacheCoefficients, speedup_of
from sgl_diffusion_accel.caching.teacache.skip_window import Window
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.validate import count, flag, of_type, positive

RET_STEPS = 5
"""Steps at the start that are computed with `use_ret_steps=True`."""


@dataclass(frozen=True)
class TeaCacheConfig(CacheConfig):
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

    aliases: ClassVar[Mapping[str, str]] = {"rel_l1_thresh": "teacache_thresh", "threshold": "teacache_thresh"}
    main: ClassVar[str] = "teacache_thresh"
    function: ClassVar[tuple[str, str]] = ("apply_teacache", "apply_teacache(pipe, teacache_thresh=0.1)")

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacache_thresh", _threshold(self.teacache_thresh))
        object.__setattr__(self, "coefficients", _coefficients(self.coefficients))
        flag("use_ret_steps", self.use_ret_steps, or_none=True)
        if self.variant is not None:
            of_type("variant", self.variant, str, "the name of a model, or None")
        if self.variant is not None and self.coefficients is not None:
            raise ConfigError(f"variant={self.variant!r} and coefficients exclude each other: give one of them.")
        order = 0 if self.taylorseer_order is None else self.taylorseer_order
        object.__setattr__(self, "taylorseer_order", count("taylorseer_order", order, 0))
        self.window(bool(self.use_ret_steps))
        secondary = self._checked_secondary(self.secondary)
        if secondary is not None and "coefficients" in secondary:
            checked = _coefficients(secondary["coefficients"])
            secondary = type(secondary)({**secondary, "coefficients": checked})
        object.__setattr__(self, "secondary", secondary)
        if secondary is not None:
            self.for_component(SECOND)

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

    def changed(self, **settings: Any) -> TeaCacheConfig:
        """The same with other values of some settings; of coefficients and variant the one takes the other's place."""
        for one, other in (("coefficients", "variant"), ("variant", "coefficients")):
            if settings.get(one) is not None:
                settings.setdefault(other, None)
        return super().changed(**settings)

    def for_component(self, name: str) -> TeaCacheConfig:
        """See `CacheConfig.for_component`. Coefficients may hold those of the second transformer themselves."""
        found = super().for_component(name)
        own = self.secondary is not None and self.secondary.get("coefficients", self.secondary.get("variant"))
        if name == SECOND and not own and self.fitted is not None and self.fitted.secondary is not None:
            return found.changed(coefficients=self.fitted.secondary)
        return found


class TeaCacheSettings(TypedDict, total=False):
    """The settings of `TeaCacheConfig`, as they are given by name: its own or those of TeaCache."""

    teacache_thresh: float | str | None
    coefficients: Sequence[float] | TeaCacheCoefficients | None
    start_skipping: int | float | None
    end_skipping: int | float | None
    use_ret_steps: bool | None
    variant: str | None
    taylorseer_order: int | None
    secondary: Mapping[str, Any] | None
    rel_l1_thresh: float | str | None
    threshold: float | str | None


def _coefficients(given: Any) -> TeaCacheCoefficients | None:
    return given if given is None or isinstance(given, TeaCacheCoefficients) else TeaCacheCoefficients(given)


def _threshold(value: Any) -> float | str | None:
    if isinstance(value, str):
        speedup_of(value)
    if value is None or isinstance(value, str):
        return value
    allowed = (
        "a positive number such as 0.1 (smaller is closer to uncached, larger is faster), or a speed-up such as "
        "'1.6x'. To skip nothing, do not apply the patch"
    )
    return positive("teacache_thresh", value, allowed)
