"""Caches of one's own: a policy, a predictor, a signal from outside of the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from invariants.snapshot import Snapshot, assert_same
from sgl_diffusion_accel import (
    ConfigError,
    ConfigTypeError,
    Decision,
    HeadResidual,
    Policy,
    Position,
    Predictor,
    Tally,
    Taylor,
    apply_block_cache,
    apply_cache_dit,
    remove,
)
from zoo import FAMILIES

STEPS = 8


class Laid(Policy):
    """Computes the steps of a mask, and writes down what it is asked."""

    def __init__(self, mask: str = "xx.x.x.x") -> None:
        self.mask = mask
        self.asked: list[tuple[int, int]] = []

    def decide(self, position: Position, tally: Tally, change: Any) -> Decision:
        self.asked.append((position.step, tally.consecutive))
        return Decision(self.mask[position.step] == "x", "laid down")


class Line(Predictor):
    """The line through the last two."""

    @property
    def depth(self) -> int:
        return 2

    def weights(self, times: Sequence[float], target: float) -> tuple[float, ...]:
        if len(times) == 1:
            return (1.0,)
        slope = (target - times[0]) / (times[0] - times[1])
        return (1 + slope, -slope)


def run(pipe: Any, family: str = "wan") -> torch.Tensor:
    output: torch.Tensor = FAMILIES[family].run(pipe, steps=STEPS)
    return output


def test_steps_are_those_of_the_policy_and_undo_is_exact() -> None:
    pipe = FAMILIES["wan"].make()
    expected, before = run(pipe), Snapshot(pipe)
    policy = Laid()
    with apply_block_cache(pipe, policy) as patch:
        made = run(pipe)
    assert {branch.computed for branch in patch.stats.runs[-1].branches.values()} == {
        tuple(each == "x" for each in policy.mask)
    }
    assert [step for step, _ in policy.asked[::2]] == list(range(1, STEPS)), "at the first step nothing could stand in"
    assert not torch.equal(made, expected)
    assert torch.equal(run(pipe), expected)
    assert_same(before, pipe)


def test_mask_of_ones_changes_no_bit() -> None:
    pipe = FAMILIES["wan"].make()
    expected = run(pipe)
    apply_block_cache(pipe, Laid("x" * STEPS))
    assert torch.equal(run(pipe), expected)


def test_own_predictor_stands_in_as_one_of_the_package_does() -> None:
    pipe = FAMILIES["wan"].make()
    outputs = []
    for predictor in (Line(), Taylor(1)):
        with apply_block_cache(pipe, Laid(), predictor=predictor):
            outputs.append(run(pipe))
    assert torch.allclose(*outputs, rtol=1e-5, atol=1e-6)
    with apply_block_cache(pipe, Laid()):
        assert not torch.allclose(run(pipe), outputs[0], rtol=1e-5, atol=1e-6), "without one the last is reused"


class Quiet(Policy):
    """DBCache's rule, without its limits."""

    @property
    def needs_signal(self) -> bool:
        return True

    def decide(self, position: Position, tally: Tally, change: Any) -> Decision:
        moved = change()
        return Decision(not moved < 0.05, "quiet", moved)


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_policy_with_a_signal_is_dbcache_with_the_same_rule(family: str) -> None:
    pipe = FAMILIES[family].make()
    outputs, maps = [], []
    for apply in (
        lambda: apply_block_cache(pipe, Quiet()),
        lambda: apply_cache_dit(
            pipe, residual_diff_threshold=0.05, max_warmup_steps=0, max_continuous_cached_steps=None
        ),
    ):
        with apply() as patch:
            outputs.append(run(pipe, family))
            maps.append({name: branch.changes for name, branch in patch.stats.runs[-1].branches.items()})
    assert torch.equal(*outputs)
    assert maps[0] == maps[1]
    assert any(change is not None for changes in maps[0].values() for change in changes)


class Remembering(Laid):
    """Made for each run; learns from the errors of its predictions."""

    is_shared = True
    needs_error = True

    def __init__(self) -> None:
        super().__init__("xxxx.xxx")
        self.errors: dict[int, float] = {}
        self.restarts: list[int] = []

    def observe(self, step: int, error: float) -> None:
        self.errors[step] = error

    def restart(self, position: Position) -> None:
        self.restarts.append(position.step)


def test_function_makes_one_policy_a_run_that_learns_from_its_errors() -> None:
    pipe = FAMILIES["wan"].make()
    made: list[tuple[int, str, Remembering]] = []

    def policy(run: Any, branch: str) -> Remembering:
        made.append((run.total, branch, Remembering()))
        return made[-1][2]

    with apply_block_cache(pipe, policy, predictor=Taylor(1)):
        for _ in range(2):
            run(pipe)
    assert [(total, branch) for total, branch, _ in made] == [(STEPS, "cond")] * 2, "one for both branches of a run"
    for _, _, each in made:
        assert set(each.errors) == {2, 3, 5, 6}, "two computed steps make a line; the last step is followed by none"
        assert all(0 < error < 10 for error in each.errors.values())
        assert each.restarts == [0, 0], "the first step of each branch"


def test_function_makes_a_policy_for_each_branch_unless_it_is_shared() -> None:
    pipe = FAMILIES["wan"].make()
    made: list[str] = []

    def policy(run: Any, branch: str) -> Laid:
        made.append(branch)
        return Laid("x.x.x.xx" if branch == "cond" else "xxxx...x")

    with apply_block_cache(pipe, policy) as patch:
        run(pipe)
    assert made == ["cond", "uncond"]
    branches = patch.stats.runs[-1].branches
    assert branches["cond"].computed != branches["uncond"].computed


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"policy": Laid}, ConfigTypeError, "policy is the class Laid; allowed: a Policy, or a function"),
        ({"policy": 3}, ConfigTypeError, "policy is a int; allowed: a Policy"),
        ({"predictor": Taylor}, ConfigTypeError, "predictor is a .*; allowed: a Predictor, such as"),
        ({"signal": 0.1}, ConfigTypeError, "signal is a float; allowed: a Signal"),
        ({"spacing": "sigmas"}, ConfigError, "unknown spacing 'sigmas'.* Did you mean 'sigma'"),
        ({"bn_compute_blocks": -1}, ConfigError, "bn_compute_blocks=-1; allowed: a whole number from 0"),
        ({"fn_compute_blocks": 99}, ConfigError, "blocks"),
        ({"signal": HeadResidual(), "fn_compute_blocks": 0}, ConfigError, "Type: fn_compute_blocks=1"),
        ({"predicto": None}, ConfigError, "unknown argument 'predicto' in apply_block_cache. Did you mean 'predictor'"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(given: dict[str, Any], error: type, words: str) -> None:
    pipe = FAMILIES["wan"].make()
    before = Snapshot(pipe)
    with pytest.raises(error, match=words):
        apply_block_cache(pipe, **{"policy": Laid(), **given})
    assert_same(before, pipe)


def test_policy_that_asks_for_a_signal_and_gets_none_is_told_so() -> None:
    pipe = FAMILIES["wan"].make()
    expected = run(pipe)
    apply_block_cache(pipe, lambda run, branch: Quiet())
    with pytest.raises(ConfigError, match=r"Quiet asks for the change of a signal.*signal=HeadResidual\(\)"):
        run(pipe)
    remove(pipe)
    assert torch.equal(run(pipe), expected)


def test_patch_tells_what_it_is() -> None:
    patch = apply_block_cache(FAMILIES["wan"].make(), policy := Laid(), predictor=Taylor(2))
    assert repr(patch) == "<block cache (Laid, F0B0, Taylor(order=2)) on transformer; active>"
    assert patch.config is policy
