"""How far cond and uncond are apart, and so how much guidance still has to say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sgl_diffusion_accel.caching.parts.output_tensors import Tensors
from sgl_diffusion_accel.caching.parts.prediction_error import GUIDED, IN_ONE_BATCH


class BranchDistance:
    """The distance ‖c - u‖ / ‖c‖ between what the branches of a step say.

    Sums stay on the device until they are asked for. Without guidance, with a branch alone, or where the two are of
    unlike shapes there is no distance.
    """

    def __init__(self) -> None:
        self._waiting: tuple[str, Tensors] | None = None
        self._squares: list[Tensor] = []

    def add(self, branch: str, computed: Tensors, guidance: float | None) -> None:
        """Takes one branch of a step, or both in one batch.

        Args:
            branch: Its name.
            computed: What was computed. Kept until the other branch comes, and not written to.
            guidance: The scale with which the pipeline combines the branches, None where it is not known.
        """
        if guidance is None or guidance <= 1:
            return
        if branch in IN_ONE_BATCH:
            halves = [each.chunk(2) for each in computed]
            if all(len(each) == 2 for each in halves):
                cond = 0 if IN_ONE_BATCH[branch] else 1
                self._measure([each[cond] for each in halves], [each[1 - cond] for each in halves])
        elif branch not in GUIDED:
            return
        elif self._waiting is None or self._waiting[0] == branch:
            self._waiting = (branch, computed)
        else:
            (_, other), self._waiting = self._waiting, None
            self._measure(*((computed, other) if branch == "cond" else (other, computed)))

    def _measure(self, cond: Sequence[Tensor], uncond: Sequence[Tensor]) -> None:
        if [each.shape for each in cond] != [each.shape for each in uncond]:
            return
        for one, other in zip(cond, uncond, strict=True):
            given = one.float()
            self._squares.append(torch.stack([(given - other.float()).square().sum(), given.square().sum()]))

    def meet(self, parts: Sequence[Tensor], weights: Sequence[Tensor], is_right: Tensor) -> None:
        """Takes the parts of a batch that turned out to hold several; see `guided_parts`.

        Args:
            parts: `[B, N]` each, in any order.
            weights: With which they were combined, `[B, 1]` each.
            is_right: Whether they were; a tensor of one bool. Else all remains as it was.
        """
        if len(parts) != 2:
            return
        one, other = (part.float() for part in parts)
        is_cond = weights[0].abs() >= weights[1].abs()  # g against 1 - g
        size = torch.where(is_cond, one, other).square().sum()
        found = torch.stack([(one - other).square().sum(), size])
        before = torch.stack(self._squares).sum(0) if self._squares else torch.full_like(found, torch.nan)
        self._squares = [torch.where(is_right, found, before.to(found.device))]

    def squares(self) -> Tensor | None:
        """‖c - u‖² and ‖c‖² at the step that is over, `[2]` on the device; None where there is no distance."""
        squares, self._squares, self._waiting = self._squares, [], None
        return torch.stack([each.to(squares[0].device) for each in squares]).sum(0) if squares else None


def distance_of(squares: Sequence[float]) -> float | None:
    """The distance by its squares as they were read; None where they tell none."""
    if len(squares) != 2 or not squares[1]:
        return None
    distance = float((squares[0] / squares[1]) ** 0.5)
    return distance if math.isfinite(distance) else None
