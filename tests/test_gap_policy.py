"""Gap control for the block cache, on plain tensors: what it decides, and what forbids it to skip."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sgl_diffusion_accel import StepsMask
from sgl_diffusion_accel.caching.parts.decider import Decider
from sgl_diffusion_accel.caching.parts.gap_control import GapControl, GapSettings
from sgl_diffusion_accel.caching.parts.gap_policy import GapPolicy, ResidualGrowth
from sgl_diffusion_accel.caching.parts.policies import Decision, MaskPolicy, Policy, Position, Tally
from sgl_diffusion_accel.caching.parts.policies import ThresholdPolicy as Limits
from sgl_diffusion_accel.caching.parts.predictors import Predictor, Reuse, Taylor

STEPS = 40
FREE = Limits(math.inf)
Curve = Callable[[float], Any]


def wave(frequency: float) -> Curve:
    return lambda t: [2 + math.sin(frequency * t), math.cos(frequency * t)]


def gaps(tolerance: float = 0.01, limits: Policy = FREE, order: int = 1, steps: int = STEPS, **kw: Any) -> Decider:
    settings = GapSettings(tolerance, warm_up=0, interpolation=1.0, **kw)
    control = GapControl(settings, np.ones(steps), corrects=False, growth=ResidualGrowth(order))
    return Decider(GapPolicy(control, limits))


def never() -> float:
    raise AssertionError("gap control takes no signal")


class Run:
    """A run with one branch whose residual at step s is `curve(s / steps)`."""

    def __init__(self, curve: Curve, policy: Decider, predictor: Predictor | None = None, steps: int = STEPS) -> None:
        self.predictor = predictor or Taylor(1)
        self.policy = policy
        self.residuals = [torch.as_tensor(curve(step / steps), dtype=torch.float64) for step in range(steps)]
        self.nodes: list[int] = []
        self.decisions: list[Decision] = []
        errors = [self.step(step, steps) for step in range(steps)]
        self.error = float(torch.stack(errors).sum(0).norm() / torch.stack(self.residuals).sum(0).norm())

    def step(self, step: int, steps: int) -> Tensor:
        position = Position(step, steps, step)
        if not self.nodes:
            self.policy.restart(position)
        decision = self.policy.decide(position, Tally(), never)
        self.decisions.append(decision)
        made = self.residuals[step]
        if self.nodes:
            guess = self.predicted(step)
            if decision.compute and len(self.nodes) >= min(2, self.predictor.depth):
                self.policy.compare(step, "cond", (guess,), (made,), None, None)
            made = made if decision.compute else guess
        if decision.compute:
            self.nodes = [step, *self.nodes][: self.predictor.depth]
        return made - self.residuals[step]

    def predicted(self, step: int) -> Tensor:
        weights = self.predictor.weights([float(node) for node in self.nodes], float(step))
        return torch.stack([w * self.residuals[node] for w, node in zip(weights, self.nodes, strict=True)]).sum(0)

    @property
    def mask(self) -> list[bool]:
        return [decision.compute for decision in self.decisions]

    @property
    def longest(self) -> int:
        return max(map(len, "".join("x" if each else "." for each in self.mask).split("x")))


@pytest.mark.parametrize(("order", "predictor"), [(0, Reuse()), (1, Taylor(1)), (2, Taylor(2))])
def test_larger_tolerance_computes_fewer_steps_and_errs_more(order: int, predictor: Predictor) -> None:
    tolerances = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    runs = [Run(wave(3), gaps(tolerance, order=order), predictor) for tolerance in tolerances]
    counts = [sum(run.mask) for run in runs]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    assert runs[0].error < runs[-1].error
    for run, tolerance in zip(runs, tolerances, strict=True):
        assert run.error < 10 * tolerance


def test_smoother_residuals_take_fewer_steps() -> None:
    counts = [sum(Run(wave(frequency), gaps()).mask) for frequency in (0.5, 2, 6, 15, 40)]
    assert counts == sorted(counts)
    assert counts[0] <= 10
    assert counts[-1] >= 30


def test_error_that_steers_is_that_of_the_predictor_that_runs() -> None:
    """A straight line is nothing to a line, and much to reuse."""

    def straight(t: float) -> Any:
        return [1 + 5 * t, 2 - t]

    assert sum(Run(straight, gaps(order=1), Taylor(1)).mask) < sum(Run(straight, gaps(order=0), Reuse()).mask)


def test_tolerance_0_computes_every_step_and_compares_nothing() -> None:
    policy = gaps(0.0).policy
    assert not policy.needs_error
    assert not any(policy.may_skip(Position(step, STEPS, step)) for step in range(STEPS))
    assert all(Run(lambda _: [1.0, 1.0], gaps(0.0)).mask)


def test_no_signal_is_taken() -> None:
    assert not gaps().policy.needs_signal
    assert not gaps().policy.may_measure(Position(5, STEPS, 5))


# What else forbids a skip

CALM = wave(0.1)


@pytest.mark.parametrize("warmup", [0, 1, 4, 9])
def test_warm_up_is_computed(warmup: int) -> None:
    mask = Run(CALM, gaps(1.0, Limits(math.inf, max_warmup_steps=warmup))).mask
    assert mask.index(False) == max(warmup, 3), "the third computed step is the first that tells an error"


def test_warm_up_with_an_interval_leaves_steps_between() -> None:
    mask = Run(CALM, gaps(1.0, Limits(math.inf, max_warmup_steps=20, warmup_interval=4))).mask
    assert all(mask[:20:4])
    assert not all(mask[:20])


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_longest_run_of_skipped_steps(limit: int) -> None:
    assert Run(CALM, gaps(1.0, Limits(math.inf, max_continuous=limit))).longest == limit


@pytest.mark.parametrize("limit", [0, 5])
def test_most_skipped_steps(limit: int) -> None:
    assert Run(CALM, gaps(1.0, Limits(math.inf, max_cached=limit))).mask.count(False) == limit


def test_mask_allows_skips_and_forbids_none_it_does_not_name() -> None:
    mask = [1 - step % 2 for step in range(STEPS)]
    run = Run(CALM, gaps(1.0, MaskPolicy(StepsMask.of(mask), FREE)))
    assert all(run.mask[::2])
    assert run.mask.count(False) > 10


def test_step_that_a_limit_computes_is_one_to_predict_from() -> None:
    """Left out of gap control's memory, the gap before it would go on, and end too early."""
    free = Run(CALM, gaps(1.0, longest_gap=4))
    limited = Run(CALM, gaps(1.0, Limits(math.inf, max_continuous=2), longest_gap=4))
    assert free.longest == 4
    assert limited.longest == 2
    assert "longest gap" not in {decision.reason for decision in limited.decisions[5:]}


def test_few_steps_are_all_computed() -> None:
    assert all(Run(CALM, gaps(1.0, steps=9), steps=9).mask)


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_error_that_is_no_number_means_computing(error: float) -> None:
    assert all(Run(lambda t: [error, t], gaps(1.0)).mask)


# Branches of a step, and what follows after a change


def decide(policy: Decider, step: int) -> Decision:
    return policy.decide(Position(step, STEPS, step), Tally(), never)


def observe(policy: Decider, branch: str, error: float) -> None:
    predicted, computed = (torch.tensor([1 + error, 0.0]),), (torch.tensor([1.0, 0.0]),)
    policy.compare(policy.policy._step, branch, predicted, computed, None, None)


def warmed(errors: Sequence[float]) -> Decider:
    """A policy after three computed steps, where the branches have erred so at the last."""
    policy = gaps(0.01)
    policy.restart(Position(0, STEPS, 0))
    for step in (1, 2):
        decide(policy, step)
    for number, error in enumerate(errors):
        observe(policy, f"branch {number}", error)
    return policy


def test_branches_share_the_decision() -> None:
    policy = warmed([1e-6, 1e-6])
    first = decide(policy, 3)
    assert not first.compute
    assert decide(policy, 3) is first
    assert decide(policy, 4).reason == "estimated error within tolerance"


def test_branch_that_comes_later_has_all_computed_until_it_can_be_predicted() -> None:
    policy = warmed([1e-6])
    first = decide(policy, 3)
    policy.restart(Position(3, STEPS, 0))
    assert decide(policy, 3) is first, "the others go on as they began"
    for step in (4, 5):
        assert decide(policy, step).reason == "nothing to predict from"
    observe(policy, "branch 0", 1e-6)
    observe(policy, "branch 1", 1e-6)
    assert not decide(policy, 6).compute


def test_error_at_the_step_where_a_branch_comes_is_of_no_use() -> None:
    policy = warmed([1e-6])
    policy.restart(Position(3, STEPS, 3))
    observe(policy, "branch 0", 1e-6)
    assert decide(policy, 4).reason == "nothing to predict from"


def test_second_branch_of_the_first_step_takes_nothing_back() -> None:
    policy = gaps()
    for _ in range(2):
        policy.restart(Position(0, STEPS, 0))
        assert decide(policy, 0) == Decision(True, "nothing to reuse")


def test_one_branch_that_errs_is_enough_to_compute() -> None:
    assert not decide(warmed([1e-6, 1e-6]), 3).compute
    assert decide(warmed([1e-6, 10.0]), 3).compute
    assert decide(warmed([10.0, 1e-6]), 3).compute


def test_change_of_shape_starts_anew() -> None:
    policy = warmed([1e-6])
    assert not decide(policy, 3).compute
    policy.restart(Position(4, STEPS, 4))
    assert decide(policy, 4) == Decision(True, "nothing to reuse")
    for step in (5, 6):
        assert decide(policy, step).reason == "nothing to predict from"
    observe(policy, "cond", 1e-6)
    assert not decide(policy, 7).compute


def test_first_step_of_a_second_expert_is_the_first_of_its_own() -> None:
    policy = gaps(0.01, Limits(math.inf, max_warmup_steps=2))
    policy.restart(Position(20, STEPS, 0))
    assert decide(policy, 21).reason == "warm-up"
    assert decide(policy, 22).reason == "nothing to predict from"
    observe(policy, "cond", 1e-6)
    assert not decide(policy, 23).compute


def test_failed_call_leaves_no_tensor() -> None:
    policy = warmed([])
    policy.compare(2, "cond", (torch.ones(4),), (torch.ones(4),), 3.0, None)
    assert policy.nbytes() == 16
    policy.forget()
    assert policy.nbytes() == 0


# How errors grow


@pytest.mark.parametrize("order", [1, 2, 3])
def test_growth_in_steps_is_that_of_a_bend_from_order_1_on(order: int) -> None:
    for nodes, wanted in (([5, 3], 4 * 6 / 2), ([5, 3, 0], 4 * 6 / 2), ([7], 2 * 4 / 2)):
        assert ResidualGrowth(order)(nodes, 9) == wanted


def test_growth_is_the_error_for_unit_slope_and_unit_curvature() -> None:
    times = [0.0, 0.5, 0.7, 1.6, 2.0]  # noise levels are uneven
    for order, predictor, curve in ((0, Reuse(), lambda t: t), (1, Taylor(1), lambda t: t**2 / 2)):
        known = [times[3], times[1]][: predictor.depth]
        weights = predictor.weights(known, times[4])
        guess = sum(weight * curve(time) for weight, time in zip(weights, known, strict=True))
        assert ResidualGrowth(order, times)([3, 1, 0], 4) == pytest.approx(abs(guess - curve(times[4])))


def test_steps_at_one_noise_level_have_no_growth_and_are_computed() -> None:
    growth = ResidualGrowth(1, [1.0] * STEPS)
    pace = GapControl(GapSettings(1.0, warm_up=0), np.ones(STEPS), growth=growth)
    for step in range(STEPS):
        assert pace.decide(Position(step, STEPS, step), Tally(), never).compute
        if step >= 2:
            pace.observe(step, 1e-6)
