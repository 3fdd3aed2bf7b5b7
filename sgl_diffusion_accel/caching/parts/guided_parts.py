"""How what a scheduler is given is put together of the parts of one batch, found by least squares.

Guidance in one batch computes u and c, and maybe more, side by side, and goes along u + g(c - u). In which order they
lie there, and what g is, only the pipeline knows. But it shows: of the parts and the result the weights follow.
"""

from __future__ import annotations

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


def parts_of(tensors: Tensors, target: Tensor, fewest: int = 2) -> Tensor | None:
    """The parts of an output's batch that a target may be combined from, one after the other in the batch.

    Args:
        tensors: The output.
        target: What the scheduler is given, `[B, …]`.
        fewest: Parts that it must have.

    Returns:
        `[k, B, N]` in float32, of k parts; None where the target is not of such a form. Of outputs with
        twice as many channels, which tell a variance as well, they are the first half.
    """
    samples = samples_of(tensors)
    if samples is None or not len(target) or samples.device != target.device:
        return None
    parts, rest = divmod(len(samples), len(target))
    width, wide = target.numel() // len(target), samples.shape[1]
    if rest or not fewest <= parts <= _MOST_PARTS or not width or wide not in (width, 2 * width):
        return None
    return samples[:, :width].float().reshape(parts, len(target), width)


def combined_sums(target: Tensor, given: Tensor, errors: Tensor, computed: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of the error and of the size of what the parts of a batch are combined to.

    For each sample the weights a are those with which Σ a·given comes closest to the target, whatever they are: of
    guidance with the unconditional part first or last, of its rescaling by norms, of its negative. Nothing is read from
    the device.

    Args:
        target: What the scheduler was given, `[B, …]`.
        given: The parts that the pipeline got, `[k, B, N]`.
        errors: What was predicted wrongly of them, `[k, B, N]`.
        computed: What was computed, `[k, B, N]`; other than what was given where that was corrected.

    Returns:
        ‖Σ a·error‖² and ‖Σ a·computed‖², `[2]`; and whether the target was made of the parts, a tensor of one bool.
    """
    left = target.detach().flatten(1).float()
    size = left.square().sum()
    sums = torch.zeros_like(torch.stack([left, left]))
    done: list[tuple[Tensor, Tensor]] = []
    # Gram and Schmidt: no system of equations that is singular where the parts are alike. They mostly are nearly so;
    # their differences are exact, and what tells them apart.
    for part in range(len(given)):
        together = torch.stack([given[part], errors[part], computed[part]])
        if part:
            together -= torch.stack([given[0], errors[0], computed[0]])
        for direction, squares in done:
            together -= _along(together[0], direction[0], squares) * direction
        squares = together[0].square().sum(1, keepdim=True).clamp_min(_NOTHING)
        weight = _along(left, together[0], squares)
        left = left - weight * together[0]
        sums += weight * together[1:]
        done.append((together, squares))
    return sums.square().sum((1, 2)), left.square().sum() <= _UNEXPLAINED * size


def _along(vectors: Tensor, direction: Tensor, squares: Tensor) -> Tensor:
    return (vectors * direction).sum(1, keepdim=True) / squares
