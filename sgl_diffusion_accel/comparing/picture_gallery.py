"""A few pictures of every contender, small enough to be kept, and how they differ from the unpatched ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from sgl_diffusion_accel.comparing.measures.metrics import frames_of
from sgl_diffusion_accel.comparing.measures.read_output import Media

_CALLS, _FRAMES, _SIDE = 4, 3, 384


@dataclass(frozen=True)
class Shot:
    """Frames of the first sample of one call.

    Attributes:
        frames: RGB in [0, 1], `[F, 3, H, W]`.
        difference: |value - reference| over the range of the data, a mean over the channels, `[F, H, W]`.
    """

    frames: Tensor
    difference: Tensor


@dataclass
class Gallery:
    """Pictures of the first four calls: the first sample of each, of clips the first, middle and last frame.

    Attributes:
        shots: Call to contender to its pictures.
        kind: What they are of; latents are shown by their first three channels.
    """

    shots: dict[int, dict[str, Shot]] = field(default_factory=dict)
    kind: str = "pixels"

    def add(self, call: int, name: str, media: Media, reference: Media) -> None:
        """Keeps the pictures of one run; those of the first run of each call stay."""
        known = self.shots.get(call, {})
        if reference.kind == "rows" or name in known or (not known and len(self.shots) >= _CALLS):
            return
        self.kind = reference.kind
        count = reference.values.shape[1]
        chosen = sorted({0, count // 2, count - 1}) if count > _FRAMES else list(range(count))
        mine, other = (
            torch.stack(list(frames_of(part.values[:1, chosen], torch.float32))) for part in (media, reference)
        )
        difference = (mine - other).abs().mean(dim=1, keepdim=True) / (reference.peak or 1.0)
        shot = Shot(_small(_rgb(mine, other, reference.kind)), _small(difference)[:, 0])
        self.shots.setdefault(call, {})[name] = shot

    def names(self) -> list[str]:
        """The contenders of which there are pictures."""
        first: Mapping[str, Shot] = next(iter(self.shots.values()), {})
        return list(first)


def _rgb(frames: Tensor, reference: Tensor, kind: str) -> Tensor:
    """`[F, 3, H, W]` in [0, 1]; latents by the range that the reference's channels have."""
    shown, scale = frames[:, :3], reference[:, :3]
    if shown.shape[1] < 3:
        shown, scale = (part[:, :1].expand(-1, 3, -1, -1) for part in (shown, scale))
    if kind == "latents":
        low, high = (part.view(1, -1, 1, 1) for part in scale.transpose(0, 1).flatten(1).aminmax(dim=1))
        shown = (shown - low) / (high - low).clamp_min(1e-12)
    return shown.nan_to_num(nan=1.0).clamp(0, 1)


def _small(frames: Tensor) -> Tensor:
    side = max(frames.shape[-2:])
    if side <= _SIDE:
        return frames
    size = [max(1, round(length * _SIDE / side)) for length in frames.shape[-2:]]
    return F.interpolate(frames, size=size, mode="area")
