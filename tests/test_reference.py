"""DBCache with a fixed mask, written down a second time with plain hooks, gives the same output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from invariants.families import present
from sgl_diffusion_accel import apply_cache_dit
from sgl_diffusion_accel.caching.cache_dit import apply_cache_dit as cache_dit
from sgl_diffusion_accel.caching.parts.predictors import Taylor
from zoo import Family

MASK = [1, 1, 0, 0, 1, 0, 0, 1]
FN, BN = 1, 1
SETTLING = 3  # steps whose residuals make no slope with the one before


class Reference:
    """All blocks run at every step; at a skipped one the span's last block gets another output.

    `streams` names the argument that each output of a block continues.
    """

    def __init__(self, lists: list[Any], streams: tuple[str, ...], branches: int, order: int) -> None:
        self.streams, self.branches, self.order = streams, branches, order
        self.mask = list(MASK)
        self.calls = -1
        self.inputs: dict[int, list[torch.Tensor]] = {}
        self.kept: dict[tuple[int, int], list[tuple[int, list[torch.Tensor]]]] = {}
        for index, blocks in enumerate(lists):
            start = FN if index == 0 else 0
            end = len(blocks) - (BN if index == len(lists) - 1 else 0)
            blocks[start].register_forward_pre_hook(
                lambda module, args, kwargs, i=index: self.enter(i, args, kwargs), with_kwargs=True
            )
            blocks[end - 1].register_forward_hook(lambda module, args, output, i=index: self.leave(i, output))

    def enter(self, index: int, args: Any, kwargs: Any) -> None:
        self.calls += index == 0
        self.inputs[index] = [kwargs[name] if name in kwargs else args[0] for name in self.streams]

    def leave(self, index: int, output: Any) -> Any:
        step, branch = divmod(self.calls, self.branches)
        kept, inputs = self.kept.setdefault((index, branch), []), self.inputs[index]
        outputs = output if isinstance(output, tuple) else (output,)
        if self.mask[step]:
            kept.append((step, [after - before for after, before in zip(outputs, inputs, strict=True)]))
            return output
        newest, last = kept[-1]
        predicted = last
        if self.order == 1 and len(kept) > 1 and newest >= SETTLING:
            older, other = kept[-2]
            k = (step - newest) / (newest - older)
            predicted = [a + k * (a - b) for a, b in zip(last, other, strict=True)]
        told = tuple(before + residual for before, residual in zip(inputs, predicted, strict=True))
        return told if isinstance(output, tuple) else told[0]


def lists_of(family: Family, pipe: Any) -> list[Any]:
    return [getattr(pipe.transformer, name) for name in family.block_lists]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("name", "streams"), [("wan", ("hidden_states",)), ("flux", ("encoder_hidden_states", "hidden_states"))]
)
def test_fixed_mask_equals_the_reference(name: str, streams: tuple[str, ...], order: int) -> None:
    family = present(name)
    plain = family.make()
    unpatched = family.run(plain, steps=len(MASK))
    Reference(lists_of(family, plain), streams, len(family.branches), order)
    expected = family.run(plain, steps=len(MASK))
    assert not torch.allclose(expected, unpatched, atol=1e-2)

    pipe = family.make()
    patch = apply_cache_dit(
        pipe,
        fn_compute_blocks=FN,
        bn_compute_blocks=BN,
        steps_mask=MASK,
        steps_policy="static",
        taylorseer_order=order,
    )
    torch.testing.assert_close(family.run(pipe, steps=len(MASK)), expected, rtol=0, atol=1e-5)
    for branch in patch.stats.runs[-1].branches.values():
        assert branch.computed == tuple(map(bool, MASK))


class Dynamic(Reference):
    """The threshold decides, on the relative L1 change of what the first block adds to the hidden states."""

    threshold, warmup, longest, steps = 0.08, 2, 2, 16

    def __init__(self, lists: list[Any], streams: tuple[str, ...], branches: int) -> None:
        super().__init__(lists, streams, branches, order=0)
        self.mask = [1] * self.steps
        self.signals: dict[int, torch.Tensor] = {}
        self.run_of_skips: dict[int, int] = {}
        self.decisions: dict[int, list[bool]] = {}
        lists[0][0].register_forward_hook(self.decide, with_kwargs=True)

    def decide(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        step, branch = divmod(self.calls + 1, self.branches)
        hidden = self.streams.index("hidden_states")
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        signal = (output[hidden] if isinstance(output, tuple) else output) - before
        compute = step < self.warmup or self.run_of_skips[branch] >= self.longest
        if not compute:
            last = self.signals[branch]
            compute = ((signal - last).abs().mean() / last.abs().mean()).item() >= self.threshold
        if compute:
            self.signals[branch] = signal
        self.run_of_skips[branch] = 0 if compute else self.run_of_skips[branch] + 1
        self.decisions.setdefault(branch, []).append(compute)
        self.mask[step] = int(compute)


@pytest.mark.parametrize(
    ("name", "streams"), [("wan", ("hidden_states",)), ("flux", ("encoder_hidden_states", "hidden_states"))]
)
def test_threshold_equals_the_reference(name: str, streams: tuple[str, ...]) -> None:
    family = present(name)
    plain = family.make()
    reference = Dynamic(lists_of(family, plain), streams, len(family.branches))
    expected = family.run(plain, steps=Dynamic.steps)

    pipe = family.make()
    patch = apply_cache_dit(
        pipe,
        fn_compute_blocks=FN,
        bn_compute_blocks=BN,
        residual_diff_threshold=Dynamic.threshold,
        max_warmup_steps=Dynamic.warmup,
        max_continuous_cached_steps=Dynamic.longest,
    )
    output = family.run(pipe, steps=Dynamic.steps)
    decisions = [list(branch.computed) for branch in patch.stats.runs[-1].branches.values()]
    assert decisions == list(reference.decisions.values())
    reasons = {reason for branch in patch.stats.runs[-1].branches.values() for reason in branch.reasons}
    assert reasons >= {"change over threshold", "change below threshold"}
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_second_order_leaves_the_first_step_out_once_two_later_ones_are_known() -> None:
    """After three computed steps the prediction is the line through the last two; the fourth makes it a parabola."""
    times = times_known(steps_mask="late-medium", taylorseer_order=2)
    assert times[0] == (2.0, 1.0)
    assert not any(0.0 in known for known in times)
    assert max(map(len, times)) == 3


def test_first_three_steps_make_no_slope_under_a_mask_that_is_given() -> None:
    times = times_known(steps_mask=[1, 1, 0, 1, 0, 1, 0, 1], taylorseer_order=2)
    assert times[0] == (1.0,)
    assert (3.0, 1.0) in times
    assert (5.0, 3.0, 1.0) in times
    assert not any(0.0 in known for known in times)


def times_known(**knobs: Any) -> list[tuple[float, ...]]:
    """The computed steps that each prediction of a run could use."""
    times: list[tuple[float, ...]] = []

    class Noting(Taylor):  # type: ignore[misc]
        def weights(self, times_: Any, target: float) -> tuple[float, ...]:
            times.append(tuple(times_))
            return super().weights(times_, target)

    family = present("flux")
    pipe = family.make()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cache_dit, "taylor", Noting)
        apply_cache_dit(pipe, steps_policy="static", **knobs)
    family.run(pipe, steps=12 if isinstance(knobs["steps_mask"], str) else 8)
    return times
