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
    # A mean of large values in half precision would overflow.
    moved, size = (now - reference).abs().mean(dtype=torch.float32), reference.abs().mean(dtype=torch.float32)
    if reduce is None:
        return float(moved.div(size).detach())
    # Over the devices first, and divided then: the mean of ratios is not the ratio of means. One all-reduce for both.
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
    """What a signal can be taken from, at one transformer call."""

    @property
    def reference(self) -> Tensor | None:
        """The signal that was kept of an earlier step of the branch, None where there is none."""

    @property
    def reduce(self) -> Reduce | None:
        """Averages over the devices that share the tokens, None where this one sees all of them."""

    def taken(self) -> Tensor | None:
        """The signal of this call, taken once."""

    def head(self) -> tuple[Tensor, Tensor] | None:
        """Hidden states that go into the first block and come out of the head, each `[B, T, C]`; None if lost."""

    def modulated_input(self) -> Tensor:
        """What the attention of the first block takes, `[B, T, C]`."""

    def queue_schedule(self, changes: Changes) -> None:
        """Queues the changes at all steps of the run on the device, once for all branches."""

    def of_schedule(self, changes: Changes) -> float:
        """The change at this step of those; infinity at the branch's first one."""


Changes = Callable[[nn.Module, Tensor, torch.dtype], Tensor]
"""The changes at each step: (transformer, timesteps `[S]`, dtype of the hidden states) to `[S]`, the first infinity."""


class Signal(ABC):
    """The tensor whose change tells how much the model's work has changed.

    Attributes:
        name: What it is, in a few words.
        from_previous_step: Whether its change is measured from the step before, and not from the last computed step.
        needs_head: Whether it looks at what the head, the first blocks that always run, is given and returns.
        needs_attention: Whether it looks into the first block, which must have an attention.
    """

    name: ClassVar[str] = "signal"
    from_previous_step: ClassVar[bool] = False
    needs_head: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    def begin(self, seen: Seen) -> None:  # noqa: B027  (most signals begin with their first value)
        """Prepares what is known beforehand, in front of the first block of a branch's first step."""

    @abstractmethod
    def take(self, seen: Seen) -> Tensor | None:
        """Takes the signal of one step.

        Args:
            seen: What there is to be taken from.

        Returns:
            A new tensor, which is kept until the next one; None where there is none at this step.
        """

    def change(self, seen: Seen) -> float:
        """The relative change of the signal; infinity where there is nothing to compare with."""
        now, reference = seen.taken(), seen.reference
        if now is None or reference is None:
            return float("inf")
        return relative_l1(now, reference, seen.reduce)


@final
@dataclass(frozen=True)
class HeadResidual(Signal):
    """What the first blocks added to the hidden states: the signal of DBCache and of first-block caching."""

    name: ClassVar[str] = "head residual"
    needs_head: ClassVar[bool] = True

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

    name: ClassVar[str] = "modulated input"
    from_previous_step: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = True

    def take(self, seen: Seen) -> Tensor | None:
        """Returns the modulated input."""
        return seen.modulated_input()


@final
@dataclass(frozen=True)
class TimeEmbedding(Signal):
    """The embedding of the timestep, the other signal of TeaCache.

    It depends on the timesteps alone, so that all its changes are known before the first step: they are queued on the
    device then, and read at the second step without waiting for it.

    Source: TeaCache, https://arxiv.org/abs/2411.19108.

    Attributes:
        embed: Embeds timesteps as the transformer does: (transformer, timesteps `[S]`, dtype of the hidden states) to
            `[S, C]`.
    """

    name: ClassVar[str] = "time embedding"

    embed: Callable[[nn.Module, Tensor, torch.dtype], Tensor]

    def changes(self, transformer: nn.Module, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the change at each step of a run, `[S]`, the first one infinity."""
        with torch.no_grad():
            return relative_l1_steps(self.embed(transformer, timesteps, dtype))

    def begin(self, seen: Seen) -> None:
        """Queues the changes on the device, before the first step."""
        seen.queue_schedule(self.changes)

    def take(self, seen: Seen) -> Tensor | None:  # noqa: ARG002
        """Nothing: no tensor is kept."""
        return None

    def change(self, seen: Seen) -> float:
        """The change at this step of the run."""
        return seen.of_schedule(self.changes)
