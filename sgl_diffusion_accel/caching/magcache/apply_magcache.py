"""`apply_magcache`: the cache that goes by magnitudes, as one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sgl_diffusion_accel.caching.blocks.cached_model import Parts
from sgl_diffusion_accel.caching.blocks.layout import divide
from sgl_diffusion_accel.caching.cache_patch import CachePatch, put_on_blocks, targets_of_cache
from sgl_diffusion_accel.caching.magcache.magcache_config import MagCacheConfig, MagCacheSettings
from sgl_diffusion_accel.caching.magcache.magnitude_policy import MagnitudePolicy
from sgl_diffusion_accel.caching.magcache.magnitudes import MagnitudeRatios
from sgl_diffusion_accel.caching.parts.predictors import taylor
from sgl_diffusion_accel.targets import Pipe, Target
from sgl_diffusion_accel.validate import names_checked, names_shown

if TYPE_CHECKING:
    from typing_extensions import Unpack


@names_shown(MagCacheSettings, MagCacheConfig)
@names_checked
def apply_magcache(
    pipe: Pipe,
    config: MagCacheConfig | MagnitudeRatios | Sequence[float] | None = None,
    **settings: Unpack[MagCacheSettings],
) -> CachePatch:
    """Caches whole denoising steps of a pipeline: MagCache, for each branch and each expert on its own.

    How much larger or smaller what all blocks add is at each step than at the step before, γ, hardly depends on the
    prompt. So it is known beforehand how far the magnitude of a residual that is reused is off: at step s by
    |1 - γ_c+1 · … · γ_s|, with c the last computed step. As long as these errors sum up to less than `threshold`, all
    transformer blocks are skipped and what they added at the last computed step is added again (refiners and other
    lists beside the stack run as always). Nothing is measured, so that the device is never waited for, and the steps of
    a run are the same whatever the prompt. The first and the last step are always computed.

    Args:
        pipe: A diffusers pipeline with a diffusion transformer (two for Wan2.2), or the transformer itself.
        config: Settings, or the magnitude ratios alone: `plan.magnitude_ratios` of a plan by `calibrate`, or one number
            for each denoising step.
        **settings: Single settings, by the names of `MagCacheConfig`; they go over `config`.

    Returns:
        The patch: `patch.remove()` undoes it exactly, `patch.stats` tells what it did, `print(patch)` sums it up.

    Raises:
        ConfigError: A setting is not allowed, or the ratios are not those of this pipeline's transformers.
        ConfigTypeError: `pipe` or a setting has a wrong type.
        UnsupportedModelError: The pipeline has no transformer whose blocks could be cached.

    Source: MagCache, https://arxiv.org/abs/2506.09045; names and defaults as in diffusers.

    Example:
        >>> plan = calibrate(pipe, calls=[call])
        >>> patch = apply_magcache(pipe, plan.magnitude_ratios, threshold=0.12, taylorseer_order=1)
        >>> patch.remove()
    """
    config = MagCacheConfig.of(config, settings)
    targets = targets_of_cache(pipe)
    ratios = config.ratios(targets.names)
    parts = {target.name: _parts(target, config, ratios) for target in targets}
    return put_on_blocks(targets, _title(config, ratios), parts, config)


def _title(config: MagCacheConfig, ratios: MagnitudeRatios) -> str:
    order = config.taylorseer_order
    return (
        f"MagCache (ratios of {ratios.steps} steps, threshold {config.threshold:g}, at most {config.max_skip_steps} "
        f"steps in a row, retention {config.retention_ratio:.0%}, "
        + (f"TaylorSeer order {order})" if order else "reuse)")
    )


def _parts(target: Target, config: MagCacheConfig, ratios: MagnitudeRatios) -> Parts:
    def policy(branch: str) -> MagnitudePolicy:
        known = ratios.of(target.name, branch)
        return MagnitudePolicy(known, config.threshold, config.max_skip_steps, config.retention_ratio)

    policy("")  # refuses ratios of other transformers at once, and not in the first run
    return Parts(
        # No head: nothing is measured, so that no first block has to run.
        layout=divide(target.module, 0, 0),
        policy=lambda _, branch: policy(branch),
        predictor=taylor(config.taylorseer_order),
    )
