"""LPIPS, where torchmetrics, torchvision and the weights are on this machine; nothing is ever downloaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion_accel.comparing.measures.metrics import frames_of
from sgl_diffusion_accel.comparing.measures.read_output import Media

_SMALLEST = 64
"""Pixels below which AlexNet's last feature maps have nothing left to compare."""


class Lpips:
    """Learned perceptual distance with AlexNet's features, 0 for equal pictures; the mean over all frames.

    Source: Zhang et al., https://arxiv.org/abs/1801.03924.
    """

    def __init__(self) -> None:
        self._network: Any = None

    def why_not(self, reference: Media) -> str | None:
        """Why there is no LPIPS for such pictures here, None if there is."""
        if reference.kind != "pixels" or reference.values.shape[2] != 3:
            return "no LPIPS: it is defined for RGB pictures alone"
        if min(reference.values.shape[-2:]) < _SMALLEST:
            return f"no LPIPS: it needs pictures of {_SMALLEST} pixels and more"
        lacking = [name for name in ("torchmetrics", "torchvision") if find_spec(name) is None]
        if lacking:
            return f"no LPIPS: it needs {' and '.join(lacking)}. Type: pip install {' '.join(lacking)}"
        try:
            path = weights_path()
        except Exception as error:  # one that does not fit the installed torch raises all kinds
            return f"no LPIPS: torchvision cannot be imported ({type(error).__name__}: {str(error)[:80]})"
        if not path.exists():
            return (
                f"no LPIPS: AlexNet's weights are not in {path}. To fetch them once, type: "
                "python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\""
            )
        return None

    def __call__(self, values: Tensor, reference: Tensor) -> float:
        """The distance of two tensors `[B, F, 3, H, W]` of pixels."""
        if self._network is None:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self._network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        pairs = zip(frames_of(values, torch.float32), frames_of(reference, torch.float32), strict=True)
        with torch.no_grad():
            found = [float(self._network(*(frame.clamp(0, 1)[None] for frame in pair))) for pair in pairs]
        return sum(found) / len(found)


def weights_path() -> Path:
    """Where torchvision keeps AlexNet's weights."""
    from torchvision.models import AlexNet_Weights

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.DEFAULT.url).name
