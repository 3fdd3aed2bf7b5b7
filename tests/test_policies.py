"""Compute or skip: each policy against a plain simulation that counts everything anew at each step."""

from __future__ import annotations

import dataclasses
import math
import random
from abc import ABCMeta

import numpy as np
import pytest

from sgl_diffusion_accel import StepsMask
from sgl_diffusion_accel.caching.magcache import magnitude_policy
from sgl_diffusion_accel.caching.magcache.magnitude_policy import MagnitudePolicy
from sgl_diffusion_accel.caching.parts import policies
from sgl_diffusion_accel.caching.parts.policies import (
    Decision,
    MaskPolicy,
    Policy,
    Position,
    Tally,
    ThresholdPolicy,
)
from sgl_diffusion_accel.caching.teacache import accumulating_policy
from sgl_diffusion_accel.caching.teacache.accumulating_policy import AccumulatingPolicy
from sgl_diffusion_accel.caching.teacache.coefficients import TeaCacheCoefficients
from sgl_diffusion_accel.caching.teacache.skip_window import Window
from sgl_diffusion_accel.errors import ConfigError


def run(policy, changes, *, first_local=0):
    """Asks a policy at each step; returns its decisions and at which steps it had the change measured."""
    tally, decisions, measured = Tally(), [], []
    policy.prepare(len(changes))
    for step, change in enumerate(changes):

        def measure(step=step, change=change):
            measured.append(step)
            return change

        decision = policy.decide(Position(step, len(changes), step - first_local), tally, measure)
        tally = tally.after(decision)
        decisions.append(decision)
    return decisions, measured


def simulate(changes, *, threshold, warmup, interval, continuous, cached, accumulated, mask, static):
    """What DBCache does, from its description. Returns (computed, change was needed) for each step."""
    computed: list[bool] = []
    needed: list[bool] = []
    for step, change in enumerate(changes):
        since = next((back for back, was in enumerate(reversed(computed)) if was), len(computed))
        in_a_row = changes[step - since : step] if since else []
        if mask is not None and mask[step] == 1:
            verdict = (True, False)
        elif static:
            verdict = (False, False)
        elif (
            (step < warmup and step % interval == 0)
            or threshold == 0
            or (continuous is not None and since >= continuous)
            or (cached is not None and computed.count(False) >= cached)
        ):
            verdict = (True, False)
        else:
            over = not math.isfinite(change) or change >= threshold
            over = over or (accumulated is not None and sum(in_a_row) + change >= accumulated)
            verdict = (over, True)
        computed.append(verdict[0])
        needed.append(verdict[1])
    return computed, needed


def random_settings(generator, steps):
    mask = [1] + [generator.randint(0, 1) for _ in range(steps - 1)] if generator.random() < 0.5 else None
    return {
        "threshold": generator.choice([0, 0.05, 0.24, 0.24, 0.6, 2.0]),
        "warmup": generator.choice([0, 1, 4, 9]),
        "interval": generator.choice([1, 1, 2, 3]),
        "continuous": generator.choice([None, 0, 1, 3]),
        "cached": generator.choice([None, None, 0, 5]),
        "accumulated": generator.choice([None, 0.3, 1.0]),
        "mask": mask,
        "static": mask is not None and generator.random() < 0.3,
    }


def policy_of(settings):
    threshold = ThresholdPolicy(
        threshold=settings["threshold"],
        max_warmup_steps=settings["warmup"],
        warmup_interval=settings["interval"],
        max_continuous=settings["continuous"],
        max_cached=settings["cached"],
        max_accumulated=settings["accumulated"],
    )
    if settings["mask"] is None:
        return threshold
    return MaskPolicy(StepsMask.of(settings["mask"]), None if settings["static"] else threshold)


def test_decisions_equal_the_simulation_for_random_settings_and_changes():
    generator = random.Random(20)
    kinds = set()
    for _ in range(1500):
        steps = generator.randint(1, 30)
        settings = random_settings(generator, steps)
        # quarters of powers of two, so that the two ways to add up give the same sum
        changes = [generator.choice([0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, math.inf, math.nan]) for _ in range(steps)]
        computed, needed = simulate(changes, **settings)
        policy = policy_of(settings)
        decisions, measured = run(policy, changes)
        assert [decision.compute for decision in decisions] == computed, (settings, changes)
        assert measured == [step for step, need in enumerate(needed) if need], (settings, changes)
        assert policy.needs_signal or not measured
        kinds |= {decision.reason for decision in decisions}
    assert len(kinds) >= 8, kinds  # every reason came up


def test_change_is_reported_where_and_only_where_it_was_measured():
    policy = ThresholdPolicy(0.3, max_warmup_steps=2)
    decisions, measured = run(policy, [0.1, 0.2, 0.25, 0.4, 0.1])
    assert measured == [2, 3, 4]
    assert [decision.change for decision in decisions] == [None, None, 0.25, 0.4, 0.1]


def test_threshold_zero_never_skips_and_never_measures():
    policy = ThresholdPolicy(0.0)
    decisions, measured = run(policy, [0.0] * 10)
    assert all(decision.compute for decision in decisions)
    assert measured == []
    assert not policy.needs_signal


def test_change_equal_to_the_threshold_is_computed():
    decisions, _ = run(ThresholdPolicy(0.25), [0.25, 0.24])
    assert [decision.compute for decision in decisions] == [True, False]


@pytest.mark.parametrize("change", [math.nan, math.inf, -math.inf])
def test_change_that_is_not_finite_is_computed(change):
    decisions, _ = run(ThresholdPolicy(0.25), [change])
    assert decisions[0].compute


def test_warmup_counts_the_steps_of_the_transformer_not_of_the_run():
    """The second expert of a two-expert model has a warm-up of its own."""
    decisions, _ = run(ThresholdPolicy(0.5, max_warmup_steps=2), [0.1] * 6, first_local=0)
    assert [decision.compute for decision in decisions] == [True, True, False, False, False, False]
    policy = ThresholdPolicy(0.5, max_warmup_steps=2)
    assert policy.decide(Position(7, 10, 1), Tally(), lambda: 0.1).compute
    assert not policy.decide(Position(7, 10, 2), Tally(), lambda: 0.1).compute


@pytest.mark.parametrize(
    ("interval", "expected"), [(1, "11111100"), (2, "10101000"), (3, "10010000"), (6, "10000000"), (7, "10000000")]
)
def test_warmup_interval_computes_every_nth_step_of_the_warmup(interval, expected):
    decisions, _ = run(ThresholdPolicy(0.5, max_warmup_steps=6, warmup_interval=interval), [0.1] * 8)
    assert "".join(str(int(decision.compute)) for decision in decisions) == expected


@pytest.mark.parametrize(("limit", "expected"), [(0, "11111111"), (1, "10101010"), (3, "10001000")])
def test_longest_run_of_skipped_steps(limit, expected):
    policy = ThresholdPolicy(0.5, max_warmup_steps=1, max_continuous=limit)
    decisions, _ = run(policy, [0.1] * 8)
    assert "".join(str(int(decision.compute)) for decision in decisions) == expected


@pytest.mark.parametrize(("limit", "expected"), [(0, "11111111"), (1, "10111111"), (5, "10000011")])
def test_most_skipped_steps_of_a_run(limit, expected):
    policy = ThresholdPolicy(0.5, max_warmup_steps=1, max_cached=limit)
    decisions, _ = run(policy, [0.1] * 8)
    assert "".join(str(int(decision.compute)) for decision in decisions) == expected


def test_accumulated_change_starts_over_at_each_computed_step():
    policy = ThresholdPolicy(0.5, max_warmup_steps=1, max_accumulated=1.0)
    decisions, _ = run(policy, [0.25] * 10)
    assert "".join(str(int(decision.compute)) for decision in decisions) == "1000100010"


def test_tally_counts_what_was_decided():
    tally = Tally()
    for change in (0.25, None, 0.5):
        tally = tally.after(Decision(False, "", change))
    assert tally == Tally(cached=3, consecutive=3, accumulated=0.75)
    assert tally.after(Decision(True, "")) == Tally(cached=3, consecutive=0, accumulated=0.0)


def test_static_mask_alone_decides():
    policy = MaskPolicy(StepsMask.of([1, 0, 0, 1, 0, 1]))
    decisions, measured = run(policy, [99.0] * 6)
    assert "".join(str(int(decision.compute)) for decision in decisions) == "100101"
    assert measured == []
    assert not policy.needs_signal


def test_dynamic_mask_allows_skips_and_the_threshold_decides():
    policy = MaskPolicy(StepsMask.of([1, 0, 0, 1, 0, 1]), ThresholdPolicy(0.2))
    decisions, measured = run(policy, [0.1, 0.1, 0.9, 0.1, 0.1, 0.1])
    assert "".join(str(int(decision.compute)) for decision in decisions) == "101101"
    assert measured == [1, 2, 4]
    assert policy.needs_signal


def test_dynamic_mask_with_threshold_zero_needs_no_signal():
    assert not MaskPolicy(StepsMask.of("slow"), ThresholdPolicy(0.0)).needs_signal


def test_mask_counts_the_steps_of_the_run_across_both_experts():
    policy = MaskPolicy(StepsMask.of([1, 1, 1, 0]))
    assert not policy.decide(Position(3, 4, 0), Tally(), lambda: 0.0).compute


def test_mask_of_another_length_is_refused_before_the_first_step():
    with pytest.raises(ConfigError, match=r"4 entries.*30 denoising steps"):
        MaskPolicy(StepsMask.of([1, 0, 0, 1])).prepare(30)


# TeaCache

SAME = (0, 0, 0, 1, 0)
"""The polynomial that leaves a change as it is."""


def accumulating(threshold=1.0, coefficients=SAME, window=(1, -1), low=None, high=None):
    return AccumulatingPolicy(threshold, TeaCacheCoefficients(coefficients, low=low, high=high), Window(*window))


def bits(decisions):
    return "".join(str(int(decision.compute)) for decision in decisions)


def teacache(changes, *, threshold, coefficients, start, stop, low, high):
    """What TeaCache does, from its description. Returns (computed, change was needed) for each step."""
    computed, needed, total = [], [], 0.0
    for step, change in enumerate(changes):
        inside = start <= step < stop and 0 < step < len(changes) - 1
        compute = not inside or not np.isfinite(change) or (high is not None and change > high)
        if not compute:
            total += max(np.polyval(coefficients, change if low is None else max(change, low)), 0)
            compute = total >= threshold
        if compute:
            total = 0.0
        computed.append(bool(compute))
        needed.append(inside)
    return computed, needed


def test_teacache_decides_as_its_description_does_on_random_changes():
    generator = random.Random(21)
    kinds, skipped = set(), 0
    for _ in range(1500):
        steps = generator.randint(1, 30)
        # all are sums of a few powers of two, so that the two ways to calculate give the same number
        changes = [generator.choice([0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, math.inf, math.nan]) for _ in range(steps)]
        start = generator.randint(0, 8)
        stop = max(start, 1) + generator.randint(1, 25)
        settings = {
            "threshold": generator.choice([0.0625, 0.25, 1.0, 4.0]),
            "coefficients": [generator.choice([-2.0, -0.5, 0.0, 0.0, 0.25, 1.0, 2.0]) for _ in range(5)],
            "low": generator.choice([None, 0.0, 0.125]),
            "high": generator.choice([None, 0.25, 0.5]),
        }
        computed, needed = teacache(changes, start=start, stop=stop, **settings)
        decisions, measured = run(accumulating(window=(start, stop), **settings), changes)
        assert [decision.compute for decision in decisions] == computed, (settings, changes)
        assert measured == [step for step, need in enumerate(needed) if need], (settings, changes)
        kinds |= {decision.reason for decision in decisions}
        skipped += computed.count(False)
    assert len(kinds) == 5, kinds  # every reason came up
    assert skipped > 1000


def test_changes_add_up_until_a_step_is_computed_and_then_start_anew():
    decisions, _ = run(accumulating(1.0), [0.25] * 12)
    assert bits(decisions) == "100010001001"
    decisions, _ = run(accumulating(1.0), [0.375] * 12)
    assert bits(decisions) == "100100100101"


def test_computed_step_in_the_middle_of_the_sum_starts_it_anew():
    """Its own change is not charged to the next one."""
    decisions, _ = run(accumulating(1.0), [9, 0.5, 9.0, 0.5, 0.25, 0.25, 0.25, 9])
    assert bits(decisions) == "10100101"


def test_sum_equal_to_the_threshold_is_computed():
    assert bits(run(accumulating(0.5), [9, 0.25, 0.25, 0.25, 9])[0]) == "10101"
    assert bits(run(accumulating(0.5000001), [9, 0.25, 0.25, 0.25, 9])[0]) == "10011"


def test_what_adds_up_is_the_polynomial_s_value():
    policy = accumulating(1.0, coefficients=(0, 0, 4, 0, 0.25))
    decisions, _ = run(policy, [9, 0.25, 0.25, 0.25, 0.5, 9])
    assert [decision.charge for decision in decisions] == [None, 0.5, 0.5, 0.5, 1.25, None]
    assert [decision.change for decision in decisions] == [None, 0.25, 0.25, 0.25, 0.5, None]
    assert bits(decisions) == "101011"


def test_negative_value_of_the_polynomial_never_lowers_the_sum():
    """Some of the published ones are negative at small changes."""
    policy = accumulating(1.0, coefficients=(0, 0, 0, 1, -0.25))
    decisions, _ = run(policy, [9, 0.75, 0.0, 0.0, 0.0, 0.0, 0.75, 9])
    assert bits(decisions) == "10000011"
    assert [decision.charge for decision in decisions[1:7]] == [0.5, 0, 0, 0, 0, 0.5]


def test_polynomial_that_is_never_positive_never_computes_within_the_window():
    assert bits(run(accumulating(0.01, coefficients=(0, 0, 0, 0, -1)), [5.0] * 8)[0]) == "10000001"


@pytest.mark.parametrize(
    ("window", "expected"),
    [((1, -1), "1000000001"), ((5, -1), "1111100001"), ((3, 6), "1110001111"), ((0.2, 0.5), "1100011111")],
)
def test_steps_outside_the_window_are_computed_without_being_measured(window, expected):
    decisions, measured = run(accumulating(1e9, window=window), [1.0] * 10)
    assert bits(decisions) == expected
    assert measured == [step for step, bit in enumerate(expected) if bit == "0"]


def test_change_beyond_the_fitted_range_is_computed():
    decisions, _ = run(accumulating(1e9, high=0.5), [9, 0.5, 0.51, 0.5, 9])
    assert bits(decisions) == "10101"
    assert decisions[2].change == 0.51


def test_change_below_the_fitted_range_is_charged_as_its_low_end():
    decisions, _ = run(accumulating(1.0, low=0.25), [9, 0.0, 0.0, 0.0, 0.0, 9])
    assert bits(decisions) == "100011"
    assert [decision.change for decision in decisions[1:5]] == [0.0] * 4


@pytest.mark.parametrize("change", [math.nan, math.inf, -math.inf])
def test_change_that_is_not_finite_is_computed_by_teacache(change):
    decisions, _ = run(accumulating(1e9), [9, 0.5, change, 0.5, 9])
    assert bits(decisions) == "10101"


def test_teacache_may_skip_until_the_window_is_over_and_measure_within_it():
    policy = accumulating(window=(3, 6))
    positions = [Position(step, 10, step) for step in range(10)]
    assert [policy.may_skip(position) for position in positions] == [True] * 6 + [False] * 4
    assert [policy.may_measure(position) for position in positions] == [False] * 3 + [True] * 3 + [False] * 4
    assert policy.needs_signal


def test_teacache_may_never_skip_in_a_run_without_a_window():
    policy = accumulating(window=(5, -1))
    assert not any(policy.may_skip(Position(step, 6, step)) for step in range(6))


def test_window_counts_the_steps_of_the_run_across_both_experts():
    policy = accumulating(window=(5, -1))
    assert policy.may_measure(Position(7, 10, 0))
    assert not policy.may_measure(Position(3, 10, 3))


def test_too_short_a_run_is_remarked_on_with_what_to_type():
    policy = accumulating(window=(5, -1))
    assert policy.prepare(7) is None
    assert "a run of 2 steps has none" in policy.prepare(2)
    for total in (3, 4, 6):
        remark = policy.prepare(total)
        assert f"a run of {total} steps" in remark
        assert "start_skipping=5, end_skipping=-1" in remark
        assert "Give start_skipping and end_skipping" in remark


# MagCache


def magcache(ratios, *, threshold, most, retention):
    """What MagCache does, from its description; steps are computed where nothing has been computed before, and last."""
    computed, product, error, skipped = [], 1.0, 0.0, 0
    for step in range(len(ratios)):
        compute = step < retention or step in (0, len(ratios) - 1)
        if not compute:
            product, skipped = product * ratios[step], skipped + 1
            error += abs(1 - product)
            compute = error >= threshold or skipped > most
        if compute:
            product, error, skipped = 1.0, 0.0, 0
        computed.append(compute)
    return computed


def test_magcache_decides_as_its_description_does_on_random_ratios():
    generator = random.Random(23)
    kinds, skipped = set(), 0
    for _ in range(1500):
        steps = generator.randint(1, 30)
        # products and sums of these are exact
        ratios = [generator.choice([0.0, 0.5, 0.75, 1.0, 1.0, 1.25, 1.5, 2.0]) for _ in range(steps)]
        threshold, most = generator.choice([0.0, 0.25, 0.5, 1.0, 4.0]), generator.randint(0, 5)
        retention = generator.choice([0, 0.1, 0.2, 0.5, 1])
        expected = magcache(ratios, threshold=threshold, most=most, retention=int(retention * steps + 0.5))
        policy = MagnitudePolicy((None, *ratios[1:]), threshold, most, retention) if steps > 1 else None
        if policy is None:
            continue
        decisions, measured = run(policy, ratios)
        assert [decision.compute for decision in decisions] == expected, (ratios, policy)
        assert not measured
        assert {decision.change for decision in decisions} == {None}
        kinds |= {decision.reason for decision in decisions}
        skipped += expected.count(False)
    assert len(kinds) == 5, kinds  # every reason came up
    assert skipped > 1000


def test_error_of_a_magnitude_is_that_of_the_product_since_the_last_computed_step():
    policy = MagnitudePolicy((None, 1.25, 1.5, 0.5, 2.0, 1.0, 1.0), 10.0, 9, 0.0)
    decisions, _ = run(policy, [0.0] * 7)
    assert [decision.charge for decision in decisions] == [None, 0.25, 0.875, 0.0625, 0.875, 0.875, None]


def test_retention_steps_are_a_share_of_the_run_rounded_as_in_diffusers():
    policy = MagnitudePolicy((None, *[1.0] * 9), 1.0, 99, 0.25)
    assert bits(run(policy, [0.0] * 10)[0]) == "1110000001"
    assert bits(run(policy, [0.0] * 9)[0]) == "110000001"


def test_ratios_of_other_runs_are_remarked_on_with_what_to_type():
    policy = MagnitudePolicy((None, *[1.0] * 49), 1.0)
    assert policy.prepare(50) is None
    assert policy.prepare(45) is None
    assert "those of 50 steps, and this run has 20" in policy.prepare(20)
    assert "Calibrate with as many steps" in policy.prepare(20)
    assert "no step of a run of 2 steps may be skipped" in policy.prepare(2)
    assert "retention_ratio=1" in MagnitudePolicy(policy.ratios, 1.0, 3, 1.0).prepare(50)


# All of them

POLICIES = {
    "threshold": ThresholdPolicy(0.3, max_warmup_steps=2, max_continuous=3),
    "threshold 0": ThresholdPolicy(0.0),
    "static mask": MaskPolicy(StepsMask.of([1, 1, 0, 0, 1, 0, 1, 0, 1, 1])),
    "dynamic mask": MaskPolicy(StepsMask.of([1, 1, 0, 0, 1, 0, 1, 0, 1, 1]), ThresholdPolicy(0.3)),
    "mask of threshold 0": MaskPolicy(StepsMask.of([1, 1, 0, 0, 1, 0, 1, 0, 1, 1]), ThresholdPolicy(0.0)),
    "magnitudes": MagnitudePolicy((None, *[1.2] * 9), 0.5, 2),
    "magnitudes, threshold 0": MagnitudePolicy((None, *[1.0] * 9), 0.0),
    "accumulating": accumulating(0.5, window=(3, -2), high=0.9),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))


def test_every_policy_is_among_those_under_test():
    found = [*vars(policies).values(), *vars(magnitude_policy).values(), *vars(accumulating_policy).values()]
    defined = {each for each in found if type(each) is ABCMeta and issubclass(each, Policy)}
    assert {type(policy) for policy in POLICIES.values()} == defined - {Policy}


@every_policy
def test_nothing_is_measured_or_skipped_where_the_policy_has_ruled_it_out(policy):
    """What is not needed is not kept, so these answers have to hold."""
    generator = random.Random(22)
    for _ in range(100):
        changes = [generator.choice([0.0, 0.1, 0.2, 0.5, 1.0, math.nan]) for _ in range(10)]
        decisions, measured = run(policy, changes)
        positions = [Position(step, 10, step) for step in range(10)]
        assert all(policy.may_skip(positions[step]) for step in range(10) if not decisions[step].compute)
        assert all(policy.may_measure(positions[step]) and policy.needs_signal for step in measured)
        may_skip = [policy.may_skip(position) for position in positions]
        assert may_skip == sorted(may_skip, reverse=True), "once over, skipping does not begin again"


@every_policy
def test_policies_are_frozen(policy):
    name = dataclasses.fields(policy)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, name, None)
