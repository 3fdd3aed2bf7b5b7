"""Loops that diffusers' cache context alone tells of."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import torch

from sgl_diffusion_accel import denoising_steps
from sgl_diffusion_accel.intercept import intercept
from sgl_diffusion_accel.loop.locate import locate
from sgl_diffusion_accel.loop.places import LoopCall
from test_loop import PassOn, Probe

X = torch.zeros(1)


class Told(Probe):
    @contextlib.contextmanager
    def cache_context(self, name, **details):
        yield

    def forward(self, latents):
        call = locate(self, (latents,), {})
        if isinstance(call, LoopCall):
            run, new = self.registry.find(call)
            self.seen.append((new, *run.advance(self, call)))
        else:
            self.seen.append(call.missing)


@pytest.fixture
def probe():
    made = Told()
    intercept(made, "test", PassOn())
    return made


def call(probe, name, step, total=3):
    with probe.cache_context(name, step_index=step, num_inference_steps=total):
        probe(X)


def run(probe, steps=3, names=("cond", "uncond")):
    for step in range(steps):
        for name in names:
            call(probe, name, step)


def test_it_says_enough_on_its_own(probe):
    run(probe)
    run(probe)
    once = [(step == 0 and name == "cond", step, name) for step in range(3) for name in ("cond", "uncond")]
    assert probe.seen == once * 2


def test_run_that_was_given_up_is_not_gone_on_with(probe):
    run(probe, 2)
    run(probe)
    assert probe.seen[4:7] == [(True, 0, "cond"), (False, 0, "uncond"), (False, 1, "cond")]


def test_run_that_was_given_up_in_its_first_step_is_begun_anew(probe):
    call(probe, "cond", 0)
    run(probe)
    assert probe.seen[:3] == [(True, 0, "cond"), (True, 0, "cond"), (False, 0, "uncond")]
    assert "comes twice in a step" in probe.seen[3]  # two calls of one name would look the same: nothing is skipped yet
    assert probe.seen[5:] == [(False, 2, "cond"), (False, 2, "uncond")]


def test_two_calls_of_one_name_in_a_step_are_never_placed_behind_the_first_step(probe):
    """Two tiles, say: what one of them returned must not be given for the other."""
    for step in range(3):
        for _ in range(2):
            call(probe, "cond", step)
    assert [each for each in probe.seen if isinstance(each, tuple) and each[1] > 0] == []
    assert "each of which needs a name of its own" in probe.seen[-1]


def test_another_number_of_steps_is_another_run(probe):
    call(probe, "cond", 0, 3)
    call(probe, "cond", 1, 5)
    assert probe.seen == [(True, 0, "cond"), (True, 1, "cond")]


@pytest.mark.parametrize(
    ("details", "missing"),
    [
        ({}, "lacks step_index and num_inference_steps"),
        ({"step_index": 1}, "lacks num_inference_steps"),
        ({"num_inference_steps": 3}, "lacks step_index"),
        ({"step_index": 3, "num_inference_steps": 3}, "is at step 3 of 3"),
        ({"step_index": torch.tensor(1), "num_inference_steps": 3}, "lacks step_index"),
    ],
)
def test_what_is_missing_is_named(probe, details, missing):
    with probe.cache_context("cond", **details):
        probe(X)
    assert missing in probe.seen[0]


def test_loops_are_let_go_with_the_model():
    from sgl_diffusion_accel.loop import context_loop

    made = Told()
    intercept(made, "test", PassOn())
    call(made, "cond", 0)
    assert made in context_loop._loops.of
    assert len(list(made.registry)) == 1
    before = len(context_loop._loops.of)
    del made
    assert len(context_loop._loops.of) == before - 1


def test_tasks_that_take_turns_have_their_own_contexts(probe):
    steps = [2.0, 1.0]

    async def task(name):
        with probe.cache_context(name):
            await asyncio.sleep(0)
            probe(X)
            await asyncio.to_thread(probe, X)

    async def run():
        for _ in denoising_steps(steps):
            await asyncio.gather(task("cond"), task("uncond"))

    asyncio.run(run())
    names = sorted(seen[2] for seen in probe.seen if seen[1] == 1)
    assert names == ["cond", "cond#2", "uncond", "uncond#2"]
