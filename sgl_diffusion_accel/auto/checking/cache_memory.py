"""What each cache will hold while a run lasts, for calls of a given shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sgl_diffusion_accel.caching.parts.call_policy import DEPTH
from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.targets import Target
from sgl_diffusion_accel.validate import count, listed

_ALLOWED = "the shape of what the transformer is called with, such as (1, 16, 21, 60, 104) or (1, 4096, 64)"
_PACKED = 3  # dimensions of latents that are tokens, `[B, T, C]`


@dataclass(frozen=True)
class CallShape:
    """The shape of transformer calls.

    Attributes:
        latents: Of what the transformer is called with, `[B, C, (F,) H, W]` or `[B, T, C]`.
        branches: Calls of that shape a step.

    Raises:
        ConfigError: It cannot be such a shape.
        ConfigTypeError: It is no list of whole numbers.
    """

    latents: Sequence[int]
    branches: int = 1

    def __post_init__(self) -> None:
        found = listed("latents", self.latents, lambda name, value: count(name, value, 1), _ALLOWED)
        if not _PACKED <= len(found) <= _PACKED + 2:
            raise ConfigError(f"latents has {len(found)} elements; allowed: {_ALLOWED}.")
        object.__setattr__(self, "latents", found)

    def outputs(self, target: Target) -> int:
        """Bytes that a cache of whole calls holds.

        Those are the last computed outputs of each branch, and how far one was off, which waits for the other branch.
        """
        return (DEPTH * self.branches + (self.branches > 1)) * math.prod(self.latents) * dtype_of(target).itemsize

    def hidden(self, target: Target, tensors: int) -> int | None:
        """Bytes that a cache of blocks holds, those of text tokens left out; None where the width is not known.

        Args:
            target: The transformer.
            tensors: Tensors as large as the hidden states that it keeps for each branch.
        """
        tokens, width = self._tokens(target), _width(target)
        if tokens is None or width is None:
            return None
        held: int = self.branches * tensors * self.latents[0] * tokens * width * dtype_of(target).itemsize
        return held

    def _tokens(self, target: Target) -> int | None:
        if len(self.latents) == _PACKED:
            return self.latents[1]
        config = getattr(target.module, "config", None)
        sides = self.latents[2:]
        patch, patch_t = getattr(config, "patch_size", None), getattr(config, "patch_size_t", None)
        if isinstance(patch, (tuple, list)) and len(patch) == len(sides):
            patches = tuple(patch)
        elif isinstance(patch, int):
            patches = (*((patch_t if isinstance(patch_t, int) else 1,) * (len(sides) - 2)), patch, patch)
        else:
            return None
        tokens: int = math.prod(-(-side // each) for side, each in zip(sides, patches, strict=True))
        return tokens


def dtype_of(target: Target) -> torch.dtype:
    """In which a transformer computes; bfloat16 where it has no weights yet."""
    first = next((each for each in target.module.parameters() if each.is_floating_point()), None)
    return torch.bfloat16 if first is None or first.device.type == "meta" else first.dtype


def _width(target: Target) -> int | None:
    """Channels of the hidden states."""
    config = getattr(target.module, "config", None)
    heads, size = getattr(config, "num_attention_heads", None), getattr(config, "attention_head_dim", None)
    if isinstance(heads, int) and isinstance(size, int):
        return heads * size
    known = (getattr(config, name, None) for name in ("hidden_size", "inner_dim", "dim", "model_dim"))
    return next((each for each in known if isinstance(each, int)), None)
