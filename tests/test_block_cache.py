"""Caches of one's own: a policy, a predictor, a signal from outside of the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from invariants.snapshot import Snapshot, assert_same
from sgl_diffusion_accel import (
    BlockCacheConfig,
    ConfigError,
    ConfigTypeError,
    Decision,
    HeadResidual,
    Policy,
    Position,
    Predictor,
    Seen,
    Signal,
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
        ({"policy": Remembering()}, ConfigError, r"Remembering remembers .* lambda run, branch: Remembering\(\)"),
        ({"policy": lambda run: Laid()}, ConfigTypeError, r"not of \(run, branch\)"),
        ({"predictor": 0}, ConfigTypeError, "predictor is a int"),
        ({"predicto": None}, ConfigError, "unknown argument 'predicto' in apply_block_cache. Did you mean 'predictor'"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(given: dict[str, Any], error: type, words: str) -> None:
    pipe = FAMILIES["wan"].make()
    before = Snapshot(pipe)
    with pytest.raises(error, match=words):
        apply_block_cache(pipe, **{"policy": Laid(), **given})
    assert_same(before, pipe)


class Weighing(Predictor):
    """Gives what it is told, whatever is asked."""

    def __init__(self, *weights: float, depth: int = 1) -> None:
        self.given, self._depth = weights, depth

    @property
    def depth(self) -> int:
        return self._depth

    def weights(self, times: Sequence[float], target: float) -> tuple[float, ...]:
        return self.given


def test_weights_that_do_not_sum_to_1_damp_what_is_predicted() -> None:
    pipe = FAMILIES["wan"].make()
    outputs = []
    for weight in (1.0, 0.5, 0.0):
        with apply_block_cache(pipe, Laid(), predictor=Weighing(weight)):
            outputs.append(run(pipe))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (float("nan"),), (float("inf"),)])
def test_weights_that_are_none_are_told_with_the_predictor(weights: tuple[float, ...]) -> None:
    pipe = FAMILIES["wan"].make()
    expected = run(pipe)
    patch = apply_block_cache(pipe, Laid(), predictor=Weighing(*weights))
    with pytest.raises(ConfigError, match=r"Weighing.weights gave .* allowed: one finite number for each"):
        run(pipe)
    assert patch.held_bytes() == 0
    patch.remove()
    assert torch.equal(run(pipe), expected)


def test_depth_of_a_predictor_is_a_whole_number() -> None:
    with pytest.raises(ConfigError, match=r"Weighing.depth=0; allowed: a whole number from 1"):
        apply_block_cache(FAMILIES["wan"].make(), Laid(), predictor=Weighing(1.0, depth=0))
    for order in (0, -1):
        with pytest.raises(ConfigError, match=f"order={order}"):
            Taylor(order)


class Deciding(Policy):
    """Decides what it is told."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def decide(self, position: Position, tally: Tally, change: Any) -> Any:
        return self.given(change) if callable(self.given) else self.given


@pytest.mark.parametrize("given", [None, True, (True, "x"), Decision("skip", "x")])
def test_decision_that_is_none_is_told_with_the_policy(given: Any) -> None:
    pipe = FAMILIES["wan"].make()
    patch = apply_block_cache(pipe, Deciding(given))
    with pytest.raises(ConfigTypeError, match=r"Deciding.decide gave .*; allowed: a Decision"):
        run(pipe)
    assert str(patch)


def test_change_that_was_not_announced_is_told() -> None:
    pipe = FAMILIES["wan"].make()
    apply_block_cache(pipe, Deciding(lambda change: Decision(change() > 1, "x")), signal=HeadResidual())
    with pytest.raises(ConfigError, match=r"Deciding asks for the change .*needs_signal = True"):
        run(pipe)


def test_function_that_makes_no_policy_is_told() -> None:
    pipe = FAMILIES["wan"].make()
    for made in (None, Laid):
        apply_block_cache(pipe, lambda run, branch, made=made: made)
        with pytest.raises(ConfigTypeError, match="allowed: a function that returns a Policy"):
            run(pipe)


def test_skip_with_nothing_kept_is_computed_and_noted_as_such() -> None:
    class Forgetful(Laid):
        """Says that it skips no more from step 4 on, and does."""

        def may_skip(self, position: Position) -> bool:
            return position.step < 4

    pipe, calls = FAMILIES["wan"].make(), []
    last = pipe.transformer.blocks[-1]
    with apply_block_cache(pipe, Forgetful()) as patch:
        hook = last.register_forward_hook(lambda *_: calls.append(1))
        run(pipe)
        hook.remove()
    branches = patch.stats.runs[-1].branches.values()
    assert len(calls) == sum(sum(branch.computed) for branch in branches)
    assert all(branch.reasons[4] == "nothing to reuse" for branch in branches)


class Heads(Signal):
    """What comes out of the first blocks, not what they have added."""

    name = "hidden states"
    needs_head = True

    def take(self, seen: Seen) -> torch.Tensor | None:
        head = seen.head()
        return None if head is None else head[1].clone()


def test_own_signal_is_what_is_compared() -> None:
    pipe = FAMILIES["wan"].make()
    changes = []
    for signal in (Heads(), HeadResidual()):
        with apply_block_cache(pipe, Quiet(), signal=signal) as patch:
            run(pipe)
        changes.append(patch.stats.runs[-1].branches["cond"].changes[1])
    assert None not in changes
    assert changes[0] != changes[1]


def test_signal_that_does_not_say_what_it_looks_at_is_told() -> None:
    class Silent(Heads):
        needs_head = False

    class Number(Heads):
        def take(self, seen: Seen) -> Any:
            return 0.5

    pipe = FAMILIES["wan"].make()
    apply_block_cache(pipe, Quiet(), signal=Silent(), fn_compute_blocks=1)
    with pytest.raises(ConfigError, match=r"Silent looks at the first blocks .*needs_head = True"):
        run(pipe)
    apply_block_cache(pipe, Quiet(), signal=Number())
    with pytest.raises(ConfigTypeError, match=r"what Number.take gives is a float; allowed: a tensor"):
        run(pipe)


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
    assert patch.config == BlockCacheConfig(policy, Taylor(2), fn_compute_blocks=0)
