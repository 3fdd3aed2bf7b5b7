"""The first three residuals of a run under a threshold make no slope; elsewhere they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import miniatures
from invariants import chosen, transformer_outputs
from invariants.families import present
from sgl_diffusion_accel import apply_cache_dit
from sgl_diffusion_accel.comparing.measures.metrics import psnr

STEPS = 14


def outputs(order: int, **knobs: Any) -> tuple[list[torch.Tensor], tuple[bool, ...]]:
    """What the transformer returned at each step, and which were computed."""
    family = present("flux")
    pipe = family.make()
    patch = apply_cache_dit(pipe, taylorseer_order=order, **knobs)
    found = transformer_outputs(family, pipe, steps=STEPS)
    return found, patch.stats.runs[-1].branches["cond"].computed


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> int:
    """How many outputs are bitwise the same before the first that is not."""
    return next((i for i, pair in enumerate(zip(one, other, strict=True)) if not torch.equal(*pair)), len(one))


def threshold(warmup: int) -> dict[str, Any]:
    return {"residual_diff_threshold": 10.0, "max_warmup_steps": warmup, "max_continuous_cached_steps": 2}


@pytest.mark.parametrize(
    ("warmup", "order", "first"),  # and the first step at which it is more than the order below
    [(1, 1, 4), (2, 1, 5), (3, 1, 6), (4, 1, 4), (6, 1, 6), (3, 2, 9), (4, 2, 7), (5, 2, 5), (6, 2, 6)],
)
def test_order_of_the_first_predictions_under_a_threshold(warmup: int, order: int, first: int) -> None:
    """The first slope is that of the residuals of steps 2 and 3, or of the first computed after it."""
    higher, mask = outputs(order, **threshold(warmup))
    lower, same_mask = outputs(order - 1, **threshold(warmup))
    assert mask == same_mask
    assert same(higher, lower) == first
    assert not mask[first]


@pytest.mark.parametrize("policy", ["static", "dynamic"])
def test_masks_of_cache_dit_settle_as_well_and_own_ones_do_not(policy: str) -> None:
    knobs: dict[str, Any] = {"steps_policy": policy, "residual_diff_threshold": 10.0, "max_warmup_steps": 1}
    given = [1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1]
    assert same(outputs(1, steps_mask=given, **knobs)[0], outputs(0, steps_mask=given, **knobs)[0]) == 6
    own = outputs(1, steps_mask="late-fast", **knobs)
    assert own[1][:4] == (True, True, True, False)
    assert same(own[0], outputs(0, steps_mask="late-fast", **knobs)[0]) == 3


def test_gap_control_takes_the_first_slope_it_can_compare() -> None:
    _, mask = outputs(1, tolerance=0.5, max_warmup_steps=1, fn_compute_blocks=0)
    assert mask[:4] == (True, True, True, False)


@pytest.mark.parametrize("model", chosen(["wan", "qwen", "flux"], "flux"))
def test_short_warm_up_loses_nothing_by_an_early_slope(model: str) -> None:
    """On a trained model the first gap after three steps is better reused than followed by a slope."""
    pipe = miniatures.load_miniature(model)
    call = miniatures.call_kwargs(model, miniatures.captions(model, 1, 77)[0], seed=1000, steps=30)

    def frames() -> torch.Tensor:
        with torch.no_grad():
            return torch.from_numpy(miniatures.to_frames(model, pipe(**call))).movedim(-1, 2)

    expected = frames()
    found = {}
    for order in (0, 1):
        knobs = {"max_warmup_steps": 3, "residual_diff_threshold": 0.16, "max_continuous_cached_steps": 3}
        with apply_cache_dit(pipe, taylorseer_order=order, **knobs) as patch:
            found[order] = psnr(frames(), expected)
        assert patch.stats.runs[-1].compute_share < 0.7
    assert found[1] > found[0] - 0.5
