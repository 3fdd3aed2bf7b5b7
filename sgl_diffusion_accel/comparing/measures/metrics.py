"""How near pictures, clips or latents are to a reference. All of it on floats: uint8 is divided by 255 first.

Each function takes two tensors `[B, F, C, H, W]` of one shape and goes through them frame by frame, so that a long clip
needs no more memory than itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

EXACT_DB = 100.0
"""What an equal output counts as, in dB, in a mean with outputs that are not equal."""

_WINDOW = 11


def frames_of(values: Tensor, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """The frames `[C, H, W]` of all samples, one by one, as floats; uint8 becomes 0 … 1."""
    for frame in values.flatten(0, 1):
        yield frame.to(dtype) / 255 if frame.dtype == torch.uint8 else frame.to(dtype)


def psnr(values: Tensor, reference: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB, `10 log10(peak² / MSE)`, over all samples, frames and pixels.

    Args:
        values: `[B, F, C, H, W]`.
        reference: Of the same shape.
        peak: Range of the data: 1 for pixels, for latents the reference's own.

    Returns:
        Infinity for equal tensors, NaN where there is a NaN.

    Example:
        >>> round(psnr(torch.full((1, 1, 3, 8, 8), 0.1), torch.zeros(1, 1, 3, 8, 8)), 3)
        20.0
    """
    pairs = zip(frames_of(values), frames_of(reference), strict=True)
    error = sum(float((one - other).square().sum()) for one, other in pairs) / reference.numel()
    if math.isnan(error):
        return math.nan
    if error == 0:
        return math.inf
    return 10 * math.log10(peak**2 / error) if 0 < peak < math.inf and error < math.inf else -math.inf


def mean_psnr(values: Sequence[float]) -> float:
    """Mean of several PSNR in dB.

    Infinite if all are. Else an equal output counts as 100 dB, and so does all above: a mean of infinity would hide
    the others. NaN if one is.

    Example:
        >>> mean_psnr([math.inf, 40.0])
        70.0
    """
    if all(value == math.inf for value in values):
        return math.inf
    if any(math.isnan(value) for value in values):
        return math.nan
    return math.fsum(min(value, EXACT_DB) for value in values) / len(values)


def psnr_at(curve: Sequence[tuple[float, float]], share: float, near: float = 0.0) -> float | None:
    """PSNR of fewer steps at a cost, on the line between the two measured next to it.

    Args:
        curve: (share of the cost of an unpatched run, PSNR in dB) of each number of steps that was measured, ascending.
        share: The cost asked for.
        near: Beyond the measured ones, the nearest is taken if its share is off by no more than this.

    Returns:
        None where nothing was measured.

    Example:
        >>> psnr_at([(0.2, 30.0), (0.4, 40.0)], 0.3)
        35.0
    """
    for (low, worse), (high, better) in itertools.pairwise(curve):
        if low <= share <= high:
            return better if low == high else worse + (better - worse) * (share - low) / (high - low)
    distances = [(abs(cost - share), quality) for cost, quality in curve if abs(cost - share) <= near]
    return min(distances)[1] if distances else None


def why_no_ssim(reference: Tensor) -> str | None:
    """Why there is no SSIM for such tensors here, None if there is."""
    if find_spec("torchmetrics") is None:
        return "no SSIM: it needs torchmetrics. Type: pip install 'sgl-diffusion-accel[compare]'"
    if min(reference.shape[-2:]) <= _WINDOW // 2:
        return f"no SSIM: frames of {reference.shape[-2]}×{reference.shape[-1]} are too small for its window"
    return None


def ssim(values: Tensor, reference: Tensor, peak: float = 1.0) -> float:
    """Structural similarity in [-1, 1], the mean over all frames; 1 for equal ones.

    Gaussian window of 11 pixels, sigma 1.5, by torchmetrics.

    Args:
        values: `[B, F, C, H, W]`.
        reference: Of the same shape.
        peak: Range of the data.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = []
    pairs = zip(frames_of(values, torch.float32), frames_of(reference, torch.float32), strict=True)
    for one, other in pairs:
        if torch.equal(one, other):
            found.append(1.0)
            continue
        similarity = structural_similarity_index_measure(one[None], other[None], data_range=peak)
        found.append(float(similarity if isinstance(similarity, Tensor) else similarity[0]))
    return math.fsum(found) / len(found)


def sharpness(values: Tensor, reference: Tensor) -> float:
    """Root mean square of the differences between neighbouring pixels, over that of the reference.

    1: as sharp; less: softer; more: noise or ringing. The square, since blurring an edge leaves the sum of its
    differences as it is.

    Args:
        values: `[B, F, C, H, W]`.
        reference: Of the same shape.
    """
    return _ratio(math.sqrt(_gradient_energy(values)), math.sqrt(_gradient_energy(reference)))


def motion(values: Tensor, reference: Tensor) -> float | None:
    """Temporal difference: mean |frame - frame before|, over that of the reference.

    1: as much motion; 0: a frozen clip; more than 1: flicker.

    Args:
        values: `[B, F, C, H, W]`.
        reference: Of the same shape.

    Returns:
        None for pictures.
    """
    if reference.shape[1] < 2:
        return None
    return _ratio(_change(values), _change(reference))


def non_finite(values: Tensor) -> float:
    """Share of the values that are NaN or infinite."""
    bad = 0 if values.dtype == torch.uint8 else int((~torch.isfinite(values)).sum())
    return bad / values.numel()


def _gradient_energy(values: Tensor) -> float:
    total = 0.0
    for frame in frames_of(values):
        total += float(frame.diff(dim=-1).square().sum() + frame.diff(dim=-2).square().sum())
    return total


def _change(values: Tensor) -> float:
    total = 0.0
    for clip in values:
        before = None
        for frame in frames_of(clip[None]):
            total += 0.0 if before is None else float((frame - before).abs().sum())
            before = frame
    return total


def _ratio(value: float, reference: float) -> float:
    if reference == 0:
        return 1.0 if value == 0 else math.nan if math.isnan(value) else math.inf
    return value / reference
