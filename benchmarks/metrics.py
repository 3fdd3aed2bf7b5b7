"""How near the frames of a miniature are to those of the unpatched run, and how many steps were computed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sgl_diffusion_accel.comparing.measures import metrics

Frames = npt.NDArray[np.float32]
"""Pixels `[B, F, H, W, 3]` in [0, 1]."""


def psnr(frames: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio in dB, over all pixels and frames; infinite for equal ones."""
    return metrics.psnr(_tensor(frames), _tensor(reference))


def ssim(frames: Frames, reference: Frames) -> float:
    """Structural similarity in [-1, 1], the mean over all frames; 1 for equal ones."""
    return metrics.ssim(_tensor(frames), _tensor(reference))


def _tensor(frames: Frames) -> Tensor:
    return torch.from_numpy(frames).movedim(-1, 2)


def computed_steps(calls: list[int], reference: list[int], steps: int) -> float:
    """Denoising steps at which (nearly) all of the blocks' work was done, a mean over the branches.

    Args:
        calls: Work of each transformer call.
        reference: The same of the unpatched run.
        steps: Denoising steps of the unpatched run.
    """
    branches = len(reference) / steps
    return sum(call > 0.95 * max(reference) for call in calls) / branches
