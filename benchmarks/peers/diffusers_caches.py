"""The caches that diffusers brings along: FirstBlockCache, MagCache, TaylorSeer and SeaCache."""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch

from benchmarks.calibrated import Of

_CALIBRATION_SEED = 900


def configs(model: str, steps: int, ratios: Callable[[], list[float]]) -> list[tuple[str, Any]]:
    """Names and configs of what the installed diffusers offers, for one miniature.

    Args:
        model: Name of the miniature.
        steps: Denoising steps of a run.
        ratios: Calibrates MagCache: `mag_ratios`.
    """
    found: list[tuple[str, Any]] = []
    if hasattr(diffusers, "FirstBlockCacheConfig"):
        found += [
            (f"FirstBlockCache, threshold {threshold:g}", diffusers.FirstBlockCacheConfig(threshold=threshold))
            for threshold in (0.05, 0.1, 0.15, 0.2)
        ]
    if hasattr(diffusers, "MagCacheConfig"):
        found += _mag_cache(steps, ratios())
    if hasattr(diffusers, "TaylorSeerCacheConfig"):
        found += [
            (f"TaylorSeer, every {interval} steps, order {order}" + late, _taylor_seer(interval, order, warm_up))
            for warm_up, late in ((3, ""), (8, ", after 8"), (12, ", after 12"))
            for interval in (2, 3, 4, 5)
            for order in (1, 2)
        ]
    # It needs the noise level of each step, which of the pipelines here Wan's alone tells it.
    if hasattr(diffusers, "SeaCacheConfig") and model == "wan":
        found += [
            (
                f"SeaCache, threshold {threshold:g}, order {order}, at most {skips}, after {warm_up}",
                diffusers.SeaCacheConfig(
                    threshold=threshold, residual_order=order, max_consecutive_cached=skips, retention_steps=warm_up
                ),
            )
            for threshold in (0.1, 0.25, 0.5)
            for order in (0, 1)
            for skips, warm_up in ((2, 1), (4, 8))
        ]
    return found


@contextlib.contextmanager
def apply(pipe: Any, config: Any) -> Iterator[None]:
    """Enables one of diffusers' caches on the pipeline's transformer."""
    pipe.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def _taylor_seer(interval: int, order: int, warm_up: int) -> Any:
    # Factors in the model's own precision, so that what is compared is the method and not its rounding to bfloat16.
    # The lite mode predicts the output of the whole transformer; the other mode skips attention alone.
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        disable_cache_before_step=warm_up,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )


def _mag_cache(steps: int, ratios: list[float]) -> list[tuple[str, Any]]:
    return [
        (
            f"MagCache, threshold {threshold:g}, at most {skips}",
            diffusers.MagCacheConfig(
                threshold=threshold, max_skip_steps=skips, num_inference_steps=steps, mag_ratios=list(ratios)
            ),
        )
        for threshold, skips in ((0.06, 2), (0.06, 3), (0.12, 3), (0.24, 5))
    ]


def mag_ratios(of: Of) -> list[float]:
    """Calibrates MagCache as its documentation says: one run in calibration mode, which prints the ratios."""
    pipe, printed = of.load(), io.StringIO()
    config = diffusers.MagCacheConfig(calibrate=True, num_inference_steps=of.steps)
    with apply(pipe, config), contextlib.redirect_stdout(printed), torch.no_grad():
        pipe(**of.call(_CALIBRATION_SEED, _CALIBRATION_SEED))
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    ratios: list[float] = ast.literal_eval(lines[0])
    return ratios
