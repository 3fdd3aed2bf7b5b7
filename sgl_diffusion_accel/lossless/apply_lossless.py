"""`apply_lossless`: leaves out what is computed and cannot matter, as one line."""

from __future__ import annotations

import logging

from torch import nn

from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.lossless.arguments import Arguments
from sgl_diffusion_accel.lossless.both_ways import Verification
from sgl_diffusion_accel.lossless.call_handler import Part
from sgl_diffusion_accel.lossless.constants.constant import Constants
from sgl_diffusion_accel.lossless.constants.constant_table import (
    ONCE_A_RUN,
    may_have_equal_timesteps,
    may_have_idle_guidance,
)
from sgl_diffusion_accel.lossless.constants.equal_timesteps import EqualTimesteps
from sgl_diffusion_accel.lossless.constants.once_a_run import OnceARun
from sgl_diffusion_accel.lossless.lossless_config import LosslessConfig, VerifyWhen
from sgl_diffusion_accel.lossless.lossless_patch import LosslessPatch
from sgl_diffusion_accel.lossless.padding.left_alone import why_left_alone
from sgl_diffusion_accel.lossless.padding.table import ROWS, Row
from sgl_diffusion_accel.lossless.padding.trimming import Padding
from sgl_diffusion_accel.targets import Pipe, Target, find_targets, model_class
from sgl_diffusion_accel.validate import names_checked, of_type

logger = logging.getLogger(__name__)


@names_checked
def apply_lossless(
    pipe: Pipe,
    config: LosslessConfig | None = None,
    *,
    padding: bool = True,
    constants: bool = True,
    verify: VerifyWhen | None = None,
) -> LosslessPatch:
    """Cuts text padding that the model's own mask hides, and leaves out masks that hide nothing.

    A token that no other one sees, and whose output nobody reads, adds exp(−∞) = 0 to every sum of the softmax: without
    it, the same sums have fewer terms, and the output is the same up to rounding. Models pad prompts of 60 tokens to
    256, 1,000 or 2,048, and a mask sends attention to kernels that are several times slower than those without. Which
    inputs are padding is known for each class (`docs/lossless.md`); models whose padding is attended are left alone.

    More is left out as `constants`: what the prompt alone decides is computed once a run and branch (keys and values of
    the text in LTX-2.0, Sana, Wan and others, where they are worth it; Ideogram 4's projection); Wan2.2-TI2V-5B's
    modulation for each token, where all have one timestep (text to video); and calls without the prompt in Wan2.2's
    second stage, where `guidance_scale_2=1` multiplies them by 0.

    It goes with every cache, attention backend and compiled model, applied before or after. Masks are read from the
    device once for each prompt, which is one sync. Nothing is held when a run is over.

    Args:
        pipe: A diffusers pipeline with a diffusion transformer, or the transformer itself.
        config: The `config` of another such patch, alone.
        padding: Whether padding is cut, and masks that hide nothing are left out.
        constants: Whether what has one result is computed once, and what is multiplied by 0 not at all.
        verify: `"first"` makes the first call of each branch and shape both ways, and once more with its padding
            multiplied by ten, and raises where the outputs differ by more than rounding. It costs three calls more.

    Returns:
        The patch: `patch.remove()` undoes it exactly, `print(patch)` tells what was cut, what was left alone and why.

    Raises:
        ConfigError: A setting is unknown or not allowed.
        ConfigTypeError: `pipe` or a setting has a wrong type.
        UnsupportedModelError: The pipeline has no diffusion transformer.
        LosslessError: Later, at a call, with `verify="first"`: an output differs.

    Example:
        >>> patch = apply_lossless(pipe)
        >>> picture = pipe(**call)
        >>> patch.remove()
    """
    if config is not None:
        of_type("config", config, LosslessConfig, "a LosslessConfig; single settings go by name")
        if (padding, constants, verify) != (True, True, None):
            raise ConfigError(
                "a config holds all settings: give none beside it. Type: apply_lossless(pipe, "
                "dataclasses.replace(config, verify='first'))"
            )
    settings = config or LosslessConfig(padding, constants, verify)
    targets = find_targets(pipe)
    patch = LosslessPatch(settings)
    with patch.applying(targets):
        for target in targets:
            _attach(patch, target, settings)
    return patch


def _attach(patch: LosslessPatch, target: Target, settings: LosslessConfig) -> None:
    verification = Verification(target.name) if settings.verify is not None else None
    owner = owner_of_forward(target.module)
    parts: list[Part] = []
    if settings.constants and may_have_equal_timesteps(owner.__name__):
        parts.append(EqualTimesteps(target, verification))
    constants = constants_for(owner) if settings.constants else None
    if constants is not None:
        why_not = constants.why_not(target.module)
        if why_not:
            patch.not_constant[target.name] = why_not
        else:
            parts.append(OnceARun(target, constants, verification))
    found = row_for(owner) if settings.padding else "padding=False"
    if isinstance(found, Row):
        parts.append(Padding(target, found, verification))
    else:
        patch.leave_alone(target, found)
    if parts:
        patch.attach(target, parts, verification)
    if settings.constants and may_have_idle_guidance(target, owner.__name__):
        patch.spare_idle_calls(target)


def owner_of_forward(module: nn.Module) -> type:
    """The class whose `forward` a model has: one that is derived from it and leaves that as it is computes the same."""
    return next(cls for cls in model_class(module).__mro__ if "forward" in vars(cls))


def constants_for(owner: type) -> Constants | None:
    """What is told of the constants of a class; None where nothing is, or of another version of it."""
    constants = ONCE_A_RUN.get(owner.__name__)
    names = Arguments(vars(owner)["forward"]).names
    return constants if constants is not None and not constants.parameters.difference(names) else None


def row_for(owner: type) -> Row | str:
    """The row of a class, or why it has none."""
    row = ROWS.get(owner.__name__)
    if row is None:
        return why_left_alone(owner)
    names = Arguments(vars(owner)["forward"]).names
    if set(row.older) & set(names):
        return f"this version of {owner.__name__} attends its padding. Newer ones of diffusers do not"
    missing = row.parameters.difference(names)
    if missing:
        return f"this {owner.__name__} has no {', '.join(sorted(missing))}, and another one was expected"
    return row
