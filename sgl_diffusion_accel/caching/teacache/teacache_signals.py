"""Whether a model has the signal that TeaCache goes by."""

from __future__ import annotations

from torch import nn

from sgl_diffusion_accel.caching.blocks.layout import find_block_lists
from sgl_diffusion_accel.caching.blocks.modulated import has_attention
from sgl_diffusion_accel.caching.parts.signals import Signal
from sgl_diffusion_accel.caching.teacache.teacache_models import family_of
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError


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


def check_signal(transformer: nn.Module, signal: Signal) -> None:
    """Raises UnsupportedModelError where the first block has no attention whose input could be the signal."""
    block = next(iter(find_block_lists(transformer).values()))[0]
    if signal.needs_attention and not has_attention(block):
        raise UnsupportedModelError(
            f"{type(block).__name__} has no attention among its parts, whose input would be the signal. "
            "Use apply_cache_dit for this model."
        )
