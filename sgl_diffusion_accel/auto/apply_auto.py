"""`apply_auto`: all that pays on a pipeline, as one line."""

from __future__ import annotations

import torch

from sgl_diffusion_accel.attention.select import set_attention_backend
from sgl_diffusion_accel.auto.auto_config import AutoConfig
from sgl_diffusion_accel.auto.auto_patch import AutoHandler, AutoPatch
from sgl_diffusion_accel.auto.run_choice import RunChoice
from sgl_diffusion_accel.caching.cache_patch import put_around, targets_of_cache
from sgl_diffusion_accel.calibration.apply_plan import check_model
from sgl_diffusion_accel.calibration.plan import CachePlan
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.lossless.apply_lossless import apply_lossless
from sgl_diffusion_accel.targets import Pipe, Targets, find_targets
from sgl_diffusion_accel.validate import names_checked


@names_checked
def apply_auto(
    pipe: Pipe, quality: str | AutoConfig = "balanced", speedup: float | None = None, plan: CachePlan | None = None
) -> AutoPatch:
    """Makes a pipeline faster with what pays on it, and says what that is and why.

    It puts on, as one patch, what `apply_lossless` does; the adaptive cache (`apply_adaptive_cache`) or a plan
    (`apply_cache_plan`); and on a CUDA GPU attention by measurement (`set_attention_backend(pipe, "auto")`), which goes
    again after eight calls if PyTorch's own is the fastest. A cache is left out, run by run, where fewer steps may be
    better than it: in runs of fewer than twelve steps, as distilled models take, and under schedulers that add noise of
    their own (SDE, LCM). What acts, what does not and why is in `print(patch)`.

    Args:
        pipe: A diffusers pipeline with a diffusion transformer, or the transformer itself.
        quality: How close the picture stays to the uncached one. `"lossless"`: no cache, equal up to rounding.
            `"high"`, `"balanced"`, `"fast"`: the adaptive cache with a tolerance of 0.0003, 0.001 or 0.003 (in runs of
            fewer than 30 steps 0.0015 at most, of fewer than 20 steps 0.001). Or the `config` of another such patch,
            alone.
        speedup: With a plan, steps of a run for each computed one; at least eight are computed.
        plan: From `calibrate` or `CachePlan.load`, in the place of the adaptive cache.

    Returns:
        The patch: `patch.remove()` undoes all of it exactly, `patch.parts` holds its parts, `print(patch)` tells what
        acts. Applied again it takes its own place, and another `apply_…` afterwards takes that of the part of its kind.

    Raises:
        ConfigError: A quality that is not known, or one of speedup and plan without the other.
        ConfigTypeError: `pipe` or a setting has a wrong type.
        UnsupportedModelError: The pipeline has no diffusion transformer, the plan is of another model, or one of
            diffusers' own caches is on it.

    Example:
        >>> patch = apply_auto(pipe)
        >>> picture = pipe(**call)
        >>> patch.remove()
    """
    config = _config(quality, speedup, plan)
    targets = targets_of_cache(pipe) if config.has_cache else find_targets(pipe)
    if config.plan is not None:
        check_model(config.plan, targets)
    patch = AutoPatch(config)
    with patch.applying(targets):
        patch.add(apply_lossless(pipe))
        if config.has_cache:
            patch.add(put_around(targets, config.cache, RunChoice(config), config))
        else:
            patch.leave_out("cache", f"quality {config.quality!r} computes every step")
        _add_attention(patch, targets)
        for target in targets:
            patch.stand_before(target, AutoHandler(patch))
    return patch


def has_gpu() -> bool:
    """Whether there is a CUDA GPU, on which there may be faster kernels than PyTorch's own."""
    return torch.cuda.is_available()


def _config(quality: str | AutoConfig, speedup: float | None, plan: CachePlan | None) -> AutoConfig:
    if not isinstance(quality, AutoConfig):
        return AutoConfig(quality, speedup, plan)
    if speedup is not None or plan is not None:
        raise ConfigError(
            "a config holds all settings: give none beside it. Type: apply_auto(pipe, dataclasses.replace(config, "
            "quality='high'))"
        )
    return quality


def _add_attention(patch: AutoPatch, targets: Targets) -> None:
    if not has_gpu():
        patch.leave_out("attention", "there is no CUDA GPU here, and elsewhere PyTorch's own is taken")
        return
    try:
        patch.add(set_attention_backend(targets.pipe, "auto"))
    except UnsupportedModelError as error:
        patch.leave_out("attention", str(error))
