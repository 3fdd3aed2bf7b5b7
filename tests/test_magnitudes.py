"""Magnitude ratios as data: what is allowed, which branch and step gets which, and joining recordings."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from sgl_diffusion_accel import ConfigError, ConfigTypeError, MagnitudeRatios
from sgl_diffusion_accel.caching.magcache.magnitudes import nearest

RATIOS = MagnitudeRatios(
    {"transformer": {"cond": [None, 1.25, 0.5, None], "uncond": [None, 0.75, None, None]}},
    {"transformer": {"cond": 0.125, "uncond": 0.0}},
    calls=3,
)


def one(values: list[float | None], **fields: Any) -> MagnitudeRatios:
    return MagnitudeRatios({"transformer": {"cond": values}}, **fields)


def test_ratios_of_a_branch_that_was_not_recorded_are_the_mean_of_those_known() -> None:
    assert RATIOS.of("transformer", "cond") == (None, 1.25, 0.5, None)
    assert RATIOS.of("transformer", "third") == (None, 1.0, 0.5, None)
    assert RATIOS.steps == 4


def test_transformer_that_was_not_recorded_is_refused_with_what_to_type() -> None:
    with pytest.raises(ConfigError, match=r"for 'transformer_2', only for 'transformer'\..*calibrate\(pipe, calls\)"):
        RATIOS.of("transformer_2", "cond")


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"ratios": [1.0, 1.0]}, ConfigTypeError, "ratios is a list; allowed: a dict of dicts"),
        ({"ratios": {"transformer": [1.0]}}, ConfigTypeError, "allowed: a dict of dicts"),
        ({"ratios": {}}, ConfigError, "no branch"),
        ({"ratios": {"transformer": {}}}, ConfigError, "no branch"),
        ({"ratios": {"transformer": {"cond": "1.0"}}}, ConfigTypeError, "ratios has a str"),
        ({"ratios": {"transformer": {"cond": ["1.0"]}}}, ConfigTypeError, "ratios has '1.0', a str"),
        ({"ratios": {"transformer": {"cond": [True]}}}, ConfigTypeError, "ratios has True"),
        ({"ratios": {"transformer": {"cond": [None, None]}}}, ConfigError, "no ratio of the 2 steps is known"),
        ({"ratios": {"transformer": {"cond": []}}}, ConfigError, "no ratio of the 0 steps"),
        ({"ratios": {"transformer": {"cond": [None, -1.0]}}}, ConfigError, r"ratios has -1.0; allowed: finite"),
        ({"ratios": {"transformer": {"cond": [float("nan")]}}}, ConfigError, "ratios has nan"),
        ({"ratios": {"transformer": {"cond": [float("inf")]}}}, ConfigError, "ratios has inf"),
        ({"ratios": {"transformer": {"cond": [1.0], "uncond": [1.0, 1.0]}}}, ConfigError, "branches of 1 and 2 steps"),
        ({"spread": {"transformer": {"uncond": 0.1}}}, ConfigError, "spread has other branches"),
        ({"spread": {"transformer": {"cond": -0.1}}}, ConfigError, "spread has -0.1"),
        ({"calls": 0}, ConfigError, "calls=0"),
        ({"calls": 1.5}, ConfigTypeError, "calls=1.5"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], error: type[Exception], match: str) -> None:
    given: dict[str, Any] = {"ratios": {"transformer": {"cond": [None, 1.0]}}, **fields}
    with pytest.raises(error, match=match):
        MagnitudeRatios(**given)


def test_ratios_cannot_be_changed_and_are_equal_by_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RATIOS.calls = 1  # type: ignore[misc]
    with pytest.raises(TypeError, match="never changed"):
        RATIOS.ratios["transformer"]["cond"] = ()  # type: ignore[index]
    for other in (copy.deepcopy(RATIOS), pickle.loads(pickle.dumps(RATIOS)), dataclasses.replace(RATIOS)):
        assert other == RATIOS
        assert hash(other) == hash(RATIOS)
    assert one([None, 1.0]) != one([None, 1.5])


def test_merging_is_like_recording_all_calls_at_once() -> None:
    recorded = np.random.default_rng(0).normal(1, 0.1, (6, 5))
    parts = [one([None, *row]) for row in recorded.tolist()]
    merged = parts[0].merge(parts[1]).merge(parts[2].merge(*parts[3:]))
    assert merged.calls == 6
    np.testing.assert_allclose(merged.of("transformer", "cond")[1:], recorded.mean(0), rtol=1e-12)  # type: ignore[arg-type]
    spread = np.sqrt(recorded.var(0).mean())
    assert merged.spread["transformer"]["cond"] == pytest.approx(spread, rel=1e-9)
    assert merged.noise == pytest.approx(spread / np.abs(recorded.mean(0) - 1).mean(), rel=1e-9)
    assert RATIOS.merge() == RATIOS


def test_branch_that_only_some_calls_have_is_the_mean_of_these() -> None:
    merged = one([None, 1.5]).merge(MagnitudeRatios({"transformer": {"uncond": [None, 0.5]}}, calls=4))
    assert merged.of("transformer", "cond") == (None, 1.5)
    assert merged.of("transformer", "uncond") == (None, 0.5)
    assert merged.calls == 5


def test_ratios_of_different_runs_are_not_merged() -> None:
    with pytest.raises(ConfigError, match="of 2 and 3 steps cannot be merged"):
        one([None, 1.0]).merge(one([None, 1.0, 1.0]))


def test_noise_of_steady_ratios_is_none() -> None:
    assert one([None, 1.0, 1.0]).noise == 0
    assert one([None, 1.0], spread={"transformer": {"cond": 0.1}}).noise == float("inf")


@pytest.mark.parametrize("total", [1, 2, 5, 9, 10, 17, 50])
def test_other_step_counts_take_the_nearest_step_as_in_diffusers(total: int) -> None:
    module = pytest.importorskip("diffusers.hooks.mag_cache", reason="this diffusers has no MagCache")
    values = [1.0 + 0.01 * step for step in range(10)]
    expected = values if total == 10 else module.nearest_interp(torch.tensor(values).double(), total).tolist()
    if total == 1:
        expected = values[:1]  # of a single step nothing is skipped
    assert nearest(tuple(values), total) == pytest.approx(tuple(expected))


def test_unknown_steps_take_the_nearest_known_one() -> None:
    """The second of two experts, in a run of as many steps and in a longer one."""
    ratios = (None, None, None, 1.1, 1.2, None)
    assert nearest(ratios, 6) == (1.1, 1.1, 1.1, 1.1, 1.2, 1.2)
    assert nearest(ratios, 12) == (*[1.1] * 8, *[1.2] * 4)
