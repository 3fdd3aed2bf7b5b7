"""cache-dit, with the same settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from benchmarks.settings import Setting


def installed() -> bool:
    """Whether cache-dit can be measured here."""
    return find_spec("cache_dit") is not None


def has(setting: Setting) -> bool:
    """Whether the release that is installed can do that."""
    import cache_dit

    return setting.calibrator is None or hasattr(cache_dit, f"{setting.calibrator}CalibratorConfig")


@contextmanager
def apply(pipe: Any, setting: Setting, steps: int) -> Iterator[None]:
    """Enables cache-dit on a pipeline that is thrown away afterwards.

    It replaces `__call__` on the pipeline's class. A subclass of the same name, made for this one pipeline, keeps that
    from every other run.
    """
    import cache_dit

    original = type(pipe)
    pipe.__class__ = type(original.__name__, (original,), {})
    mask = None
    if setting.preset:
        mask = cache_dit.steps_mask(total_steps=steps, mask_policy=setting.preset)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=setting.fn,
        Bn_compute_blocks=setting.bn,
        max_warmup_steps=setting.warmup,
        residual_diff_threshold=setting.threshold,
        max_continuous_cached_steps=-1 if setting.continuous is None else setting.continuous,
        num_inference_steps=steps,
        steps_computation_mask=mask,
        steps_computation_policy=setting.policy,
    )
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=_calibrator(setting))
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)
        pipe.__class__ = original


def _calibrator(setting: Setting) -> Any:
    """cache-dit's config of what predicts the residual, None where the last one is used again."""
    import cache_dit

    if setting.calibrator:
        return getattr(cache_dit, f"{setting.calibrator}CalibratorConfig")()
    return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=setting.order) if setting.order else None
