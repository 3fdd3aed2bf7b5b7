"""How much the model's work has changed from step to step: one tensor a step, and a distance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor, nn

Reduce = Callable[[Tensor], None]
"""Averages a small tensor over the devices that each hold a part of the signal, in place."""


def relative_l1(now: Tensor, reference: Tensor, reduce: Reduce | None = None) -> float:
    """Relative L1 distance, mean|now - reference| / mean|reference|, averaged in float32.

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
    moved, size = (now - reference).abs().mean(dtype=torch.float32), reference.abs().mean(dtype=torch.float32)
    if reduce is None:
        return float(moved.div(size).detach())
    means = torch.stack((moved, size)).detach()
    reduce(means)
    return float(means[0].div(means[1]))


def relative_l1_steps(rows: Tensor) -> Tensor:
    """Relative L1 distance of each row from the one before it, averaged in float32. Asks the device for nothing.

    Args:
        rows: The signal of every step of a run, `[S, ...]`.

    Returns:
        `[S]`; the first entry is infinity, since nothing comes before it.
    """
    rows = rows.detach().flatten(1)
    moved = (rows[1:] - rows[:-1]).abs().mean(1, dtype=torch.float32)
    size = rows[:-1].abs().mean(1, dtype=torch.float32)
    return torch.cat((moved.new_full((1,), float("inf")), moved / size))


class Seen(Protocol):
    """What a signal can be taken from, at one denoising step."""

    def head(self) -> tuple[Tensor, Tensor] | None:
        """Hidden states that go into the first block and come out of the head, each `[B, T, C]`; None if lost."""

    def modulated_input(self) -> Tensor:
        """What the attention of the first block takes, `[B, T, C]`."""


class Signal(ABC):
    """Takes the tensor whose change decides.

    Attributes:
        from_previous_step: Whether its change is measured from the step before, and not from the last computed step.
    """

    from_previous_step: ClassVar[bool] = False

    @abstractmethod
    def take(self, seen: Seen) -> Tensor | None:
        """Takes the signal of one step.

        Args:
            seen: What there is to be taken from.

        Returns:
            A new tensor, which is kept until the next one; None where there is none at this step.
        """


@final
@dataclass(frozen=True)
class HeadResidual(Signal):
    """What the first blocks added to the hidden states: the signal of DBCache and of first-block caching."""

    def take(self, seen: Seen) -> Tensor | None:
        """Returns after - before."""
        head = seen.head()
        return None if head is None else head[1] - head[0]


@final
@dataclass(frozen=True)
class ModulatedInput(Signal):
    """The input of the first attention, normalised and modulated by the timestep: a signal of TeaCache.

    Source: TeaCache, https://arxiv.org/abs/2411.19108.
    """

    from_previous_step: ClassVar[bool] = True

    def take(self, seen: Seen) -> Tensor | None:
        """Returns the modulated input."""
        return seen.modulated_input()


@final
@dataclass(frozen=True)
class TimeEmbedding:
    """The embedding of the timestep, the other signal of TeaCache.

    It depends on the timesteps alone, so that all its changes are known before the first step.

    Source: TeaCache, https://arxiv.org/abs/2411.19108.

    Attributes:
        embed: Embeds timesteps as the transformer does: (transformer, timesteps `[S]`, dtype of the hidden states) to
            `[S, C]`.
    """

    embed: Callable[[nn.Module, Tensor, torch.dtype], Tensor]

    def changes(self, transformer: nn.Module, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the change at each step of a run, `[S]`, the first one infinity."""
        with torch.no_grad():
            return relative_l1_steps(self.embed(transformer, timesteps, dtype))
