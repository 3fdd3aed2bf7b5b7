"""Stands for a mask that hides nothing, where a processor makes a mask of its own of whatever it is given.

HunyuanVideo 1.5's processor pads the text's mask to the whole sequence, repeats it to `[B, 1, N, N]`, and joins it with
its transpose, in each layer. The stand-in goes the same way, and at its end gives None: attention without a mask.
"""

from __future__ import annotations

from typing import Any


class HidesNothing:
    """Goes through the making of a mask, and makes none."""

    shape = (1, 0)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> HidesNothing:
        """PyTorch's functions of it, such as `torch.nn.functional.pad`, give it back."""
        mask: HidesNothing = args[0]
        return mask

    def bool(self) -> HidesNothing:
        """Itself: it is one already."""
        return self

    def view(self, *_: int) -> HidesNothing:
        """Itself, in any shape."""
        return self

    repeat = transpose = view

    def __and__(self, other: HidesNothing) -> _JoinedMask:
        return _JoinedMask()


class _JoinedMask:
    """What is left of the stand-in once rows and columns are joined, which ends the making of a mask."""

    def bool(self) -> None:
        """No mask."""
