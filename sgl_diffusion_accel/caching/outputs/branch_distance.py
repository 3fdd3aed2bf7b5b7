"""How far cond and uncond are apart, and so how much guidance still has to say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sgl_diffusion_accel.caching.parts.output_tensors import Tensors

_GUIDED = ("cond", "uncond")


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
        if branch not in _GUIDED:  # both in one batch, the unconditional half first
            halves = [each.chunk(2) for each in computed]
            if all(len(each) == 2 for each in halves):
                self._measure([each[1] for each in halves], [each[0] for each in halves])
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

    def take(self) -> float | None:
        """The distance at the step that is over; None where there was none."""
        squares, self._squares, self._waiting = self._squares, [], None
        if not squares:
            return None
        apart, size = torch.stack([each.to(squares[0].device) for each in squares]).sum(0).tolist()
        return float((apart / size) ** 0.5) if size else None
