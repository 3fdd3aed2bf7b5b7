"""`apply_teacache`: the timestep cache, as one line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn

from sgl_diffusion_accel.caching.blocks.cached_model import Parts
from sgl_diffusion_accel.caching.blocks.layout import divide
from sgl_diffusion_accel.caching.cache_patch import CachePatch, put_on_blocks, targets_of_cache
from sgl_diffusion_accel.caching.parts.policies import Policy
from sgl_diffusion_accel.caching.parts.predictors import taylor
from sgl_diffusion_accel.caching.teacache.accumulating_policy import AccumulatingPolicy
from sgl_diffusion_accel.caching.teacache.coefficients import TeaCacheCoefficients
from sgl_diffusion_accel.caching.teacache.teacache_config import TeaCacheConfig, TeaCacheSettings
from sgl_diffusion_accel.caching.teacache.teacache_models import VARIANTS, Family, family_of, nearest_size
from sgl_diffusion_accel.caching.teacache.teacache_signals import check_signal, uses_ret_steps
from sgl_diffusion_accel.errors import ConfigError, unknown_name
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.targets import Pipe, Target, model_class
from sgl_diffusion_accel.validate import names_checked, names_shown

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)


@names_shown(TeaCacheSettings, TeaCacheConfig)
@names_checked
def apply_teacache(
    pipe: Pipe, config: TeaCacheConfig | float | str | None = None, **settings: Unpack[TeaCacheSettings]
) -> CachePatch:
    """Caches whole denoising steps of a pipeline: TeaCache, for each branch and each expert on its own.

    At each step the relative L1 change of a signal from the step before, x = mean|s - s_prev| / mean|s_prev|, is turned
    by a polynomial into an estimate of how much the model's output changes, max(p(x), 0). As long as the estimates
    since the last computed step sum up to less than `teacache_thresh`, all transformer blocks are skipped and what they
    added at the last computed step is added again (refiners and other lists beside the stack run as always). The signal
    is the time embedding (Wan, CogVideoX, ConsisID, HiDream), known for the whole run beforehand so that the device is
    never waited for, or the modulated input of the first block (all others), which costs one synchronisation for each
    decision.

    Args:
        pipe: A diffusers pipeline with a diffusion transformer (two for Wan2.2), or the transformer itself.
        config: Settings, or the threshold alone: a number, or a speed-up such as `"1.6x"` for the one that is known for
            the nearest. None for the model's own.
        **settings: Single settings, by the names of `TeaCacheConfig`; they go over `config`. None is the model's own.

    Returns:
        The patch: `patch.remove()` undoes it exactly, `patch.stats` tells what it did, `print(patch)` sums it up.

    Raises:
        ConfigError: A setting is unknown or not allowed, or no coefficients are known for the model.
        ConfigTypeError: `pipe` or a setting has a wrong type.
        UnsupportedModelError: The pipeline has no transformer whose blocks could be cached.

    Source: TeaCache, https://arxiv.org/abs/2411.19108; names and window as in SGLang-Diffusion.

    Example:
        >>> patch = apply_teacache(pipe, "1.6x")
        >>> video = pipe(**call)
        >>> patch.remove()
    """
    config = TeaCacheConfig.of(config, settings)
    targets = targets_of_cache(pipe)
    config.check_targets(targets)
    planned = {target.name: parts_and_title(target, config.for_component(target.name)) for target in targets}
    for name, (_, said) in planned.items():
        logger.info("TeaCache on %s: %s", name, said)
    words = {said for _, said in planned.values()}
    title = words.pop() if len(words) == 1 else "; ".join(f"{name}: {said}" for name, (_, said) in planned.items())
    parts = {name: found for name, (found, _) in planned.items()}
    return put_on_blocks(targets, f"TeaCache ({title})", parts, config)


def parts_and_title(target: Target, config: TeaCacheConfig) -> tuple[Parts, str]:
    """The parts of the cache on one transformer, and a line on what was chosen.

    Raises:
        ConfigError: A setting is not allowed, or no coefficients are known for the model.
        UnsupportedModelError: Its blocks cannot be cached, or have no signal.
    """
    transformer = target.module
    family = family_of(transformer)
    retains = uses_ret_steps(transformer, _ret_steps(config))
    window = config.window(retains)
    fits = _thresholds(_fits(transformer, family, config, retains), config)
    policies = [AccumulatingPolicy(threshold, fit, window) for fit, threshold, _ in fits.values()]
    words = [f"{name}, threshold {threshold:g}{source}" for name, (_, threshold, source) in fits.items()]
    sizes = [VARIANTS[name].pixels for name in _names(transformer, family, config)]

    told: set[int] = set()

    def by_resolution(run: Run, _: str) -> Policy:
        index = 0 if run.latents is None else nearest_size(sizes, run.latents)
        chosen = f"by the resolution: {words[index]}"
        if run.stats is not None:
            run.stats.remark(target.name, chosen)
        if index not in told:
            told.add(index)
            logger.info("%s: %s", target.name, chosen)
        return policies[index]

    signal = family.signal_for(retains)
    check_signal(transformer, signal)
    order = config.taylorseer_order or 0
    parts = Parts(
        layout=divide(transformer, 0, 0),
        policy=by_resolution if len(policies) > 1 else policies[0],
        predictor=taylor(order),
        signal=signal,
    )
    described = f"projected {signal.name} (use_ret_steps)" if retains else signal.name
    predictor = f"TaylorSeer order {order}" if order else "reuse"
    return parts, ", ".join([" or ".join(words), described, str(window), predictor])


def _thresholds(
    fits: dict[str, TeaCacheCoefficients], config: TeaCacheConfig
) -> dict[str, tuple[TeaCacheCoefficients, float, str]]:
    """Adds the threshold to each fit. Of several, among which the run decides, one has to know the speed-up wanted."""
    found = {name: _threshold(fit, config) for name, fit in fits.items()}
    refusals = [f"{name}: {each}" for name, each in found.items() if isinstance(each, ConfigError)]
    if len(refusals) == len(fits):
        raise ConfigError(" ".join(refusals))
    wanted = config.teacache_thresh
    return {
        name: (fits[name], *(fits[name].threshold(wanted, is_strict=False) if isinstance(each, ConfigError) else each))
        for name, each in found.items()
    }


def _threshold(fit: TeaCacheCoefficients, config: TeaCacheConfig) -> tuple[float, str] | ConfigError:
    try:
        return fit.threshold(config.teacache_thresh)
    except ConfigError as error:
        return error


def _fits(
    transformer: nn.Module, family: Family, config: TeaCacheConfig, retains: bool
) -> dict[str, TeaCacheCoefficients]:
    """The coefficients that were given, or the published ones by the name of their variant."""
    if config.fitted is not None:
        return {"own coefficients": config.fitted}
    variants = {name: VARIANTS[name] for name in _names(transformer, family, config)}
    return {name: (variant.retained if retains else None) or variant.fit for name, variant in variants.items()}


def _ret_steps(config: TeaCacheConfig) -> bool | None:
    """What the user or the fit says about the signal."""
    fitted = None if config.fitted is None else config.fitted.use_ret_steps
    if fitted is not None and config.use_ret_steps not in (None, fitted):
        raise ConfigError(
            f"use_ret_steps={config.use_ret_steps}, and the coefficients were fitted with use_ret_steps={fitted}. "
            "Leave use_ret_steps out, or fit again with it."
        )
    return config.use_ret_steps if fitted is None else fitted


def _names(transformer: nn.Module, family: Family, config: TeaCacheConfig) -> tuple[str, ...]:
    """Names of the published coefficients to be used; none where the user has given coefficients."""
    if config.coefficients is not None:
        return ()
    model = model_class(transformer).__name__
    if config.variant is not None:
        if config.variant not in VARIANTS:
            raise unknown_name("variant", config.variant, VARIANTS)
        if config.variant not in family.variants:
            allowed = f"allowed: {', '.join(family.variants)}" if family.variants else "none are known for it"
            raise ConfigError(
                f"variant={config.variant!r} was fitted on another signal than that of {model}; {allowed}. "
                "Or give coefficients=[...], or fit them: fit_teacache(pipe, calls)."
            )
        return (config.variant,)
    names = family.variants_for(getattr(transformer, "config", None))
    if not names:
        near = f", or take those of a related model: variant={family.variants[0]!r}" if family.variants else ""
        raise ConfigError(
            f"no TeaCache coefficients are published for {model} as it is configured. Fit them on a few of your own "
            "calls, coefficients = fit_teacache(pipe, calls), and type apply_teacache(pipe, '2x', "
            f"coefficients=coefficients); or give coefficients=[...] and teacache_thresh=...{near}."
        )
    return names
