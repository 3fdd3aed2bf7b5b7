"""Whether a plan says rightly that it has seen enough calls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from invariants.families import few_blocks, present
from sgl_diffusion_accel import CachePlan, ConfigError, ConfigTypeError, calibrate
from sgl_diffusion_accel.calibration.designs.design import Moments
from sgl_diffusion_accel.calibration.plan_checks import ENOUGH, held_out_ratio
from sgl_diffusion_accel.loop.scheduler_response import euler
from test_plan import made

STEPS = 20


def moments(bend: float, steps: int = STEPS, seed: int = 0) -> Moments:
    """Of outputs that turn quickest at the place `bend` of the run, 0 to 1."""
    random, times = np.random.default_rng(seed), np.linspace(0, 1, steps)
    directions = random.standard_normal((3, 200))
    outputs = np.stack([np.ones(steps), times, np.tanh((times - bend) * 20)], 1) @ directions
    return Moments(outputs @ outputs.T / 200, euler(np.linspace(1, 0, steps + 1).tolist()))


def mean(*parts: Moments) -> Moments:
    return Moments(np.mean([part.gram for part in parts], axis=0), parts[0].response)


def test_a_call_like_the_others_teaches_nothing() -> None:
    assert held_out_ratio(moments(0.3), moments(0.3), moments(0.3)) == 1.0


def test_a_call_unlike_the_others_teaches_much() -> None:
    ratio = held_out_ratio(moments(0.2), mean(moments(0.2), moments(0.8)), moments(0.8))
    assert ratio is not None
    assert ratio > ENOUGH


@pytest.mark.parametrize("steps", [3, 101])
def test_runs_too_short_or_too_long_to_tell(steps: int) -> None:
    given = moments(0.5, steps)
    assert held_out_ratio(given, given, given) is None


def test_calibration_holds_the_last_call_against_those_before(tmp_path: Path) -> None:
    family = present("flux")
    calls = [family.call(None, steps=12, seed=seed) for seed in range(3)]
    path = tmp_path / "plan.json"
    plan = calibrate(few_blocks(family), calls, path, teacache=False)
    before = calibrate(few_blocks(family), calls[:2], teacache=False)
    last = calibrate(few_blocks(family), calls[2:], teacache=False)
    expected = held_out_ratio(before.moments, plan.moments, last.moments)
    assert expected is not None
    assert plan.held_out == pytest.approx(expected)
    assert CachePlan.load(path) == plan
    assert last.held_out is None


def test_the_same_call_twice_says_that_more_would_change_little() -> None:
    family = present("flux")
    calls = [family.call(None, steps=12), family.call(None, steps=12)]
    assert calibrate(few_blocks(family), calls, teacache=False, growth=False).held_out == pytest.approx(1.0)
    plan = calibrate(few_blocks(family), calls, teacache=False)
    assert plan.held_out == pytest.approx(1.0, abs=0.1), "but for the second disturbance, at another place"
    assert "more calls would change little" in str(plan)


def test_printed_plan_says_that_more_calls_would_help() -> None:
    told = str(made(held_out=2.34))
    assert "without the last call its error would be 2.3 times as large: more calls would help" in told
    assert "last call" not in str(made())


def test_files_of_before_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    made(held_out=1.5).save(path)
    content = json.loads(path.read_text())
    assert content.pop("held_out") == 1.5
    path.write_text(json.dumps(content))
    assert CachePlan.load(path).held_out is None


def test_merged_plan_does_not_know() -> None:
    assert made(held_out=1.5).merge(made(held_out=1.5)).held_out is None
    assert made(held_out=1.5).merge().held_out == 1.5


@pytest.mark.parametrize(("value", "error"), [(0.0, ConfigError), (float("nan"), ConfigError), ("1", ConfigTypeError)])
def test_ratio_that_cannot_be(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="held_out"):
        made(held_out=value)
