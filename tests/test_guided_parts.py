"""What a scheduler is given shows how the parts of a batch are combined, and so how their errors are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgl_diffusion_accel.caching.parts.guided_parts import (
    combined_squares,
    number_of_samples,
    parts_of,
    samples_of,
    weights_of,
)

SCALE = 4.0


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alike(seed: int, parts: int = 2, batch: int = 2, by: float = 0.3) -> Tensor:
    """Parts that resemble each other as branches of guidance do, `[k, B, N]`."""
    return values(seed, 1, batch, 300) + by * values(seed + 1, parts, batch, 300)


def error_and_fit(target: Tensor, given: Tensor, errors: Tensor, computed: Tensor | None = None) -> tuple[float, bool]:
    weights, fits = weights_of(target, list(given.float()))
    assert {weight.shape for weight in weights} == {(len(target), 1)}
    found = given if computed is None else computed
    wrong, size = (float(combined_squares(weights, list(each.float()))) for each in (errors, found))
    return (wrong / size) ** 0.5, bool(fits)


def relative(error: Tensor, whole: Tensor) -> float:
    return float(error.norm() / whole.norm())


def guide(parts: Tensor) -> Tensor:
    return parts[0] + SCALE * (parts[1] - parts[0])


def rescaled(parts: Tensor) -> Tensor:
    """To the norm of the conditional part, sample by sample."""
    guided = guide(parts)
    return guided * parts[1].norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)


WAYS = {
    "uncond first": (2, guide),
    "cond first": (2, lambda parts: guide(parts.flip(0))),
    "negated": (2, lambda parts: -guide(parts)),
    "from cond": (2, lambda parts: parts[1] + SCALE * (parts[1] - parts[0])),
    "one part alone": (2, lambda parts: parts[1]),
    "three parts": (3, lambda parts: guide(parts) + 2 * (parts[1] - parts[2])),
    "four parts": (4, lambda parts: guide(parts) + 2 * (parts[1] - parts[2]) + parts[3]),
}


@pytest.mark.parametrize("way", WAYS)
def test_error_is_that_of_the_combination(way: str) -> None:
    count, combine = WAYS[way]
    parts, errors = alike(0, count), 0.1 * values(7, count, 2, 300)
    error, fits = error_and_fit(combine(parts), parts, errors)
    assert fits
    assert error == pytest.approx(relative(combine(errors), combine(parts)), rel=1e-4)


def test_samples_that_are_rescaled_each_by_itself() -> None:
    parts, errors = alike(0), 0.1 * values(7, 2, 2, 300)
    scales = rescaled(parts).norm(dim=1, keepdim=True) / guide(parts).norm(dim=1, keepdim=True)
    error, fits = error_and_fit(rescaled(parts), parts, errors)
    assert fits
    assert error == pytest.approx(relative(scales * guide(errors), rescaled(parts)), rel=1e-4)


def test_rescaling_of_each_token_is_near() -> None:
    parts, errors = alike(0).reshape(2, 2, 15, 20), 0.1 * values(7, 2, 2, 15, 20)
    guided = guide(parts)
    scales = parts[1].norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    error, fits = error_and_fit(scales * guided, parts.flatten(2), errors.flatten(2))
    assert fits
    assert error == pytest.approx(relative(scales * guide(errors), scales * guided), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_does_not_matter(dtype: torch.dtype) -> None:
    parts = alike(0).to(dtype)
    target, errors = guide(parts), 0.1 * values(7, 2, 2, 300)
    assert target.dtype == dtype
    error, fits = error_and_fit(target, parts, errors)
    assert fits
    assert error == pytest.approx(relative(guide(errors), guide(parts.double())), rel=1e-2)


@pytest.mark.parametrize("by", [0.0, 1e-9, 1e-3])
def test_parts_that_are_equal_or_nearly(by: float) -> None:
    """An empty prompt for both. What is wrong is then nearly the same in both as well."""
    parts, errors = alike(0, by=by), 0.1 * alike(7, by=by)
    error, fits = error_and_fit(guide(parts), parts, errors)
    assert fits
    assert error == pytest.approx(relative(guide(errors), guide(parts)), rel=2e-3)


def test_errors_of_what_was_computed_count_by_the_weights_of_what_was_given() -> None:
    given, computed, errors = alike(0), alike(20), 0.1 * values(7, 2, 2, 300)
    error, fits = error_and_fit(guide(given), given, errors, computed)
    assert fits
    assert error == pytest.approx(relative(guide(errors), guide(computed)), rel=1e-4)


@pytest.mark.parametrize("target", [values(99, 2, 300), torch.full((2, 300), float("nan"))], ids=["other", "nan"])
def test_what_is_not_made_of_the_parts_is_told(target: Tensor) -> None:
    assert not error_and_fit(target, alike(0), alike(3))[1]


def test_samples_are_rows_of_a_tensor_or_tensors_of_a_list() -> None:
    assert torch.equal(samples_of((torch.arange(12.0).reshape(2, 3, 2),)), torch.arange(12.0).reshape(2, 6))
    assert torch.equal(samples_of((torch.zeros(2, 3), torch.ones(2, 3))), torch.arange(2.0)[:, None].expand(2, 6))
    for odd in ((torch.zeros(2), torch.zeros(3)), (torch.zeros(4),), ()):
        assert samples_of(odd) is None
        assert number_of_samples(odd) == 0


@pytest.mark.parametrize(
    ("output", "target", "parts"),
    [
        ([4, 3, 5, 5], [2, 3, 5, 5], 2),
        ([6, 3, 5, 5], [2, 3, 5, 5], 3),
        ([8, 7, 3], [2, 7, 3], 4),
        ([4, 6, 5, 5], [2, 3, 5, 5], 2),
        ([2, 3, 5, 5], [2, 3, 5, 5], None),
        ([3, 3, 5, 5], [2, 3, 5, 5], None),
        ([5, 3, 5, 5], [1, 3, 5, 5], None),
        ([4, 3, 5, 5], [2, 3, 4, 4], None),
        ([4, 3, 5, 5], [0, 3, 5, 5], None),
        ([4, 0], [2, 0], None),
    ],
)
def test_number_of_parts(output: list[int], target: list[int], parts: int | None) -> None:
    found = parts_of((torch.zeros(output),), torch.zeros(target))
    assert (None if found is None else len(found)) == parts


def test_learned_variance_is_left_out_and_parts_follow_one_another() -> None:
    output = values(0, 4, 6, 5, 5)
    found = parts_of((output,), torch.zeros(2, 3, 5, 5))
    assert torch.equal(torch.cat(found), output[:, :3].float().reshape(4, 75))
    of_list = parts_of(tuple(output[:, :3].unsqueeze(2)), torch.zeros(2, 3, 5, 5))
    assert torch.equal(torch.cat(of_list), torch.cat(found))
