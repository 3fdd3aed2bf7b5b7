"""The short way past skipped blocks: taken, the same as the long one, and not left open."""

from __future__ import annotations

import sys
import types
from collections import Counter
from typing import Any

import pytest
import torch

from invariants import CACHES, cross, family_params, skips_some
from sgl_diffusion_accel import UnsupportedModelError, apply_cache_dit
from sgl_diffusion_accel.caching.blocks.block_handlers import BlockHandler
from sgl_diffusion_accel.caching.blocks.wiring import Form, Wiring, passing
from sgl_diffusion_accel.intercept import intercept, release
from test_loop import PassOn
from test_odd_models import Toy, make
from zoo import Family

STATIC = {"fn_compute_blocks": 1, "steps_mask": [1, 1, 0, 1, 0, 1], "steps_policy": "static"}


def blocks_of(family: Family, pipe: Any) -> list[torch.nn.Module]:
    return [
        block for name in family.transformers for _, _, block in family.blocks(getattr(pipe, name))
    ]  # fmt: skip


@cross(
    "family, name",
    family_params("wan", "flux", "hunyuan", "cogvideox", matrix=["qwen", "chroma", "zimage", "sd3"]),
    ["taylor", "reuse", "static"],
)
def test_the_short_way_gives_what_the_long_one_gives(family: Family, name: str, monkeypatch: Any) -> None:
    pipe = family.make()
    entered: Counter[int] = Counter()
    enter = BlockHandler.enter

    def counted(handler: Any, block: Any, args: Any, kwargs: Any) -> Any:
        entered[id(block)] += 1
        return enter(handler, block, args, kwargs)

    monkeypatch.setattr(BlockHandler, "enter", counted)
    with CACHES[name](pipe) as patch:
        short = family.run(pipe)
        assert skips_some(patch)
        taken, entered = entered, Counter()
        for block in blocks_of(family, pipe):
            intercept(block, "watches", PassOn())  # another handler has to see each call
        long = family.run(pipe)
        for block in blocks_of(family, pipe):
            release(block, "watches")
    assert torch.equal(short, long)
    assert set(entered.values()) == {max(entered.values())}
    fewer = [taken[each] < entered[each] for each in entered]
    lists = len(family.block_lists) * len(family.transformers)
    head = {"reuse": 1, "taylor": 3, "static": 0}[name] * len(family.transformers)
    assert sum(fewer) == len(fewer) - head - lists, "all but head, tail and the first of each span go the short way"


class Interrupted(Toy):
    """Does something of its own behind the third block."""

    def run(self, x: Any, context: Any) -> Any:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 2:
                x = self.meanwhile(x)
        return x

    def meanwhile(self, x: Any) -> Any:
        return x


def test_error_between_skipped_blocks_leaves_no_short_way_open() -> None:
    pipe = make(Interrupted(count=6))
    expected = torch.stack(pipe(steps=6))

    def fail(x: Any) -> Any:
        raise KeyboardInterrupt

    with apply_cache_dit(pipe, **STATIC) as patch:
        for at in range(1, 6):
            pipe.transformer.meanwhile = _at(at, fail)
            with pytest.raises(KeyboardInterrupt):
                pipe(steps=6)
            del pipe.transformer.meanwhile
            assert torch.equal(torch.stack(pipe(steps=6)), expected)
            assert patch.held_bytes() == 0


def _at(call: int, function: Any) -> Any:
    calls = 0

    def meanwhile(x: Any) -> Any:
        nonlocal calls
        calls += 1
        return function(x) if calls > call else x

    return meanwhile


class LeavesOut(Toy):
    """Leaves a block out in its third call."""

    calls = 0

    def run(self, x: Any, context: Any) -> Any:
        self.calls += 1
        for index, block in enumerate(self.blocks):
            if self.calls != 3 or index != self.left_out:
                x = block(x)
        return x


@pytest.mark.parametrize("left_out", [1, 2, 3, 4, 5])
def test_block_that_is_left_out_in_a_skipped_step_is_an_error(left_out: int) -> None:
    pipe = make(LeavesOut(count=6))
    pipe.transformer.left_out = left_out
    with (
        apply_cache_dit(pipe, **STATIC),
        pytest.raises(UnsupportedModelError, match=r"blocks of LeavesOut\.blocks|turn"),
    ):
        pipe(steps=6)


@pytest.mark.parametrize("keys", [["hidden_states"], [0], [1, 0], ["context", "hidden_states"]])
def test_what_is_passed_by_is_the_argument_whichever_way_it_is_given(keys: Any) -> None:
    wiring = Wiring(["hidden_states", "context", "temb"], "here")
    wiring.keys = keys
    one, other = torch.ones(1), torch.zeros(1, dtype=torch.float64)
    form = Form(None if len(keys) == 1 else tuple, (torch.float32,) * len(keys))
    answer = passing(wiring, form)
    calls = [((one, other), {}), ((one,), {"context": other}), ((), {"hidden_states": one, "context": other})]
    for call in calls:
        given = answer(*call)
        expected = form([wiring.get(call, key) for key in keys])
        for mine, theirs in zip(*((given, expected) if len(keys) > 1 else ([given], [expected])), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.dtype == torch.float32
        assert (given if len(keys) == 1 else given[-1]) is one


def test_parts_that_are_none_stay_none() -> None:
    wiring = Wiring(["hidden_states"], "here")
    wiring.keys = [None, 0]
    assert passing(wiring, Form(tuple, (None, torch.float32)))((torch.ones(1),), {})[0] is None


def python_calls_of_a_skipped_step(blocks: int) -> int:
    """Python functions that are entered in one skipped transformer call."""
    pipe = make(Toy(count=blocks))
    counted: list[int] = []
    forward = Toy.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count)
        try:
            return forward(self, *args, **kwargs)
        finally:
            sys.setprofile(None)
            counted.append(calls)

    pipe.transformer.forward = types.MethodType(watched, pipe.transformer)
    with apply_cache_dit(pipe, **STATIC) as patch:
        pipe(steps=6)
    computed = patch.stats.runs[-1].branches["cond"].computed
    return min(calls for calls, was_computed in zip(counted, computed, strict=True) if not was_computed)


def test_a_block_that_is_passed_by_costs_two_python_calls() -> None:
    """It was 24, and 45 µs a block on the host of an H200, which kept it from feeding the GPU."""
    few, many = python_calls_of_a_skipped_step(10), python_calls_of_a_skipped_step(50)
    assert (many - few) / 40 <= 2


@pytest.mark.parametrize("at", [0, 2])
def test_cache_that_is_taken_off_within_a_computed_call_leaves_the_call_as_it_is(at: int) -> None:
    pipe = make(Interrupted(count=6))
    expected = torch.stack(pipe(steps=6))
    patch = apply_cache_dit(pipe, **STATIC)
    pipe.transformer.meanwhile = _at(at if at == 0 else 3, lambda x: patch.remove() or x)  # steps 0 and 3 are computed
    assert torch.equal(torch.stack(pipe(steps=6)), expected)
    assert patch.held_bytes() == 0


def test_cache_that_is_taken_off_within_a_skipped_call_is_an_error() -> None:
    pipe = make(Interrupted(count=6))
    expected = torch.stack(pipe(steps=6))
    patch = apply_cache_dit(pipe, **STATIC)
    pipe.transformer.meanwhile = _at(2, lambda x: patch.remove() or x)  # step 2 is skipped
    with pytest.raises(UnsupportedModelError, match="in the middle of a skipped call"):
        pipe(steps=6)
    del pipe.transformer.meanwhile
    assert torch.equal(torch.stack(pipe(steps=6)), expected)
