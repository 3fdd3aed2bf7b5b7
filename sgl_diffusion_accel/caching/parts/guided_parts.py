"""How what a scheduler is given is put together of the parts of one batch, found by least squares.

Guidance in one batch computes u and c, and maybe more, side by side, and goes along u + g(c - u). In which order they
lie there, and what g is, only the pipeline knows. But it shows: of the parts and the result the weights follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sgl_diffusion_accel.caching.parts.output_tensors import Tensors

_MOST_PARTS = 4
_UNEXPLAINED = 0.1
"""Share of the squares of what the scheduler is given that no weights of the parts need explain. Rounding leaves 1e-5
in half precision, a rescaling token by token some hundredths; parts that it was not made of leave nearly all."""

_NOTHING = 1e-30  # keeps 0 / 0 from being NaN where the parts are equal


def samples_of(tensors: Tensors) -> Tensor | None:
    """The samples of an output, `[n, N]`: of a tensor `[n, …]`, or of as many like tensors; None for other outputs."""
    if len(tensors) == 1:
        return tensors[0].flatten(1) if tensors[0].ndim > 1 else None
    is_list = len({tensor.shape for tensor in tensors}) == 1
    return torch.stack(tensors).flatten(1) if is_list else None


def number_of_samples(tensors: Tensors) -> int:
    """How many rows `samples_of` has, without making them; 0 for None."""
    if len(tensors) == 1:
        return len(tensors[0]) if tensors[0].ndim > 1 else 0
    return len(tensors) if len({tensor.shape for tensor in tensors}) == 1 else 0


def parts_of(tensors: Tensors, target: Tensor, fewest: int = 2) -> Tensors | None:
    """The parts of an output's batch that a target may be combined from, one after the other in the batch.

    Args:
        tensors: The output.
        target: What the scheduler is given, `[B, …]`.
        fewest: Parts that it must have.

    Returns:
        The parts, `[B, N]` each in float32; None where the target is not of such a form. Of outputs with twice as many
        channels, which tell a variance as well, they are the first half.
    """
    samples = samples_of(tensors)
    if samples is None or not len(target) or samples.device != target.device:
        return None
    parts, rest = divmod(len(samples), len(target))
    width, wide = target.numel() // len(target), samples.shape[1]
    if rest or not fewest <= parts <= _MOST_PARTS or not width or wide not in (width, 2 * width):
        return None
    return samples[:, :width].float().chunk(parts)


def combined_sums(
    target: Tensor, given: Sequence[Tensor], errors: Sequence[Tensor], computed: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Squares of the error and of the size of what the parts of a batch are combined to.

    For each sample the weights a are those with which Σ a·given comes closest to the target, whatever they are: of
    guidance with the unconditional part first or last, of its rescaling by norms, of its negative. Nothing is read from
    the device.

    Args:
        target: What the scheduler was given, `[B, …]`.
        given: The parts that the pipeline got, at least one, `[B, N]` each.
        errors: What was predicted wrongly of them, the same.
        computed: What was computed, the same; None for what was given.

    Returns:
        ‖Σ a·error‖² and ‖Σ a·computed‖², `[2]`; and whether the target was made of the parts, a tensor of one bool.
    """
    target = target.detach().flatten(1).float()
    left, done = target, list[tuple[list[Tensor], Tensor]]()
    parts = [list(each) for each in zip(given, errors, *([] if computed is None else [computed]), strict=True)]
    sums = [torch.zeros_like(target) for _ in parts[0][1:]]
    # Gram and Schmidt: no system of equations that is singular where the parts are alike. They mostly are nearly so;
    # their differences are exact, and what tells them apart. Errors take part as their parts do.
    for index, part in enumerate(parts):
        mine = part if index == 0 else [each - first for each, first in zip(part, parts[0], strict=True)]
        for others, squares in done:
            share = _dot(mine[0], others[0]) / squares
            mine = [torch.addcmul(each, share, other, value=-1) for each, other in zip(mine, others, strict=True)]
        squares = _dot(mine[0], mine[0]).clamp_min(_NOTHING)
        weight = _dot(left, mine[0]) / squares
        done.append((mine, squares))
        left = torch.addcmul(left, weight, mine[0], value=-1)
        sums = [torch.addcmul(total, weight, each) for total, each in zip(sums, mine[1:], strict=True)]
    wrong, *found = sums
    sizes = torch.stack([each.square().sum() for each in (wrong, *(found or [target - left]), left, target)])
    return sizes[:2], sizes[2] <= _UNEXPLAINED * sizes[3]


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Sample by sample, `[B, 1]`."""
    return (one * other).sum(1, keepdim=True)
