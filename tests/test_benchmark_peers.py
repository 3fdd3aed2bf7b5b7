"""The peers that the benchmarks bring along: EasyCache, Spectrum, TaylorSeer, and cache-dit's other predictors."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import diffusers
import numpy as np
import pytest
import torch

from benchmarks.calibrated import Calibrated, Of
from benchmarks.contenders import contenders
from benchmarks.pareto import STYLES
from benchmarks.peers import cache_dit, diffusers_caches, easycache, spectrum, taylorseer
from benchmarks.peers.loop import Loop
from benchmarks.settings import Setting, calibrator_settings
from benchmarks.summary import kind_of
from miniatures import call_kwargs, captions, load_miniature
from sgl_diffusion_accel.comparing.measures.block_work import BlockWork

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12
NEVER = {
    "EasyCache": partial(easycache.apply, setting=easycache.Setting(0.0, 2), steps=STEPS),
    "Spectrum": partial(spectrum.apply, setting=spectrum.Setting(window=1, flex=0), steps=STEPS),
    "TaylorSeer": partial(taylorseer.apply, setting=taylorseer.Setting(1, 2)),
}
SKIPPING = {
    "EasyCache": partial(easycache.apply, setting=easycache.Setting(0.1, 3), steps=STEPS),
    "Spectrum": partial(spectrum.apply, setting=spectrum.Setting(weight=0.7), steps=STEPS),
    "TaylorSeer": partial(taylorseer.apply, setting=taylorseer.Setting(3, 2)),
}
every_peer = pytest.mark.parametrize("peer", SKIPPING)


def call(model, seed=0, steps=STEPS):
    return call_kwargs(model, captions(model, 1, 3 + seed)[0], seed=seed, steps=steps)


@torch.no_grad()
def latents(pipe, model, seed=0, **more):
    return pipe(**call(model, seed), **more)[0]


@every_peer
@pytest.mark.parametrize("model", ["wan", "qwen", "flux"])
def test_never_skipping_is_bitwise_the_unpatched_run(peer, model):
    pipe = load_miniature(model)
    with NEVER[peer](pipe):
        patched = latents(pipe, model)
    assert torch.equal(patched, latents(load_miniature(model), model))


def state(pipe):
    """Everything that a peer could leave behind on any module."""
    modules = dict(pipe.transformer.named_modules(remove_duplicate=False))
    tables = {
        (name, key): list(value.items()) if isinstance(value, dict) else value
        for name, module in modules.items()
        for key, value in vars(module).items()
    }
    return [(name, id(module)) for name, module in modules.items()], tables


class Stopped(Exception):
    pass


def stop(pipe, step, timestep, tensors):
    if step == 7:
        raise Stopped
    return tensors


@every_peer
@pytest.mark.parametrize("model", ["wan", "flux"])
def test_all_is_undone_at_the_end_and_on_an_error(peer, model):
    pipe = load_miniature(model)
    unpatched, before = latents(pipe, model), state(pipe)
    with SKIPPING[peer](pipe):
        assert not torch.equal(latents(pipe, model), unpatched)
    assert state(pipe) == before
    with pytest.raises(Stopped), SKIPPING[peer](pipe):
        latents(pipe, model, callback_on_step_end=stop)
    assert state(pipe) == before
    assert torch.equal(latents(pipe, model), unpatched)


@every_peer
@pytest.mark.parametrize("model", ["wan", "qwen", "flux"])
def test_what_is_skipped_is_not_executed(peer, model):
    pipe = load_miniature(model)
    with BlockWork(pipe.transformer) as work, SKIPPING[peer](pipe):
        latents(pipe, model)
    branches = 1 if model == "flux" else 2
    assert len(work.calls) == STEPS * branches
    # Modulation by the time embedding is computed in every step by TaylorSeer.
    rest = 0.05 if peer == "TaylorSeer" and model != "wan" else 0.0
    skipped = [each for each in work.calls if each < max(work.calls)]
    assert len(skipped) >= 3 * branches
    assert max(skipped) <= rest * max(work.calls)


@every_peer
def test_each_run_on_one_pipeline_is_fresh_also_after_one_that_was_stopped(peer):
    alone, pipe = load_miniature("wan"), load_miniature("wan")
    with SKIPPING[peer](alone):
        expected = latents(alone, "wan", seed=1)
    with SKIPPING[peer](pipe):
        latents(pipe, "wan")
        assert torch.equal(latents(pipe, "wan", seed=1), expected)
        with pytest.raises(Stopped):
            latents(pipe, "wan", callback_on_step_end=stop)
        assert torch.equal(latents(pipe, "wan", seed=1), expected)


def outputs_of(module, taken):
    """Notes what a module returns in each call, by branch: in each step of Wan the conditional one comes first."""

    def note(module, args, kwargs, output):
        branch = ("cond", "uncond")[sum(map(len, taken.values())) % 2]
        first = output[0] if isinstance(output, tuple) else output
        taken[branch].append((kwargs.get("hidden_states"), first.double()))

    return module.register_forward_hook(note, with_kwargs=True)


def close(found, expected):
    return (found - expected).norm() <= 1e-5 * expected.norm()


def test_easycache_is_its_formula():
    pipe, taken, threshold, warmup = load_miniature("wan"), defaultdict(list), 0.1, 3
    applied = easycache.apply(pipe, easycache.Setting(threshold, warmup), STEPS)
    with BlockWork(pipe.transformer) as work, applied, outputs_of(pipe.transformer, taken):
        latents(pipe, "wan")
    computed = [step for step in range(STEPS) if work.calls[2 * step]]
    assert [step for step in range(STEPS) if work.calls[2 * step + 1]] == computed
    inputs, values = ([pair[at].double() for pair in taken["cond"]] for at in (0, 1))
    expected, error = [0, 1], 0.0
    for step in range(2, STEPS):
        last, before = expected[-1], expected[-2]
        rate = (values[last] - values[before]).abs().mean() / (inputs[last] - inputs[before]).abs().mean()
        error += rate * (inputs[step] - inputs[step - 1]).abs().mean() / values[last].abs().mean()
        if step < warmup or step == STEPS - 1 or error >= threshold:
            expected, error = [*expected, step], 0.0
    assert computed == expected
    assert 4 < len(computed) < STEPS - 3
    for branch in ("cond", "uncond"):
        for step in set(range(STEPS)) - set(computed):
            last = max(each for each in computed if each < step)
            (now, found), (then, output) = taken[branch][step], taken[branch][last]
            assert close(found, output + now.double() - then.double())


def test_spectrum_is_its_formula():
    pipe, taken, setting = load_miniature("wan"), defaultdict(list), spectrum.Setting(weight=0.7)
    with spectrum.apply(pipe, setting, STEPS), outputs_of(pipe.transformer.blocks[-1], taken):
        latents(pipe, "wan")
    computed = [0, 1, 2, 3, 4, 6, 8, 11]
    assert setting.computed_steps(STEPS) == set(computed)
    for branch in ("cond", "uncond"):
        values = [value for _, value in taken[branch]]
        for step in set(range(STEPS)) - set(computed):
            past = [each for each in computed if each < step]
            # Ridge regression as least squares with one more equation for each coefficient.
            angles = np.arccos(2 * np.array([*past, step]) / STEPS - 1)
            basis = torch.from_numpy(np.cos(np.outer(angles, np.arange(5))))
            rows = torch.cat([basis[:-1], 0.1**0.5 * torch.eye(5)])
            known = torch.stack([values[each].flatten() for each in past])
            fit = torch.linalg.lstsq(rows, torch.cat([known, torch.zeros(5, known.shape[1])])).solution
            line = known[-1] + (known[-1] - known[-2]) * (step - past[-1]) / (past[-1] - past[-2])
            assert close(values[step].flatten(), 0.7 * basis[-1] @ fit + 0.3 * line)


@pytest.mark.parametrize("module", ["attn1", "attn2", "ffn"])
def test_taylorseer_is_its_formula(module):
    pipe, taken = load_miniature("wan"), defaultdict(list)
    block = pipe.transformer.blocks[5]
    with taylorseer.apply(pipe, taylorseer.Setting(3, 2)), outputs_of(getattr(block, module), taken):
        latents(pipe, "wan")
    for branch in ("cond", "uncond"):
        value = [each for _, each in taken[branch]]
        for ahead in (1, 2):
            # After the first three steps there is one difference of two steps; its own difference needs one more.
            assert close(value[2 + ahead], value[2] + ahead * (value[2] - value[1]))
            slope, before = (value[5] - value[2]) / 3, value[2] - value[1]
            assert close(value[5 + ahead], value[5] + ahead * slope + ahead**2 / 2 * (slope - before) / 3)
            slope, before = (value[8] - value[5]) / 3, slope
            assert close(value[8 + ahead], value[8] + ahead * slope + ahead**2 / 2 * (slope - before) / 3)


class SameSteps(taylorseer.Setting):
    """Computes the steps that diffusers computes."""

    def computes(self, step):
        return step < 3 or (step - 4) % self.interval == 0


def test_taylorseer_is_that_of_diffusers_on_the_same_modules_and_steps():
    if not hasattr(diffusers, "TaylorSeerCacheConfig"):
        pytest.skip("this diffusers has no TaylorSeer")
    theirs = diffusers.TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=3,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.(attn1|attn2|ffn)"],
    )
    one, other = load_miniature("wan"), load_miniature("wan")
    with taylorseer.apply(one, SameSteps(3, 1)), diffusers_caches.apply(other, theirs):
        assert torch.equal(latents(one, "wan"), latents(other, "wan"))


def test_spectrum_computes_as_many_steps_as_published():
    assert len(spectrum.Setting().computed_steps(50)) == 14
    assert len(spectrum.Setting(flex=3.0).computed_steps(50)) == 10


def test_steps_are_counted_by_branch_and_begin_anew_with_a_timestep_that_does_not_fall():
    loop = Loop(list)
    seen = []
    for branch, timestep in [("a", 9), ("b", 9), ("a", 5), ("b", 5), ("a", 9), ("a", 9), ("b", 9), ("a", 2)]:
        loop.branch = branch
        loop.advance(timestep)
        loop.run.append(timestep)
        seen.append((loop.step, len(loop.run)))
    assert seen == [(0, 1), (0, 2), (1, 3), (1, 4), (0, 1), (0, 1), (0, 2), (1, 3)]


def test_every_contender_has_a_name_of_its_own_and_a_kind_that_is_drawn(monkeypatch):
    monkeypatch.setattr(diffusers_caches, "mag_ratios", lambda of: [1.0] * of.steps)
    kinds = set()
    for steps in (50, 20):
        found = contenders(Calibrated(Of("wan", steps)))
        assert len({(each.family, each.name) for each in found}) == len(found)
        kinds |= {kind_of(vars(each)) for each in found}
    assert kinds | {"cache-dit"} == {*STYLES, "unpatched"}


@pytest.mark.skipif(not cache_dit.installed(), reason="cache-dit is not installed")
@pytest.mark.parametrize("calibrator", ["DMD", "FoCa"])
def test_the_other_predictors_of_cache_dit_are_applied(calibrator):
    results = []
    for each in (None, calibrator):
        pipe = load_miniature("wan")
        with cache_dit.apply(pipe, Setting(calibrator=each), 20), torch.no_grad():
            results.append(pipe(**call("wan", steps=20))[0])
    assert not torch.equal(*results)


def test_settings_with_another_predictor_are_told_apart_by_name():
    names = [each.name for each in calibrator_settings()]
    assert len(set(names)) == len(names)
    assert "F1 W4 MC3 R.24, DMD" in names
