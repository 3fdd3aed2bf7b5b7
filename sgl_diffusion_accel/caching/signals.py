"""How much the model's work has changed since the last computed step, as one tensor a step and a distance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

Reduce = Callable[[Tensor], None]
"""Averages a small tensor over the devices that each hold a part of the signal, in place."""


def relative_l1(now: Tensor, reference: Tensor, reduce: Reduce | None = None) -> float:
    """Relative L1 distance, mean|now - reference| / mean|reference|, in float32.

    Asks the device for its value: one synchronisation.

    Args:
        now: Signal of this step, of any shape.
        reference: Signal to compare with, of the same shape.
        reduce: Averages over devices, where each sees only a part.

    Returns:
        The distance; infinity or NaN where the reference is zero or a value is not finite.

    Example:
        >>> relative_l1(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
        0.5
    """
    means = torch.stack(
        (
            (now - reference).abs().mean(dtype=torch.float32),
            reference.abs().mean(dtype=torch.float32),
        )
    ).detach()
    if reduce is not None:
        reduce(means)
    return float(means[0].div(means[1]))


class Signal(ABC):
    """Takes the tensor whose change decides."""

    @abstractmethod
    def take(self, before: Tensor, after: Tensor) -> Tensor:
        """Takes the signal of one step.

        Args:
            before: Hidden states that go into the first block, `[B, T, C]`.
            after: Hidden states after the head, of the same shape.

        Returns:
            A new tensor, which is kept until the next computed step.
        """


@final
class HeadResidual(Signal):
    """What the first blocks added to the hidden states: the signal of DBCache and of first-block caching."""

    def take(self, before: Tensor, after: Tensor) -> Tensor:
        """Returns after - before."""
        return after - before
