"""The front door of MagCache: what it refuses, the steps that it computes, and what it says."""

from __future__ import annotations

import logging
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from invariants import Snapshot, assert_same, families
from invariants.families import present
from sgl_diffusion_accel import (
    CachePatch,
    ConfigError,
    ConfigTypeError,
    MagnitudeRatios,
    UnsupportedModelError,
    apply_magcache,
    calibrate,
)
from sgl_diffusion_accel.caching.run_log import few_steps_remark
from zoo import Family

STEPS = 20
RISING = [1.0, *(1.0 + 0.004 * step for step in range(1, STEPS))]
"""Errors that grow, so that ever fewer steps are skipped."""


def marks(patch: CachePatch, branch: str = "cond") -> str:
    """The last run's steps of a branch: # computed, . skipped."""
    return "".join("#" if computed else "." for computed in patch.stats.runs[-1].branches[branch].computed)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "plan itself": ({"magnitude_ratios": object()}, ConfigTypeError, r"is a object; allowed: plan\.magnitude_ratios"),
    "text": ({"magnitude_ratios": "1.0"}, ConfigTypeError, "magnitude_ratios is a str"),
    "one number": ({"magnitude_ratios": 1.0}, ConfigTypeError, "magnitude_ratios is a float"),
    "no numbers": ({"magnitude_ratios": []}, ConfigError, "has 0 numbers; allowed: one for each denoising step"),
    "numbers as text": ({"magnitude_ratios": ["1", "1"]}, ConfigTypeError, "ratios has '1', a str"),
    "negative number": ({"magnitude_ratios": [1.0, -1.0]}, ConfigError, "ratios has -1.0"),
    "ratios of another model": (
        {"magnitude_ratios": MagnitudeRatios({"transformer_2": {"cond": [None, 1.0]}})},
        ConfigError,
        r"no magnitude ratios for 'transformer', only for 'transformer_2'",
    ),
    "negative threshold": (
        {"threshold": -0.1},
        ConfigError,
        r"threshold=-0\.1; allowed: a finite number from 0 \(0 ne",
    ),
    "infinite threshold": ({"threshold": float("inf")}, ConfigError, "threshold=inf"),
    "threshold nan": ({"threshold": float("nan")}, ConfigError, "threshold=nan"),
    "threshold of text": ({"threshold": "2x"}, ConfigTypeError, "threshold='2x' is a str"),
    "negative limit": ({"max_skip_steps": -1}, ConfigError, "max_skip_steps=-1; allowed: a whole number from 0"),
    "limit of a fraction": ({"max_skip_steps": 1.5}, ConfigTypeError, "max_skip_steps=1.5"),
    "retention above 1": (
        {"retention_ratio": 10},
        ConfigError,
        "retention_ratio=10; allowed: a finite number from 0 to",
    ),
    "negative order": ({"taylorseer_order": -1}, ConfigError, "taylorseer_order=-1"),
}


@pytest.mark.parametrize(("settings", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refusal_says_what_is_allowed_and_leaves_everything_as_it_was(
    settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    pipe = present("flux").make()
    before = Snapshot(pipe)
    with pytest.raises(error, match=match):
        apply_magcache(pipe, **{"magnitude_ratios": RISING, **settings})
    assert_same(before, pipe)


def test_model_without_blocks_and_cache_of_diffusers_are_refused() -> None:
    with pytest.raises((UnsupportedModelError, ConfigTypeError)):
        apply_magcache(torch.nn.Linear(2, 2), RISING)
    if hasattr(diffusers, "MagCacheConfig"):
        pipe = present("flux").make()
        pipe.transformer.enable_cache(diffusers.MagCacheConfig(mag_ratios=torch.ones(6), num_inference_steps=6))
        with pytest.raises(UnsupportedModelError, match="disable_cache"):
            apply_magcache(pipe, RISING)


@families("wan", "flux")
@pytest.mark.parametrize(("threshold", "most", "retention"), [(0.05, 3, 0.2), (0.3, 2, 0.1), (0.2, 9, 0.33)])
def test_steps_are_those_of_diffusers(family: Family, threshold: float, most: int, retention: float) -> None:
    """But for the last one, which is always computed here."""
    if not hasattr(diffusers, "MagCacheConfig"):
        pytest.skip("this diffusers has no MagCache")
    pipe = family.make()
    config = diffusers.MagCacheConfig(threshold, most, retention, STEPS, list(RISING))
    ran: list[int] = []
    pipe.transformer.enable_cache(config)
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    block = getattr(pipe.transformer, family.block_lists[0])[1]
    inner = next(part for name, part in block.named_children() if "attn" in name)
    inner.register_forward_hook(lambda *_: ran.append(len(calls) - 1))
    family.run(pipe, steps=STEPS)
    pipe.transformer.disable_cache()
    every = len(family.branches)
    theirs = "".join("#" if every * step in ran else "." for step in range(STEPS))
    patch = apply_magcache(pipe, RISING, threshold=threshold, max_skip_steps=most, retention_ratio=retention)
    family.run(pipe, steps=STEPS)
    assert "." in theirs
    assert marks(patch) == theirs[:-1] + "#"
    assert len({marks(patch, branch) for branch in family.branches}) == 1


def test_ratios_of_the_default_recording_are_applied_to_each_branch() -> None:
    family = present("wan")
    pipe = family.make()
    ratios = MagnitudeRatios({"transformer": {"cond": [None, *[1.01] * 9], "uncond": [None, *[1.2] * 9]}})
    patch = apply_magcache(pipe, ratios, threshold=0.1, max_skip_steps=9)
    family.run(pipe, steps=10)
    assert marks(patch, "cond") == "##...#...#"
    assert marks(patch, "uncond") == "##########"


def test_branch_that_was_not_recorded_takes_the_mean_of_those_known() -> None:
    family = present("wan")
    pipe = family.make()
    patch = apply_magcache(pipe, MagnitudeRatios({"transformer": {"other": [1.0] * 10}}), max_skip_steps=2)
    family.run(pipe, steps=10)
    assert marks(patch, "cond") == marks(patch, "uncond") == "##..#..#.#"


@families("wan", "wan22", "flux", matrix=["hunyuan", "sana"])
def test_recorded_ratios_can_be_applied(family: Family) -> None:
    pipe = family.make()
    plan = calibrate(pipe, [family.call(pipe, steps=STEPS, seed=3)], teacache=False)
    expected = family.run(pipe, steps=STEPS)
    patch = apply_magcache(pipe, plan.magnitude_ratios, threshold=0.2, taylorseer_order=1)
    output = family.run(pipe, steps=STEPS)
    assert 0.2 < patch.stats.runs[-1].compute_share < 0.9
    assert not torch.equal(output, expected)
    torch.testing.assert_close(output, expected, rtol=0, atol=0.5 * float(expected.abs().max()))
    assert not patch.stats.runs[-1].remarks
    patch.remove()
    assert torch.equal(family.run(pipe, steps=STEPS), expected)


@pytest.mark.parametrize("given", [RISING, tuple(RISING), torch.tensor(RISING).double(), np.array(RISING)], ids=type)
def test_plain_numbers_do_as_well(given: Any) -> None:
    family = present("flux")
    pipe = family.make()
    same = MagnitudeRatios({"transformer": {"cond": [None, *RISING[1:]]}})
    found = []
    for ratios in (given, same):
        patch = apply_magcache(pipe, ratios, threshold=0.1)
        family.run(pipe, steps=STEPS)
        found.append(marks(patch))
    assert found[0] == found[1]
    assert "." in found[0]


def test_first_of_plain_numbers_is_not_used() -> None:
    family = present("flux")
    pipe = family.make()
    patch = apply_magcache(pipe, [9.0, *[1.0] * 4], max_skip_steps=1, retention_ratio=0.0)
    family.run(pipe, steps=12)  # step 1 is nearest to the first number
    assert marks(patch) == "#.#.#.#.#.##"


def test_transformer_is_taken_where_a_pipeline_is() -> None:
    family = present("wan")
    pipe = family.make()
    plan = calibrate(pipe, [family.call(pipe, steps=10)], teacache=False)
    patch = apply_magcache(pipe.transformer, plan.magnitude_ratios, threshold=1.0)
    family.run(pipe, steps=10)
    assert marks(patch) == "##...#...#"


def test_run_of_another_length_is_remarked_on(caplog: pytest.LogCaptureFixture) -> None:
    family = present("flux")
    pipe = family.make()
    patch = apply_magcache(pipe, RISING, threshold=0.5)
    with caplog.at_level(logging.WARNING):
        family.run(pipe, steps=STEPS)
        assert not patch.stats.runs[-1].remarks
        family.run(pipe, steps=8)
    (component, remark), (_, few), *others = patch.stats.runs[-1].remarks
    assert component == "transformer"
    assert "those of 20 steps, and this run has 8" in remark
    assert few == few_steps_remark(8)
    assert not others
    assert remark in str(patch)
    assert remark in caplog.text


def test_summary_tells_the_settings() -> None:
    pipe = present("flux").make()
    text = str(apply_magcache(pipe, RISING, threshold=0.12, max_skip_steps=5, retention_ratio=0.1, taylorseer_order=1))
    assert (
        "MagCache (ratios of 20 steps, threshold 0.12, at most 5 steps in a row, retention 10%, TaylorSeer order 1)"
        in text
    )
    assert "reuse" in str(apply_magcache(pipe, RISING))


def test_reasons_are_told() -> None:
    family = present("flux")
    pipe = family.make()
    patch = apply_magcache(pipe, [1.0, *[1.1] * 9], threshold=0.25, max_skip_steps=9)
    family.run(pipe, steps=10)
    reasons = patch.stats.runs[-1].branches["cond"].reasons
    assert reasons[:4] == (
        "nothing to reuse",
        "retention step",
        "accumulated error below threshold",
        "accumulated error of magnitude",
    )
    assert reasons[-1] == "last step"
