"""Says from pixels alone what a sample shows, by fixed rules; nothing here is learned.

The shape is what is brighter than the ground. Its mean colour names the colour, the covered area the size, the
best-fitting outline the shape, its centre the place, and the way of its centre the motion.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .world import COLOURS, MOTIONS, PLACES, SHAPES, SIDE, SIZES, World, coverage

_FRAME_MIDDLE = SIDE / 2


def read(world: World, frames: npt.NDArray[np.float32]) -> list[str]:
    """Captions of what samples show.

    Args:
        world: whose words to use.
        frames: `[B, F, 16, 16, 3]` in [0, 1].
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).float()
    mask = _mask(pixels)
    mass = mask.sum(dim=(-1, -2)).clamp(min=1e-3)
    axis = torch.arange(SIDE) + 0.5
    centre = torch.stack([(mask.sum(-2) @ axis) / mass, (mask.sum(-1) @ axis) / mass], dim=-1)
    columns = (_sizes(mass), _colours(pixels, mask), _shapes(mask, centre, mass), _fourths(world, centre))
    return [" ".join(words) for words in zip(*columns, strict=True)]


def accuracy(world: World, wanted: list[str], seen: list[str]) -> dict[str, float]:
    """Share of samples that show what was asked, for each word of the caption, and for all four at once."""
    pairs = [(one.split(), other.split()) for one, other in zip(wanted, seen, strict=True)]
    names = ("size", "colour", "shape", "motion" if world.frames > 1 else "place")
    shares = {name: sum(a[i] == b[i] for a, b in pairs) / len(pairs) for i, name in enumerate(names)}
    return shares | {"all": sum(a == b for a, b in pairs) / len(pairs)}


def _mask(pixels: torch.Tensor) -> torch.Tensor:
    """How far each pixel stands between ground (0) and shape (1), `[B, F, 16, 16]`."""
    bright = pixels.amax(dim=-1)
    ink = bright.flatten(2).topk(8, dim=-1).values.median(dim=-1).values[..., None, None]
    ground = bright.flatten(2).quantile(0.2, dim=-1)[..., None, None]
    for share in (0.3, 0.15):
        outside = bright < ground + share * (ink - ground)
        ground = _plane(bright, outside.float())
    return ((bright - ground) / (ink - ground).clamp(min=0.2)).clamp(0, 1)


def _plane(bright: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Plane a + b x + c y nearest to the weighted pixels: the softly lit ground."""
    axis = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    basis = torch.stack([torch.ones_like(x), x, y], dim=-1).flatten(0, 1)
    weighted = basis * weight.flatten(2)[..., None]
    normal = weighted.mT @ basis + 1e-3 * torch.eye(3)
    right = weighted.mT @ bright.flatten(2)[..., None]
    plane: torch.Tensor = basis @ torch.linalg.solve(normal, right)
    return plane.reshape(bright.shape)


def _sizes(mass: torch.Tensor) -> list[str]:
    """Nearest size on a logarithmic scale."""
    areas = torch.tensor(list(SIZES.values()))
    nearest = (mass.mean(dim=1)[:, None].log() - areas.log()).abs().argmin(dim=1)
    return [tuple(SIZES)[index] for index in nearest]


def _colours(pixels: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """Nearest colour of the pixels that lie wholly inside the shape."""
    inside = (mask > 0.8).float()[..., None]
    mean = (pixels * inside).sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3)).clamp(min=1)
    nearest = torch.cdist(mean, torch.tensor(list(COLOURS.values()))).argmin(dim=1)
    return [tuple(COLOURS)[index] for index in nearest]


def _shapes(mask: torch.Tensor, centre: torch.Tensor, mass: torch.Tensor) -> list[str]:
    """Shape whose outline, at the seen centre and area, fits the seen mask best over all frames."""
    errors = [(coverage(shape, centre, mass) - mask).square().sum(dim=(1, 2, 3)) for shape in SHAPES]
    return [SHAPES[index] for index in torch.stack(errors).argmin(dim=0)]


def _fourths(world: World, centre: torch.Tensor) -> list[str]:
    """Nearest place, or nearest motion from the first frame to the last."""
    if world.frames == 1:
        table, seen = PLACES, centre[:, 0] - _FRAME_MIDDLE
    else:
        table, seen = MOTIONS, (centre[:, -1] - centre[:, 0]) / (world.frames - 1)
    nearest = torch.cdist(seen, torch.tensor(list(table.values()))).argmin(dim=1)
    return [tuple(table)[index] for index in nearest]
