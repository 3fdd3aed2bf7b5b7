"""How near a picture or clip is to the one of the unpatched run."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

Frames = npt.NDArray[np.float32]
"""Pixels `[B, F, H, W, 3]` in [0, 1]."""


def psnr(frames: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio in dB, `10 log10(1 / MSE)`, over all pixels and frames; infinite for equal ones.

    Example:
        >>> psnr(np.zeros((1, 1, 16, 16, 3)), np.full((1, 1, 16, 16, 3), 0.1))
        20.0
    """
    error = float(np.mean(np.square(frames.astype(np.float64) - reference.astype(np.float64))))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(frames: Frames, reference: Frames) -> float:
    """Structural similarity in [-1, 1], the mean over all frames; 1 for equal ones."""
    one, other = (torch.from_numpy(part).flatten(0, 1).movedim(-1, 1) for part in (frames, reference))
    value = structural_similarity_index_measure(one, other, data_range=1.0)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"torchmetrics returned {type(value).__name__} where a tensor was expected")
    return float(value)
