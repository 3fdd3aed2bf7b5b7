"""Loops that people write themselves, under every patch: told where they are they are as good as a pipeline's own."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from invariants import CACHES, Apply, chosen, cross, skips_some
from invariants.by_hand import LOOPS
from invariants.caches import KINDS, STEPS, plan_for
from invariants.families import present
from sgl_diffusion_accel import (
    UnsupportedModelError,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    apply_teacache,
    branch,
    calibrate,
    denoising_steps,
    profile,
    register_attention_backend,
    remove,
    set_attention_backend,
)


def by_hand(name: str, pipe: Any, told: bool = True, **kw: Any) -> torch.Tensor:
    return LOOPS[name](pipe, present(name).call(pipe, **kw), told)


def decisions(patch: Any) -> list[Any]:
    return [
        (each, record.step, record.component, record.computed, record.reason, record.change)
        for run in patch.stats.runs
        for each, branch in run.branches.items()
        for record in branch.records
    ]


@cross("name, apply", LOOPS.keys(), CACHES)
def test_loop_by_hand_equals_the_pipeline_s_own(name: str, apply: Apply) -> None:
    family = present(name)
    pipe = family.make()
    plain = family.run(pipe, steps=STEPS)
    assert torch.equal(by_hand(name, pipe, steps=STEPS), plain), "the loop by hand is not the pipeline's"
    with apply(pipe) as patch:
        expected = family.run(pipe, steps=STEPS)
        wanted = decisions(patch)
        assert skips_some(patch)
    with apply(pipe) as patch:
        assert torch.equal(by_hand(name, pipe, steps=STEPS), expected)
        assert decisions(patch) == wanted
        assert patch.held_bytes() == 0
        assert patch.stats.outside == 0
    assert torch.equal(by_hand(name, pipe, steps=STEPS), plain)


@pytest.mark.parametrize("apply", chosen(CACHES, *KINDS))
def test_loop_by_hand_that_is_not_told_is_unpatched_and_says_so(apply: Apply, caplog: Any) -> None:
    family = present("wan")
    pipe = family.make()
    plain = by_hand("wan", pipe, told=False)
    patch = apply(pipe)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sgl_diffusion_accel"):
        for _ in range(2):
            assert torch.equal(by_hand("wan", pipe, told=False), plain)
    (message,) = [record.getMessage() for record in caplog.records if "cannot be placed" in record.getMessage()]
    for said in (message, str(patch), patch._repr_html_()):
        assert "no method of a diffusers pipeline" in said
        assert "for t in denoising_steps(scheduler.timesteps, scheduler=scheduler" in said
    assert "24 calls not placed in a loop and computed in full" in repr(patch)
    assert "\n" not in repr(patch)
    assert (patch.stats.outside, patch.stats.runs) == (24, ())


def test_patch_of_a_bare_transformer_acts_in_a_loop_of_one_s_own() -> None:
    pipe = present("wan").make()
    with apply_cache_dit(pipe, steps_mask=[1, 0] * 3, steps_policy="static", fn_compute_blocks=0):
        expected = by_hand("wan", pipe)
    with apply_cache_dit(pipe.transformer, steps_mask=[1, 0] * 3, steps_policy="static", fn_compute_blocks=0) as patch:
        assert torch.equal(by_hand("wan", pipe), expected)
        assert skips_some(patch)


def told_by_context(pipe: Any, **kw: Any) -> torch.Tensor:
    """Says no more than diffusers' own caches ask for."""
    call = present("wan").call(pipe, **kw)
    latents, total = call["latents"].clone(), call["num_inference_steps"]
    pipe.scheduler.set_timesteps(total)
    for i, t in enumerate(pipe.scheduler.timesteps):
        outputs = []
        for name, prompt in (("cond", "prompt_embeds"), ("uncond", "negative_prompt_embeds")):
            details = {"step_index": i, "num_inference_steps": total}
            with torch.no_grad(), pipe.transformer.cache_context(name, **details):
                outputs.append(pipe.transformer(latents, t.expand(1), call[prompt], return_dict=False)[0])
        noise = outputs[1] + call["guidance_scale"] * (outputs[0] - outputs[1])
        latents = pipe.scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


def takes_details(pipe: Any) -> bool:
    with contextlib.suppress(TypeError), pipe.transformer.cache_context("x", step_index=0, num_inference_steps=1):
        return True
    return False


@pytest.mark.parametrize("name", ["reuse", "taylor", "static", "magcache"])
def test_cache_context_says_enough_on_its_own(name: str) -> None:
    family = present("wan")
    pipe = family.make()
    if not takes_details(pipe):
        pytest.skip("this diffusers' cache_context takes no details")
    with CACHES[name](pipe) as patch:
        expected, wanted = family.run(pipe), decisions(patch)
    with CACHES[name](pipe) as patch:
        for _ in range(2):
            assert torch.equal(told_by_context(pipe), expected)
        assert decisions(patch) == wanted * 2
        assert patch.stats.outside == 0


def test_adaptive_cache_in_a_cache_context_skips_though_it_does_not_know_the_scheduler() -> None:
    pipe = present("wan").make()
    if not takes_details(pipe):
        pytest.skip("this diffusers' cache_context takes no details")
    plain = told_by_context(pipe, steps=30)
    with apply_adaptive_cache(pipe, tolerance=0.005) as patch:
        output = told_by_context(pipe, steps=30)
    assert skips_some(patch)
    assert float((output - plain).norm() / plain.norm()) < 0.1


@pytest.mark.parametrize(
    "apply",
    [CACHES["teacache"], CACHES["plan"]],
    ids=["teacache", "plan"],
)
def test_what_goes_by_the_timesteps_says_so_where_a_cache_context_does_not_tell_them(apply: Apply) -> None:
    pipe = present("wan").make()
    if not takes_details(pipe):
        pytest.skip("this diffusers' cache_context takes no details")
    with apply(pipe), pytest.raises(UnsupportedModelError, match=r"denoising_steps\(scheduler.timesteps"):
        told_by_context(pipe)
    assert torch.equal(told_by_context(pipe), by_hand("wan", pipe))


def test_plan_without_a_scheduler_says_what_to_type() -> None:
    pipe = present("wan").make()
    call = present("wan").call(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    hint = r"denoising_steps\(scheduler.timesteps, scheduler=scheduler"
    with apply_cache_plan(pipe, plan_for("wan"), speedup=2.0), pytest.raises(UnsupportedModelError, match=hint):
        for t in denoising_steps(pipe.scheduler.timesteps):
            pipe.transformer(call["latents"], t.expand(1), call["prompt_embeds"])


def test_calibration_on_a_pipeline_whose_loop_is_one_s_own() -> None:
    family = present("wan")
    pipe = family.make()
    call = family.call(pipe, seed=3)
    expected = calibrate(pipe, [call])

    class Mine(type(pipe)):  # type: ignore[misc]
        def __call__(self, **call: Any) -> torch.Tensor:
            return LOOPS["wan"](self, call)

    pipe.__class__ = Mine
    plan = calibrate(pipe, [call])
    assert plan.gram == expected.gram
    assert plan.teacache == expected.teacache
    assert plan.magnitudes == expected.magnitudes


def test_attention_by_steps() -> None:
    family = present("wan")
    pipe = family.make()
    with half_attention(pipe) as patch:
        expected, counted = family.run(pipe), patch.calls
        assert not torch.equal(expected, by_hand("wan", family.make()))
    with half_attention(pipe) as patch:
        assert torch.equal(by_hand("wan", pipe), expected)
        assert patch.calls == counted
    with half_attention(pipe) as patch:
        assert torch.equal(by_hand("wan", pipe, told=False), by_hand("wan", family.make(), told=False))
        assert "12 calls not placed" in str(patch)
        assert "kept the model's own attention" in str(patch)


def half_attention(pipe: Any) -> Any:
    """An attention of one's own that differs much, at some of the steps."""

    def half(query: Any, key: Any, value: Any, *, mask: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> Any:
        return value.mean(-2, keepdim=True).expand(*query.shape[:-1], -1) * 0.5

    register_attention_backend("half of the mean", half)
    return set_attention_backend(pipe, "half of the mean", skip_first_steps=3)


def test_profile_of_a_loop_of_one_s_own() -> None:
    pipe = present("wan").make()
    with apply_cache_dit(pipe, residual_diff_threshold=10.0, max_warmup_steps=2), profile(pipe, trace=False) as prof:
        by_hand("wan", pipe)
    (call,) = prof.report.calls
    assert [step.index for step in call.steps] == list(range(STEPS))
    assert [[one.name for one in step.branches] for step in call.steps] == [["cond", "uncond"]] * STEPS
    assert [step.branches[0].computed for step in call.steps][:3] == [True, True, False]


# Many threads


def test_eight_threads_with_every_kind_of_patch_equal_serial_runs() -> None:
    """48 runs in 8 threads over one transformer, told in three ways: each is bit by bit what it is alone."""
    family = present("wan")
    pipe = family.make()
    kinds: list[Callable[[Any, int], torch.Tensor]] = [
        lambda twin, seed: family.run(twin, seed=seed),
        lambda twin, seed: by_hand("wan", twin, seed=seed),
        lambda twin, seed: by_hand("wan", twin, told=False, seed=seed),
    ]
    for apply in (CACHES["taylor"], CACHES["adaptive"]):
        with apply(pipe) as patch, half_attention(pipe), profile(pipe, trace=False):
            expected = {(kind, seed): kinds[kind](pipe, seed) for kind in range(3) for seed in range(4)}
            assert skips_some(patch)
            wrong: list[Any] = []

            def work(number: int, expected: Any = expected, wrong: list[Any] = wrong) -> None:
                twin = type(pipe).from_pipe(pipe)
                twin.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
                twin.set_progress_bar_config(disable=True)
                for turn in range(3):
                    kind, seed = (number + turn) % 3, (3 * number + turn) % 4
                    if not torch.equal(kinds[kind](twin, seed), expected[kind, seed]):
                        wrong.append((number, turn, kind, seed))

            threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert wrong == []
            assert patch.held_bytes() == 0
    remove(pipe)


# Tiles and other loops of a pipeline's own methods


def tiled(own: Callable[[Any, list[torch.Tensor], Callable[..., None]], None]) -> Any:
    """Runs a method that denoises several tiles in each step: (unpatched, patched, patch) by cache."""
    family = present("wan")
    pipe = family.make()
    call = family.call(pipe)

    class Tiled(type(pipe)):  # type: ignore[misc]
        def sample(self) -> torch.Tensor:
            self.scheduler.set_timesteps(10)
            latents = [torch.randn(call["latents"].shape, generator=torch.Generator().manual_seed(s)) for s in range(4)]

            def denoise(i: int, t: Any) -> None:
                with torch.no_grad():
                    timestep = torch.as_tensor(t).reshape(1)
                    latents[i] = latents[i] - self.transformer(latents[i], timestep, call["prompt_embeds"])[0] / 10

            own(self, latents, denoise)
            return torch.stack(latents)

    pipe.__class__ = Tiled
    return pipe


def of_floats(self: Any, latents: Any, denoise: Any) -> None:
    timesteps = self.scheduler.timesteps
    for t in timesteps.tolist():
        for i in range(len(latents)):
            denoise(i, t)


def of_elements(self: Any, latents: Any, denoise: Any) -> None:
    timesteps = self.scheduler.timesteps
    for timestep in timesteps:
        for i in range(len(latents)):
            denoise(i, timestep)


def of_counts(self: Any, latents: Any, denoise: Any) -> None:
    timesteps = self.scheduler.timesteps.tolist()
    for step in range(len(timesteps)):
        for i in range(len(latents)):
            denoise(i, timesteps[step])


TILED_CACHES = pytest.mark.parametrize(
    "apply",
    [
        lambda pipe: apply_cache_dit(pipe),
        lambda pipe: apply_cache_dit(pipe, steps_mask="late-fast", steps_policy="static", fn_compute_blocks=0),
        apply_adaptive_cache,
        lambda pipe: apply_teacache(pipe, 0.25, coefficients=[0, 0, 0, 1, 0]),
    ],
    ids=["dbcache", "late-fast", "adaptive", "teacache"],
)


@pytest.mark.parametrize("own", [of_floats, of_elements], ids=lambda own: own.__name__)
@TILED_CACHES
def test_tiles_within_a_step_are_branches_of_one_run(own: Any, apply: Apply) -> None:
    """`i`, which counts tiles, was taken for the step: outputs were off by a fifth."""
    pipe = tiled(own)
    alone = present("wan").make()
    with apply(pipe) as patch:
        output = pipe.sample()
        assert (patch.stats.outside, patch.stats.started) == (0, 1)
        branches = patch.stats.runs[0].branches
    assert list(branches) == ["cond", "cond#2", "cond#3", "cond#4"]
    pipe.transformer = alone.transformer
    call = present("wan").call(pipe)
    with apply(pipe.transformer) as patch:  # one tile by itself
        pipe.scheduler.set_timesteps(10)
        latents = torch.randn(call["latents"].shape, generator=torch.Generator().manual_seed(2))
        for t in denoising_steps(pipe.scheduler.timesteps, scheduler=pipe.scheduler):
            with torch.no_grad():
                latents = latents - pipe.transformer(latents, t.reshape(1), call["prompt_embeds"])[0] / 10
        computed = patch.stats.runs[0].branches["cond"].computed
    if branches["cond#3"].computed == computed:  # the adaptive cache decides for all tiles of a step at once
        assert torch.equal(output[2], latents)
    else:
        assert apply is apply_adaptive_cache


@TILED_CACHES
def test_tiles_whose_step_is_not_proved_are_unpatched(apply: Apply) -> None:
    pipe = tiled(of_counts)
    plain = pipe.sample()
    with apply(pipe) as patch:
        assert torch.equal(pipe.sample(), plain)
        assert patch.stats.outside == 40
        assert patch.stats.started == 0


def test_tiles_in_a_told_loop_are_cached_each_by_itself() -> None:
    def told(self: Any, latents: Any, denoise: Any) -> None:
        for t in denoising_steps(self.scheduler.timesteps, scheduler=self.scheduler):
            for i in range(len(latents)):
                with branch(f"tile {i}"):
                    denoise(i, t)

    pipe = tiled(told)
    plain = pipe.sample()
    with apply_cache_dit(pipe, steps_mask="late-fast", steps_policy="static", fn_compute_blocks=0) as patch:
        output = pipe.sample()
    assert patch.stats.started == 1
    assert set(patch.stats.runs[0].branches) == {f"tile {i}" for i in range(4)}
    assert skips_some(patch)
    assert 0 < float((output - plain).norm() / plain.norm()) < 0.05


def test_profile_of_two_threads_over_one_transformer_has_each_with_its_own_decisions() -> None:
    family = present("wan")
    pipe = family.make()
    together = threading.Barrier(2, timeout=60)

    def step(*given: Any) -> Any:
        if given[1] < 6:
            together.wait()
        return given[3]

    def run(steps: int) -> None:
        twin = type(pipe)(**{**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)})
        twin.set_progress_bar_config(disable=True)
        family.run(twin, steps=steps, callback_on_step_end=step)

    patch = apply_cache_dit(pipe, steps_mask="late-fast", steps_policy="static", fn_compute_blocks=0)
    with profile(pipe, trace=False) as prof:
        threads = [threading.Thread(target=run, args=(steps,)) for steps in (8, 13)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for done in patch.stats.runs:
        (call,) = [each for each in prof.report.calls if len(each.steps) == done.steps]
        for name, wanted in done.branches.items():
            seen = [one.computed for step in call.steps for one in step.branches if one.name == name]
            assert seen == list(wanted.computed)
    assert len({done.branches["cond"].computed[:8] for done in patch.stats.runs}) == 2, "both decide alike"


@pytest.mark.parametrize("named", [True, False])
def test_adaptive_cache_says_where_it_cannot_put_right_what_it_predicts(named: bool, caplog: Any) -> None:
    pipe = present("wan").make()
    call = present("wan").call(pipe)
    pipe.scheduler.set_timesteps(12)
    steps = pipe.scheduler.timesteps
    with apply_adaptive_cache(pipe) as patch, caplog.at_level(logging.WARNING, logger="sgl_diffusion_accel"):
        for _ in range(2):
            for t in denoising_steps(steps, scheduler=pipe.scheduler if named else None):
                pipe.transformer(call["latents"], t.expand(1), call["prompt_embeds"])
    told = [record for record in caplog.records if "not put right" in record.getMessage()]
    assert len(told) == (0 if named else 1)
    assert ("scheduler=scheduler" in str(patch)) is not named


@pytest.mark.parametrize("names", [("", ""), ("cond", "uncond")], ids=["unnamed", "named"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_two_calls_without_names_say_that_guidance_is_not_counted(names: tuple[str, str], guidance: float) -> None:
    pipe = present("wan").make()
    call = present("wan").call(pipe)
    pipe.scheduler.set_timesteps(12)
    with apply_adaptive_cache(pipe) as patch:
        for t in denoising_steps(pipe.scheduler.timesteps, scheduler=pipe.scheduler, guidance=guidance):
            for name, text in zip(names, ("prompt_embeds", "negative_prompt_embeds"), strict=True):
                with branch(name) if name else contextlib.nullcontext():
                    pipe.transformer(call["latents"], t.expand(1), call[text])
    assert ('with branch("cond")' in str(patch)) is (guidance > 1 and not names[0])
