"""Caches that skip steps of a very short run say so; what was asked for is done all the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from invariants.families import present
from sgl_diffusion_accel import (
    CachePatch,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    apply_magcache,
    apply_teacache,
    calibrate,
)
from sgl_diffusion_accel.caching.run_log import FEW, few_steps_remark


def plan(pipe: Any) -> CachePatch:
    family = present("flux")
    learned = calibrate(family.make(), [family.call(pipe, steps=20)], teacache=False, magnitudes=False)
    return apply_cache_plan(pipe, learned, speedup=2.0)


def magcache(pipe: Any) -> CachePatch:
    return apply_magcache(pipe, [1.0] * 4, threshold=1.0, max_skip_steps=1)


CACHES: dict[str, Callable[[Any], CachePatch]] = {
    "plan": plan,
    "magcache": magcache,
    "teacache": lambda pipe: apply_teacache(pipe, 0.5, coefficients=[0, 0, 0, 0, 0], start_skipping=1),
    "threshold": lambda pipe: apply_cache_dit(pipe, residual_diff_threshold=10.0, max_warmup_steps=1),
    "mask": lambda pipe: apply_cache_dit(pipe, fn_compute_blocks=0, steps_mask="ultra", steps_policy="static"),
}


@pytest.mark.parametrize("steps", [4, 6])
@pytest.mark.parametrize("cache", CACHES)
def test_skipped_steps_of_a_short_run_are_told_of(cache: str, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    family = present("flux")
    pipe = family.make()
    patch = CACHES[cache](pipe)
    with caplog.at_level(logging.WARNING, "sgl_diffusion_accel"):
        for _ in range(2):
            family.run(pipe, steps=steps)
    run, remark = patch.stats.runs[-1], few_steps_remark(steps)
    assert remark is not None
    assert run.compute_share < 1, "what was asked for is done"
    assert run.remarks.count(("transformer", remark)) == 1
    assert f"a run of {steps} steps, and some of them are skipped" in str(patch)
    assert [record.getMessage() for record in caplog.records].count(f"transformer: {remark}") == 1


@pytest.mark.parametrize("cache", CACHES)
def test_longer_runs_are_not_remarked_on(cache: str) -> None:
    family = present("flux")
    pipe = family.make()
    patch = CACHES[cache](pipe)
    family.run(pipe, steps=28)
    assert patch.stats.runs[-1].compute_share < 1
    assert "so few have little in common" not in str(patch)
    assert few_steps_remark(FEW) is None
    assert few_steps_remark(FEW - 1) is not None


def test_short_run_that_is_computed_in_full_is_not_remarked_on() -> None:
    family = present("flux")
    pipe = family.make()
    expected = family.run(pipe, steps=4)
    learned = calibrate(pipe, [family.call(pipe, steps=4)], teacache=False, magnitudes=False)
    for apply in (
        apply_adaptive_cache,
        lambda pipe: apply_cache_plan(pipe, learned, speedup=1.0),
        lambda pipe: apply_magcache(pipe, [1.0] * 4, threshold=0.0),
    ):
        patch = apply(pipe)
        assert torch.equal(family.run(pipe, steps=4), expected)
        assert "so few have little in common" not in str(patch)
