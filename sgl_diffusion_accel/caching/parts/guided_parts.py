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


def may_hold_parts(output: Tensors) -> bool:
    """Whether the batch of an output is large enough for two parts."""
    return number_of_samples(output) >= 2


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


def weights_of(target: Tensor, parts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The weights with which the parts of a batch come closest to what the scheduler was given, sample by sample.

    Whatever they are: those of guidance with the unconditional part first or last, of its rescaling by norms, of its
    negative. Nothing is read from the device.

    Args:
        target: What the scheduler was given, `[B, …]`.
        parts: The parts that the pipeline got, at least one, `[B, N]` each.

    Returns:
        The weights, one `[B, 1]` a part; and whether the target was made of the parts, a tensor of one bool.
    """
    target = left = target.detach().flatten(1).float()
    directions: list[tuple[Tensor, Tensor]] = []
    shares: list[list[Tensor]] = []
    weights: list[Tensor] = []
    # Gram and Schmidt: no system of equations that is singular where the parts are alike. They mostly are nearly so;
    # their differences are exact, and what tells them apart.
    for index, part in enumerate(parts):
        mine = part if index == 0 else part - parts[0]
        shares.append([])
        for direction, squares in directions:
            shares[-1].append(_dot(mine, direction) / squares)
            mine = torch.addcmul(mine, shares[-1][-1], direction, value=-1)
        squares = _dot(mine, mine).clamp_min(_NOTHING)
        weights.append(_dot(left, mine) / squares)
        left = torch.addcmul(left, weights[-1], mine, value=-1)
        directions.append((mine, squares))
    fits = left.square().sum() <= _UNEXPLAINED * target.square().sum()
    # From the directions back to the differences, and to the parts themselves.
    for later in reversed(range(len(parts))):
        for earlier, share in enumerate(shares[later]):
            weights[earlier] = weights[earlier] - share * weights[later]
    weights[0] = weights[0] - sum(weights[1:])
    return weights, fits


def combined_squares(weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """‖Σ a·part‖² over all samples, a number on the device.

    Args:
        weights: `[B, 1]` each.
        parts: As many, `[B, N]` each; where they are fewer, the others are zero.
    """
    # Residuals of a model that is spread over devices may lie elsewhere than what comes out of it.
    total = weights[0].to(parts[0].device) * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=False):
        total = torch.addcmul(total, weight.to(part.device), part.to(total.dtype))
    return total.square().sum()


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Sample by sample, `[B, 1]`."""
    return (one * other).sum(1, keepdim=True)
