"""How models tell which of their tokens count: read from the device once, as a table of true and false on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Valid:
    """What was read.

    Attributes:
        tokens: Which tokens count, `[B, L]`, bool, on the host.
        is_plain: Whether the mask hides nothing but the tokens that do not count; False where it also keeps tokens
            apart that count, as segments of a packed sequence do.
    """

    tokens: Tensor
    is_plain: bool = True


class Mark(Protocol):
    """One way of telling.

    Attributes:
        is_cut: Whether it has an element for each token, and is no token itself: it is cut with them.
    """

    is_cut: bool

    def ask(self, given: Tensor) -> Tensor:
        """The few numbers to be read, on the device. No sync happens here."""

    def read(self, told: Tensor, length: int) -> Valid | str:
        """What they say.

        Args:
            told: The numbers, on the host, float32, in the shape that `ask` gave.
            length: Tokens of the sequence, `L`.

        Returns:
            Which tokens count, or why that cannot be known.
        """


class ByMask:
    """A mask `[B, L]` of ones and zeros, or of true and false."""

    is_cut = True

    def ask(self, given: Tensor) -> Tensor:
        """See `Mark`."""
        return given

    def read(self, told: Tensor, length: int) -> Valid | str:
        """See `Mark`."""
        if told.ndim != 2 or told.shape[1] != length:
            return f"its mask has shape {tuple(told.shape)}, and [B, {length}] is understood"
        tokens = told == 1
        if not torch.equal(tokens, told != 0):
            return "its mask has other values than 0 and 1"
        return Valid(tokens)


class ByLengths:
    """How many tokens of each sample count, `[B]`: the first ones."""

    is_cut = False

    def ask(self, given: Tensor) -> Tensor:
        """See `Mark`."""
        return given

    def read(self, told: Tensor, length: int) -> Valid | str:
        """See `Mark`."""
        if told.ndim != 1:
            return f"its lengths have shape {tuple(told.shape)}, and [B] is understood"
        return Valid(torch.arange(length)[None] < told[:, None])


class BySegments:
    """The segment of each token, `[B, L]`: tokens see those of their own segment; a negative one is padding."""

    is_cut = True

    def ask(self, given: Tensor) -> Tensor:
        """See `Mark`."""
        return given

    def read(self, told: Tensor, length: int) -> Valid | str:
        """See `Mark`."""
        if told.ndim != 2 or told.shape[1] != length:
            return f"its segments have shape {tuple(told.shape)}, and [B, {length}] is understood"
        tokens = told >= 0
        first = torch.where(tokens, told, torch.inf).amin(1, keepdim=True)
        return Valid(tokens, bool(((told == first) | ~tokens).all()))


class ByZeros:
    """The tokens themselves, `[B, L, C]`, of which none counts if all are zero, as the model decides it."""

    is_cut = False

    def ask(self, given: Tensor) -> Tensor:
        """See `Mark`."""
        return (given != 0).any().expand(given.shape[0], 1)

    def read(self, told: Tensor, length: int) -> Valid | str:
        """See `Mark`."""
        return Valid((told == 1).expand(told.shape[0], length))
