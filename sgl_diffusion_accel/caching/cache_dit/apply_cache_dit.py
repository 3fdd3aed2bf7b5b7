"""`apply_cache_dit`: the block cache, as one line."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from sgl_diffusion_accel.caching.blocks.cached_model import MakePolicy, Parts
from sgl_diffusion_accel.caching.blocks.layout import divide
from sgl_diffusion_accel.caching.cache_dit.cache_dit_config import CacheDiTConfig, CacheDiTSettings
from sgl_diffusion_accel.caching.cache_patch import CachePatch, put_on_blocks, targets_of_cache
from sgl_diffusion_accel.caching.parts.gap_control import GapControl, GapSettings
from sgl_diffusion_accel.caching.parts.gap_policy import GapPolicy, ResidualGrowth
from sgl_diffusion_accel.caching.parts.masks import StepsMask
from sgl_diffusion_accel.caching.parts.policies import MaskPolicy, Policy, ThresholdPolicy
from sgl_diffusion_accel.caching.parts.predictors import Predictor, taylor
from sgl_diffusion_accel.caching.parts.signals import HeadResidual
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.loop.scheduler_response import passing_influence
from sgl_diffusion_accel.targets import Pipe
from sgl_diffusion_accel.validate import names_checked, names_shown

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

_SETTLING = 3
"""At the highest noise residuals change otherwise than later, and the threshold may let the first gap reach as far as
the limit: a slope that is taken there leads astray. cache-dit takes the first one at the fourth step, too. Taken at
once it cost up to 9 dB with a warm-up of three steps (0.3 to 2.5 dB in the mean of 48 settings and captions on each of
three miniatures); with four and more it matters for the second order alone. For this library's own masks either start
wins as often, and gap control must compare predictions from the start: there nothing is left out."""


@names_shown(CacheDiTSettings, CacheDiTConfig)
@names_checked
def apply_cache_dit(
    pipe: Pipe, config: CacheDiTConfig | None = None, **settings: Unpack[CacheDiTSettings]
) -> CachePatch:
    """Caches the transformer blocks of a pipeline: DBCache, with Taylor prediction and step masks if wanted.

    At each denoising step the first `fn_compute_blocks` blocks run. If what they add has changed by less than
    `residual_diff_threshold` (relative L1, mean|r - r_last| / mean|r_last|) since the last computed step, the other
    blocks are skipped, but for the last `bn_compute_blocks`, and what they would have added is taken from the computed
    steps. The pipeline is used as before. Caching is lossy: the picture stays close to the unpatched one, not equal.

    With a `tolerance` nothing is compared from step to step: the error of the last predictions tells how long the next
    gap may be, as in `apply_adaptive_cache`, but nothing is put right afterwards. 0.008 is a good value with
    `taylorseer_order=2` and `fn_compute_blocks=0`; a tenth of it computes about twice as many steps.

    Args:
        pipe: A diffusers pipeline with a diffusion transformer (two for Wan2.2), or the transformer itself.
        config: Settings; None for the defaults, which are SGLang-Diffusion's.
        **settings: Single settings, by the names of `CacheDiTConfig`; they go over `config`.

    Returns:
        The patch: `patch.remove()` undoes it exactly, `patch.stats` tells what it did, `print(patch)` sums it up.

    Raises:
        ConfigError: A setting is unknown or not allowed, or leaves nothing to skip.
        ConfigTypeError: `pipe` or a setting has a wrong type.
        UnsupportedModelError: The pipeline has no transformer whose blocks could be cached.

    Source: DBCache and step masks as in cache-dit (https://github.com/vipshop/cache-dit) and SGLang-Diffusion;
    TaylorSeer, https://arxiv.org/abs/2503.06923.

    Example:
        >>> patch = apply_cache_dit(pipe, residual_diff_threshold=0.12, taylorseer_order=1)
        >>> video = pipe(**call)
        >>> patch.remove()
    """
    config = CacheDiTConfig.of(config, settings)
    targets = targets_of_cache(pipe)
    config.check_targets(targets)
    parts = {target.name: parts_of(target.module, config.for_component(target.name)) for target in targets}
    if not config.enabled:
        logger.warning("apply_cache_dit: the config says enabled=False; nothing is cached.")
        parts = {}
    return put_on_blocks(targets, _title(config), parts, config)


def parts_of(transformer: nn.Module, config: CacheDiTConfig) -> Parts:
    """What a config makes of a cache on one transformer."""
    policy, predictor = _policy(config), taylor(config.taylorseer_order)
    by_gaps = config.tolerance is not None
    return Parts(
        layout=divide(transformer, config.fn_compute_blocks, config.bn_compute_blocks),
        policy=_gap_control(config, policy, predictor) if by_gaps else policy,
        predictor=predictor,
        signal=HeadResidual() if policy.needs_signal and not by_gaps else None,
        spacing=config.taylorseer_spacing,
        settling=0 if by_gaps or _is_late(config) else _SETTLING,
    )


def _gap_control(config: CacheDiTConfig, limits: Policy, predictor: Predictor) -> MakePolicy:
    """What makes the policy of a run under a tolerance; the limits may forbid a skip as well."""
    tolerance = config.tolerance or 0.0
    # Nothing is put right: the whole error remains, and goes on to disturb the steps after the gap. The weight of that
    # was found by trying: at a compute ratio of 2.8, 3 was better than 1 on all three miniatures by 0.6 to 2.6 dB.
    settings = GapSettings(
        tolerance, warm_up=0, interpolation=1.0, disturbance=0.0, propagation=3.0, early=0.0, memory=0.8
    )

    def policy(run: Run, _: str) -> Policy:
        response = run.response() if tolerance > 0 else None
        final = np.ones(run.total) if response is None else response[-1]
        passing = None if response is None else passing_influence(response)
        times = run.sigmas() if config.taylorseer_spacing == "sigma" and tolerance > 0 else None
        growth = ResidualGrowth(predictor.depth - 1, times)
        return GapPolicy(GapControl(settings, final, corrects=False, growth=growth, passing=passing), limits)

    return policy


def _is_late(config: CacheDiTConfig) -> bool:
    """Whether the mask is one of this library's own."""
    return isinstance(config.steps_mask, StepsMask) and config.steps_mask.is_late


def _policy(config: CacheDiTConfig) -> Policy:
    """What decides; under a tolerance, the limits to it."""
    threshold = ThresholdPolicy(
        threshold=config.residual_diff_threshold if config.tolerance is None else math.inf,
        max_warmup_steps=config.max_warmup_steps,
        warmup_interval=config.warmup_interval,
        max_continuous=config.max_continuous_cached_steps,
        max_cached=config.max_cached_steps,
        max_accumulated=config.max_accumulated_residual_diff,
    )
    if not isinstance(config.steps_mask, StepsMask):
        return threshold
    return MaskPolicy(config.steps_mask, None if config.steps_policy == "static" else threshold)


def _title(config: CacheDiTConfig) -> str:
    if not config.enabled:
        return "Cache-DiT, switched off by its config"
    predictor = f"TaylorSeer order {config.taylorseer_order}" if config.taylorseer_order else "reuse"
    if config.taylorseer_order and config.taylorseer_spacing == "sigma":
        predictor += " in sigma"
    parts = [f"F{config.fn_compute_blocks}B{config.bn_compute_blocks}", predictor]
    if config.steps_policy == "dynamic":
        decides = ("threshold", config.residual_diff_threshold)
        if config.tolerance is not None:
            decides = ("gap control, tolerance", config.tolerance)
        parts += [f"{decides[0]} {decides[1]:g}", f"warm-up {config.max_warmup_steps}"]
    if config.steps_mask is not None:
        parts.append(f"{config.steps_policy} mask {config.steps_mask}")
    if config.secondary:
        parts.append("transformer_2: " + ", ".join(f"{key}={value}" for key, value in config.secondary.items()))
    return "Cache-DiT (" + ", ".join(parts) + ")"
