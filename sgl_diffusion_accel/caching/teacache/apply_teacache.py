"""`apply_teacache`: the timestep cache, as one line."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sgl_diffusion_accel.caching.blocks.cached_model import Parts
from sgl_diffusion_accel.caching.blocks.layout import divide
from sgl_diffusion_accel.caching.blocks.modulated import has_attention
from sgl_diffusion_accel.caching.cache_patch import CachePatch, apply_cache, refuse_foreign_cache
from sgl_diffusion_accel.caching.parts.policies import AccumulatingPolicy, Policy
from sgl_diffusion_accel.caching.parts.predictors import Reuse, Taylor
from sgl_diffusion_accel.caching.parts.signals import Signal, TimeEmbedding
from sgl_diffusion_accel.caching.teacache.teacache_config import TeaCacheCoefficients, TeaCacheConfig
from sgl_diffusion_accel.caching.teacache.teacache_models import VARIANTS, Family, family_of, nearest_size
from sgl_diffusion_accel.errors import ConfigError, ConfigTypeError, UnsupportedModelError, unknown_name
from sgl_diffusion_accel.targets import find_transformers, model_class, unwrap

logger = logging.getLogger(__name__)


def apply_teacache(
    pipe: object,
    teacache_thresh: float | str | None = None,
    coefficients: Sequence[float] | TeaCacheCoefficients | None = None,
    start_skipping: int | float | None = None,
    end_skipping: int | float | None = None,
    use_ret_steps: bool | None = None,
    variant: str | None = None,
    **more: Any,
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
        teacache_thresh: The threshold, or a speed-up such as `"1.6x"` for the one that is known for the nearest.
        coefficients: Of the polynomial: five numbers, highest degree first, or what `fit_teacache` has returned.
        start_skipping: First denoising step that may be skipped: index, negative from the end, or a share as a float.
        end_skipping: First step that is computed again at the end, in the same units.
        use_ret_steps: For Wan: the signal with retention steps, or the one without.
        variant: Which published coefficients to take, by name.
        **more: `taylorseer_order`, `secondary` (settings of `transformer_2`), or `config`, a `TeaCacheConfig` that the
            single settings go over. What is None is the model's own; see `TeaCacheConfig`.

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
    given = {
        "teacache_thresh": teacache_thresh,
        "coefficients": coefficients,
        "start_skipping": start_skipping,
        "end_skipping": end_skipping,
        "use_ret_steps": use_ret_steps,
        "variant": variant,
    }
    config = _merge(more.pop("config", None), {key: value for key, value in given.items() if value is not None} | more)
    transformers = find_transformers(pipe)
    refuse_foreign_cache(transformers)
    if config.secondary and "transformer_2" not in transformers:
        raise ConfigError(
            f"secondary={dict(config.secondary)!r} is for transformer_2, and {type(pipe).__name__} has none. "
            "Leave secondary out."
        )
    planned = {name: _plan(unwrap(module), config.for_component(name)) for name, module in transformers.items()}
    for name, (_, said) in planned.items():
        logger.info("TeaCache on %s: %s", name, said)
    words = {said for _, said in planned.values()}
    title = words.pop() if len(words) == 1 else "; ".join(f"{name}: {said}" for name, (_, said) in planned.items())
    parts = {name: found for name, (found, _) in planned.items()}
    return apply_cache(f"TeaCache ({title})", transformers, parts, pipe)


def _merge(config: TeaCacheConfig | None, knobs: dict[str, Any]) -> TeaCacheConfig:
    from sgl_diffusion_accel.caching.teacache.teacache_config import TEACACHE_KNOBS

    for name in knobs:
        if name not in TEACACHE_KNOBS:
            raise unknown_name("setting", name, [*TEACACHE_KNOBS, "config"], "apply_teacache")
    if config is None:
        return TeaCacheConfig(**knobs)
    if not isinstance(config, TeaCacheConfig):
        raise ConfigTypeError(
            f"config is a {type(config).__name__}; allowed: a TeaCacheConfig. Single settings go by name: "
            "apply_teacache(pipe, teacache_thresh=0.1)."
        )
    for one, other in (("coefficients", "variant"), ("variant", "coefficients")):
        if knobs.get(one) is not None:
            knobs.setdefault(other, None)
    return dataclasses.replace(config, **knobs)


def _plan(transformer: nn.Module, config: TeaCacheConfig) -> tuple[Parts, str]:
    """The parts of the cache on one transformer, and a line on what was chosen."""
    family = family_of(transformer)
    retains = uses_ret_steps(transformer, _ret_steps(config))
    window = config.window(retains)
    policies: list[Policy] = []
    words: list[str] = []
    for name, (fit, threshold, source) in _thresholds(_fits(transformer, family, config, retains), config).items():
        policies.append(AccumulatingPolicy(threshold, fit.polynomial, window, fit.steps))
        words.append(f"{name}, threshold {threshold:g}{source}")
    sizes = [VARIANTS[name].pixels for name in _names(transformer, family, config)]

    def by_latents(latents: torch.Size) -> tuple[Policy, str]:
        index = nearest_size(sizes, latents)
        return policies[index], f"by the resolution: {words[index]}"

    signal = family.retained if retains and family.retained is not None else family.signal
    check_signal(transformer, signal)
    order = config.taylorseer_order or 0
    parts = Parts(
        layout=divide(transformer, 0, 0),
        policy=policies[0],
        predictor=Taylor(order) if order else Reuse(),
        signal=signal,
        by_latents=by_latents if len(policies) > 1 else None,
    )
    predictor = f"TaylorSeer order {order}" if order else "reuse"
    return parts, ", ".join([" or ".join(words), describe(signal, retains), str(window), predictor])


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


def uses_ret_steps(transformer: nn.Module, wanted: bool | None) -> bool:
    """Whether the signal with retention steps is meant; the one without where the user has no wish.

    Raises:
        ConfigError: The model has no such choice.
    """
    if wanted and family_of(transformer).retained is None:
        raise ConfigError(
            f"use_ret_steps=True is a choice between two signals of Wan; {type(transformer).__name__} has one signal. "
            "To compute the first 5 steps, type: start_skipping=5."
        )
    return bool(wanted)


def describe(signal: Signal | TimeEmbedding, retains: bool) -> str:
    """The name of a signal."""
    if isinstance(signal, TimeEmbedding):
        return "projected time embedding (use_ret_steps)" if retains else "time embedding"
    return "modulated input"


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


def check_signal(transformer: nn.Module, signal: Signal | TimeEmbedding) -> None:
    """Raises UnsupportedModelError where the first block has no attention whose input could be the signal."""
    from sgl_diffusion_accel.caching.blocks.layout import find_block_lists

    block = next(iter(find_block_lists(transformer).values()))[0]
    if not isinstance(signal, TimeEmbedding) and not has_attention(block):
        raise UnsupportedModelError(
            f"{type(block).__name__} has no attention among its parts, whose input would be the signal. "
            "Use apply_cache_dit for this model."
        )
