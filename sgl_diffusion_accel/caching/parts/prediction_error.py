"""How far predictions were from what was computed, over the branches of a step as guidance combines them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sgl_diffusion_accel.caching.parts.output_tensors import Tensors
from sgl_diffusion_accel.caching.parts.signals import Reduce

GUIDED = ("cond", "uncond")
IN_ONE_BATCH = {"cond_uncond": False, "uncond+cond": False, "cond+uncond": True}
"""Names of calls that hold both branches, and whether the conditional half comes first. The first name is diffusers'
own, which says nothing of the order; its pipelines put the unconditional half first."""

_Pair = tuple[Tensor, Tensor]  # what was predicted wrongly, and what was computed


class PredictionError:
    """The relative error ‖predicted - computed‖ / ‖computed‖ of a denoising step.

    With guidance g the pipeline goes along u + g(c - u), so that is what is compared where both branches are known.
    Sums stay on the device until they are asked for.

    Args:
        ends_alike: Whether of branches with unlike numbers of tokens, `[B, T, C]`, the last ones are what guidance
            combines: where a model returns the text in front of the picture (Ideogram 4), and only one branch has it.
    """

    def __init__(self, ends_alike: bool = False) -> None:
        self._ends_alike = ends_alike
        self._waiting: tuple[float, list[_Pair]] | None = None
        self._sums: list[Tensor] = []

    def nbytes(self) -> int:
        """Bytes of the errors of a branch that waits for the other; what was computed is kept by others."""
        return sum(error.numel() * error.element_size() for error, _ in (self._waiting or (0, []))[1])

    def add(self, branch: str, predicted: Tensors, computed: Tensors, guidance: float | None) -> None:
        """Takes one branch of a step.

        Args:
            branch: Its name.
            predicted: What was predicted.
            computed: What was computed, of the same shapes. Kept until the other branch comes, and not written to.
            guidance: The scale with which the pipeline combines the branches, None where it is not known.
        """
        pairs = [(one - other, other) for one, other in zip(predicted, computed, strict=True)]
        if guidance is None or guidance <= 1:
            self._sum(pairs)
        elif branch in GUIDED:
            # u + g(c - u) = g·c + (1 - g)·u: so either branch may come first.
            self._meet(guidance if branch == "cond" else 1 - guidance, pairs)
        elif branch in IN_ONE_BATCH:
            # c + (1 - g)(u - c) is the same as u + g(c - u), from the other end.
            towards = 1 - guidance if IN_ONE_BATCH[branch] else guidance
            halves = [[each.chunk(2) for each in pair] for pair in pairs]
            is_even = all(len(error) == 2 and error[0].shape == error[1].shape for error, _ in halves)
            self._sum([(_mix(a, towards), _mix(b, towards)) for a, b in halves] if is_even else pairs)
        else:
            self._sum(pairs)

    def combine(self, sums: Tensor, is_right: Tensor) -> None:
        """Replaces the error of the step so far by that of what its one call was combined to.

        Args:
            sums: Squares of the error and of the size, `[2]`.
            is_right: Whether it was; a tensor of one bool. Else all remains.
        """
        self._end_waiting()
        alone = torch.stack([each.to(sums.device) for each in self._sums]).sum(0)
        self._sums = [torch.where(is_right, sums, alone)]

    def _end_waiting(self) -> None:
        if self._waiting is not None:  # the other branch does not come
            (_, alone), self._waiting = self._waiting, None
            self._sum(alone)

    def _meet(self, factor: float, pairs: list[_Pair]) -> None:
        if self._waiting is None:
            self._waiting = (factor, pairs)
            return
        (other, waiting), self._waiting = self._waiting, None
        if self._ends_alike:
            waiting, pairs = _shared_ends(waiting, pairs)
        if [error.shape for error, _ in waiting] != [error.shape for error, _ in pairs]:
            self._sum(waiting + pairs)  # prompts of two lengths in one stream with the picture
            return
        for (a, b), (c, d) in zip(waiting, pairs, strict=True):
            self._sum([(a.float() * other + c.float() * factor, b.float() * other + d.float() * factor)])

    def _sum(self, pairs: Sequence[_Pair]) -> None:
        for pair in pairs:
            self._sums.append(torch.stack([_norm(each) for each in pair]).square())

    def take(self, reduce: Reduce | None = None) -> float | None:
        """The error of the step that is over; None if none was measured. Waits for the device, once.

        Args:
            reduce: Adds up over devices, where each sees only a part.
        """
        return self.take_with(None, reduce)[0]

    def take_with(self, others: Tensor | None, reduce: Reduce | None = None) -> tuple[float | None, list[float]]:
        """The same, and other numbers of the step, for which the device is then not waited for again.

        Args:
            others: `[n]`; None for none.
            reduce: As for `take`.

        Returns:
            The error and the other numbers.
        """
        self._end_waiting()
        found: list[Tensor] = []
        measured = bool(self._sums)
        if measured:
            sums = torch.stack([each.to(self._sums[0].device) for each in self._sums]).sum(0).detach()
            self._sums.clear()
            if reduce is not None:
                reduce(sums)
            found.append(sums)
        if others is not None:
            found.append(others.detach().to(found[0].device if found else others.device))
        numbers = torch.cat(found).tolist() if found else []
        if not measured:
            return None, numbers
        error, size, *rest = numbers
        return float("inf") if size == 0 else (error / size) ** 0.5, rest

    def forget(self) -> None:
        """Lets go of what was measured."""
        self._waiting = None
        self._sums.clear()


def _shared_ends(ones: list[_Pair], others: list[_Pair]) -> tuple[list[_Pair], list[_Pair]]:
    """Both without the tokens at the beginning that the other one lacks, where nothing else tells them apart."""
    found = [_ends(one, other) for one, other in zip(ones, others, strict=False)]
    return ([one for one, _ in found], [other for _, other in found]) if len(ones) == len(others) else (ones, others)


def _ends(one: _Pair, other: _Pair) -> tuple[_Pair, _Pair]:
    mine, its = one[0].shape, other[0].shape
    if not len(mine) == len(its) == 3 or (mine[0], mine[2]) != (its[0], its[2]):
        return one, other
    tokens = min(mine[1], its[1])
    return (one[0][:, -tokens:], one[1][:, -tokens:]), (other[0][:, -tokens:], other[1][:, -tokens:])


def _norm(tensor: Tensor) -> Tensor:
    # In half precision the sum of squares overflows.
    exact = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=exact)
    return norm.float()


def _mix(halves: Sequence[Tensor], guidance: float) -> Tensor:
    return torch.lerp(halves[0].float(), halves[1].float(), guidance)
