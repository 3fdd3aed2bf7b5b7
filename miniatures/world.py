"""A procedural world of captioned pictures and clips.

A scene is one bright shape on a dark, softly lit ground. Its caption has four words: size, colour, shape, and where it
stands (pictures) or how it moves (clips). Everything else (exact place, hue, area, lighting, grain) is drawn at random,
so a caption has many pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SIDE = 16
"""Width and height of a frame in pixels."""

SIZES = {"small": 22.0, "large": 58.0}
"""Mean area of a shape, in pixels."""

COLOURS = {
    "red": (0.93, 0.13, 0.13),
    "yellow": (0.93, 0.87, 0.13),
    "green": (0.13, 0.85, 0.17),
    "cyan": (0.13, 0.87, 0.93),
    "blue": (0.17, 0.23, 0.95),
    "magenta": (0.93, 0.15, 0.87),
    "white": (0.94, 0.94, 0.94),
}
"""Mean colour of a shape, RGB in [0, 1]."""

SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = {"centre": (0.0, 0.0), "left": (-2.6, 0.0), "right": (2.6, 0.0), "top": (0.0, -2.6), "bottom": (0.0, 2.6)}
"""Offset of the shape's centre from the frame's, in pixels (x to the right, y downwards)."""

MOTIONS = {"still": (0.0, 0.0), "left": (-1.6, 0.0), "right": (1.6, 0.0), "up": (0.0, -1.6), "down": (0.0, 1.6)}
"""Motion per frame, in pixels."""

CLIP_FRAMES = 3
"""Frames of a clip; a picture has one."""


@dataclass(frozen=True)
class World:
    """The four lists of words that captions are made of.

    Attributes:
        frames: frames of a sample, 1 for pictures.
        slots: the four lists of words, in caption order: size, colour, shape, place or motion.
        side: width and height of a frame in pixels.
    """

    frames: int
    slots: tuple[tuple[str, ...], ...]
    side: int = SIDE

    @property
    def words(self) -> tuple[str, ...]:
        """All words, in the order of the rows of an embedding table; one more row, the last, is the empty caption's."""
        return tuple(word for slot in self.slots for word in slot)

    def caption(self, choice: torch.Tensor) -> str:
        """The caption of one choice of words, `[4]` indices into the slots."""
        return " ".join(slot[int(index)] for slot, index in zip(self.slots, choice, strict=True))

    def parse(self, caption: str) -> torch.Tensor:
        """The choice `[4]` that a caption makes.

        Raises:
            ValueError: not four words, or a word that this world does not have at its place.
        """
        words = caption.split()
        if len(words) != len(self.slots):
            raise ValueError(f"caption {caption!r} has {len(words)} words, expected 4, such as 'large red circle left'")
        for word, slot in zip(words, self.slots, strict=True):
            if word not in slot:
                raise ValueError(f"unknown word {word!r} in caption {caption!r}; expected one of {', '.join(slot)}")
        return torch.tensor([slot.index(word) for word, slot in zip(words, self.slots, strict=True)])

    def rows(self, choices: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table for choices `[B, 4]`, same shape."""
        starts = [0]
        for slot in self.slots[:-1]:
            starts.append(starts[-1] + len(slot))
        return choices + torch.tensor(starts, device=choices.device)

    def choose(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Random choices of words, `[count, 4]`, each word of a slot equally likely."""
        columns = [torch.randint(len(slot), (count,), generator=generator) for slot in self.slots]
        return torch.stack(columns, dim=1)

    def render(self, choices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Scenes of the given choices `[B, 4]`: `[B, 3, F, 16, 16]` in [-1, 1], with random details."""
        return _render(self, choices, generator)


PICTURES = World(frames=1, slots=(tuple(SIZES), tuple(COLOURS), SHAPES, tuple(PLACES)))
CLIPS = World(frames=CLIP_FRAMES, slots=(tuple(SIZES), tuple(COLOURS), SHAPES, tuple(MOTIONS)))


def coverage(shape: str, centre: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """How much of each pixel a shape covers, anti-aliased.

    Args:
        shape: one of `SHAPES`.
        centre: `[..., 2]`, x and y in pixels.
        area: `[...]`, in pixels.

    Returns:
        `[..., 16, 16]` in [0, 1].
    """
    axis = torch.arange(SIDE, dtype=torch.float32) + 0.5
    x = axis[None, :] - centre[..., 0, None, None]
    y = axis[:, None] - centre[..., 1, None, None]
    return (0.5 - _distance(shape, x, y, area[..., None, None])).clamp(0, 1)


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """Signed distance to a shape's outline in pixels, negative inside, near enough for anti-aliasing."""
    if shape == "circle":
        return torch.hypot(x, y) - (area / math.pi).sqrt()
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - area.sqrt() / 2
    if shape == "triangle":
        inner = (area / (3 * math.sqrt(3))).sqrt()
        return torch.maximum(y, math.sqrt(3) / 2 * x.abs() - y / 2) - inner
    if shape == "cross":
        arm = (area * 9 / 20).sqrt()
        bars = [torch.maximum(u.abs() - arm, v.abs() - arm / 3) for u, v in ((x, y), (y, x))]
        return torch.minimum(*bars)
    outer = (area / (0.75 * math.pi)).sqrt()
    radius = torch.hypot(x, y)
    return torch.maximum(radius - outer, outer / 2 - radius)


def _render(world: World, choices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count, frames = len(choices), world.frames

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    sizes, colours, shapes, fourth = choices.unbind(dim=1)
    table = torch.tensor(list((MOTIONS if frames > 1 else PLACES).values()))
    time = torch.arange(frames) - (frames - 1) / 2
    centre = SIDE / 2 + uniform(-0.7, 0.7, count, 1, 2)
    centre = centre + table[fourth][:, None] * (time[:, None] if frames > 1 else 1.0)
    area = torch.tensor(list(SIZES.values()))[sizes] * uniform(0.88, 1.12, count)
    per_frame = area[:, None].expand(count, frames)
    every = torch.stack([coverage(shape, centre, per_frame) for shape in SHAPES])
    mask = every[shapes, torch.arange(count)][:, None]

    axis = torch.linspace(-1, 1, SIDE)
    slope = uniform(-1, 1, count, 2, 1, 1)
    light = (slope[:, 0] * axis[None, :] + slope[:, 1] * axis[:, None])[:, None, None]
    ink = (torch.tensor(list(COLOURS.values()))[colours] + uniform(-0.05, 0.05, count, 3))[..., None, None, None]
    shade = uniform(0.06, 0.26, count, 1) + uniform(-0.03, 0.03, count, 3)
    ground = shade[..., None, None, None] * (1 + 0.3 * light)
    ink = ink * (1 + 0.06 * light)
    grain = torch.randn((count, 3, 1, SIDE, SIDE), generator=generator) * 0.012
    picture = ground + mask * (ink - ground) + grain
    return picture.clamp(0, 1) * 2 - 1
