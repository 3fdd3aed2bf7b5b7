"""Between pixels and what a pipeline calls latents; here the latents are the pixels themselves."""

from __future__ import annotations

import torch


def pack(pictures: torch.Tensor, patch: int = 2) -> torch.Tensor:
    """Pictures `[B, 3, 1, H, W]` to rows of patches, `[B, H W / p², 3 p²]`, as FLUX and Qwen-Image take them."""
    height, width = pictures.shape[-2] // patch, pictures.shape[-1] // patch
    patches = pictures.reshape(-1, 3, height, patch, width, patch).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(-1, height * width, 3 * patch * patch)


def unpack(rows: torch.Tensor, size: tuple[int, int], patch: int = 2) -> torch.Tensor:
    """The inverse of `pack`, for pictures of a height and width."""
    height, width = size[0] // patch, size[1] // patch
    patches = rows.reshape(-1, height, width, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(-1, 3, 1, *size)
