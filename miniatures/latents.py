"""Between pixels and what a pipeline calls latents; here the latents are the pixels themselves."""

from __future__ import annotations

import torch

from .world import SIDE


def pack(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures `[B, 3, 1, H, W]` to rows of 2 x 2 patches, `[B, H W / 4, 12]`, as FLUX and Qwen-Image take them."""
    height, width = pictures.shape[-2] // 2, pictures.shape[-1] // 2
    patches = pictures.reshape(-1, 3, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(-1, height * width, 12)


def unpack(rows: torch.Tensor, size: tuple[int, int] = (SIDE, SIDE)) -> torch.Tensor:
    """The inverse of `pack`, for pictures of a height and width."""
    height, width = size[0] // 2, size[1] // 2
    patches = rows.reshape(-1, height, width, 3, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(-1, 3, 1, *size)
