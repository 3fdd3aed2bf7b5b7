"""`apply_cache_dit`: the block cache, as one line."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

from torch import nn

from sgl_diffusion_accel.caching.blocks.cached_model import Parts
from sgl_diffusion_accel.caching.blocks.layout import divide
from sgl_diffusion_accel.caching.cache_dit.cache_dit_config import KNOBS, CacheDiTConfig
from sgl_diffusion_accel.caching.cache_patch import CachePatch, apply_cache, refuse_foreign_cache
from sgl_diffusion_accel.caching.parts.gap_policy import gap_control
from sgl_diffusion_accel.caching.parts.masks import StepsMask
from sgl_diffusion_accel.caching.parts.policies import MaskPolicy, Policy, ThresholdPolicy
from sgl_diffusion_accel.caching.parts.predictors import Reuse, Taylor
from sgl_diffusion_accel.caching.parts.signals import HeadResidual
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, unknown_name
from sgl_diffusion_accel.targets import find_transformers, unwrap

logger = logging.getLogger(__name__)

_SETTLING = 3
"""At the highest noise residuals change otherwise than later, and the threshold may let the first gap reach as far as
the limit: a slope that is taken there leads astray. cache-dit takes the first one at the fourth step, too. Taken at
once it cost up to 9 dB with a warm-up of three steps (0.3 to 2.5 dB in the mean of 48 settings and captions on each of
three miniatures); with four and more it matters for the second order alone. For this library's own masks either start
wins as often, and gap control must compare predictions from the start: there nothing is left out."""


def apply_cache_dit(pipe: object, config: CacheDiTConfig | None = None, **knobs: Any) -> CachePatch:
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
        **knobs: Single settings, by the names of `CacheDiTConfig`; they go over `config`.

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
    config = _merge(config, knobs)
    transformers = find_transformers(pipe)
    refuse_foreign_cache(transformers)
    if config.secondary and "transformer_2" not in transformers:
        raise ConfigError(
            f"secondary={dict(config.secondary)!r} is for transformer_2, and {type(pipe).__name__} has none. "
            "Leave secondary out."
        )
    parts = {
        name: parts_of(unwrap(transformer), config.for_component(name)) for name, transformer in transformers.items()
    }
    if not config.enabled:
        logger.warning("apply_cache_dit: the config says enabled=False; nothing is cached.")
        parts = {}
    return apply_cache(_title(config), transformers, parts, pipe)


def _merge(config: CacheDiTConfig | None, knobs: dict[str, Any]) -> CacheDiTConfig:
    for name in knobs:
        if name not in KNOBS:
            raise unknown_name("knob", name, KNOBS, "apply_cache_dit")
    if config is None:
        return CacheDiTConfig(**knobs)
    if not isinstance(config, CacheDiTConfig):
        raise ConfigTypeError(
            f"the second argument is a {type(config).__name__}; allowed: a CacheDiTConfig. Single settings go by name: "
            "apply_cache_dit(pipe, residual_diff_threshold=0.12)."
        )
    return dataclasses.replace(config, **knobs)


def parts_of(transformer: nn.Module, config: CacheDiTConfig) -> Parts:
    """What a config makes of a cache on one transformer."""
    policy, by_run = _policy(config), None
    predictor = Taylor(config.taylorseer_order) if config.taylorseer_order else Reuse()
    if config.tolerance is not None:
        by_run = gap_control(config.tolerance, policy, predictor, config.taylorseer_spacing)
    return Parts(
        layout=divide(transformer, config.fn_compute_blocks, config.bn_compute_blocks),
        policy=policy,
        predictor=predictor,
        signal=HeadResidual() if policy.needs_signal and by_run is None else None,
        spacing=config.taylorseer_spacing,
        by_run=by_run,
        settling=_SETTLING if by_run is None and not _is_late(config) else 0,
    )


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
