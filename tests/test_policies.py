"""Compute or skip: each policy against a plain simulation that counts everything anew at each step."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from sgl_diffusion_accel import StepsMask
from sgl_diffusion_accel.caching.policies import Decision, MaskPolicy, Position, Tally, ThresholdPolicy
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


@pytest.mark.parametrize("policy", [ThresholdPolicy(0.1), MaskPolicy(StepsMask.of("slow"))])
def test_policies_are_frozen(policy):
    name = dataclasses.fields(policy)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, name, None)
