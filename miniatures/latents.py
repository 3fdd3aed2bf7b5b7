"""Between pixels and what a pipeline calls latents; here the latents are the pixels themselves."""

from __future__ import annotations

import torch

from .world import SIDE


def pack(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures `[B, 3, 1, 16, 16]` to rows of 2 x 2 patches, `[B, 64, 12]`, as FLUX and Qwen-Image take them."""
    half = SIDE // 2
    patches = pictures.reshape(-1, 3, half, 2, half, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(-1, half * half, 12)


def unpack(rows: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    half = SIDE // 2
    patches = rows.reshape(-1, half, half, 3, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(-1, 3, 1, SIDE, SIDE)
