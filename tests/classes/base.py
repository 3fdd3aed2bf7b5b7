"""What a row is: a transformer of one class, small, and the arguments of a call of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from padded.base import values
from zoo.base import quiet_rng, randomise

from .finding import found

TEXT = 16
"""Width of a token of text."""


@dataclass(frozen=True)
class Row:
    """One class.

    Attributes:
        name: Of the class.
        lists: Its block lists that run one after the other and carry the picture on.
        make: Makes the model, with seeded weights in which every block matters.
        given: The arguments of a call at the noisiest step, by name.
        time: Which of them tells the noise level; a run lowers it.
        stream: Which of them is denoised.
        prepare: What else a call needs and only the model can make, such as a filled store of keys and values.
        unread: Places at the start of the output that nobody reads.
        label: What sets it apart from another row of its class.
        lacks: Why this diffusers, which has the class, cannot make it all the same; None where it can.
    """

    name: str
    lists: tuple[str, ...]
    make: Callable[[], Any]
    given: Callable[[], dict[str, Any]]
    time: str = "timestep"
    stream: str = "hidden_states"
    prepare: Callable[[Any, dict[str, Any]], dict[str, Any]] = field(default=lambda _, given: given)
    unread: int = 0
    label: str = ""
    lacks: Callable[[], str | None] = lambda: None

    @property
    def key(self) -> str:
        """What the row is known by."""
        return f"{self.name}, {self.label}" if self.label else self.name

    @property
    def missing(self) -> str | None:
        """Why this diffusers cannot make it; None where it can."""
        if self.name not in found():
            return f"diffusers {diffusers.__version__} has no {self.name}"
        return self.lacks()


def row(name: str, lists: str, config: dict[str, Any], given: dict[str, Any], **more: Any) -> Row:
    """A row of a class that is made from its configuration.

    Args:
        name: Of the class.
        lists: Names of its block lists, with blanks between.
        config: Of the model.
        given: Arguments of a call; a shape stands for seeded normal values.
        **more: Fields of `Row`.
    """

    def make() -> Any:
        with quiet_rng(0):
            return randomise(found()[name](**config), 0)

    def arguments() -> dict[str, Any]:
        return {key: values(*each, key=key) if _is_shape(each) else each for key, each in given.items()}

    return Row(name, tuple(lists.split()), make, arguments, **more)


class Shape(tuple):
    """Stands for a tensor of seeded normal values."""


def shape(*sizes: int) -> Shape:
    return Shape(sizes)


def _is_shape(value: Any) -> bool:
    return isinstance(value, Shape)


def at(time: float) -> Tensor:
    """A noise level, for a batch of one."""
    return torch.tensor([time])


def places(*sizes: int, axes: int = 3) -> Tensor:
    """Positions of a grid, `[tokens, axes]`; the first axes are 0."""
    grid = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).float().reshape(-1, len(sizes))
    return torch.cat([torch.zeros(len(grid), axes - len(sizes)), grid], 1)
