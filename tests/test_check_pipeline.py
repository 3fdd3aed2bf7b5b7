"""`check_pipeline`: what it says beforehand is what then happens, on every family; and it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from invariants import Snapshot, assert_same, cross, families
from invariants.caches import STEPS, adaptive, magcache, plan_for, reuse, skips_some, teacache
from invariants.families import family as family_param
from invariants.families import few_blocks, present
from sgl_diffusion_accel import (
    ConfigError,
    ConfigTypeError,
    PipelineReport,
    UnsupportedModelError,
    apply_adaptive_cache,
    apply_auto,
    apply_cache_dit,
    apply_cache_plan,
    apply_lossless,
    apply_magcache,
    apply_teacache,
    check_pipeline,
    set_attention_backend,
)
from sgl_diffusion_accel.auto.checking.verdicts import CHECKS
from zoo import FAMILIES, Family

torch.set_num_threads(1)

PATCHES = ("dbcache", "adaptive", "plan", "teacache", "magcache", "lossless", "attention")


def test_every_patch_has_a_verdict() -> None:
    report = check_pipeline(present("wan").make())
    assert [each.patch for each in report.patches] == list(CHECKS)
    assert set(CHECKS) == set(PATCHES)
    assert all(each.answer in ("yes", "in part", "no") and each.reason and each.call for each in report.patches)
    with pytest.raises(KeyError):
        report.verdict("nothing")


# It agrees with what then happens


def applied(patch: str, pipe: Any) -> Any:
    """What somebody types who takes the patch as it is."""
    doors: dict[str, Callable[[], Any]] = {
        "adaptive": lambda: apply_adaptive_cache(pipe),
        "dbcache": lambda: apply_cache_dit(pipe),
        "teacache": lambda: apply_teacache(pipe),
        "magcache": lambda: apply_magcache(pipe, [1.0] * STEPS),
        "lossless": lambda: apply_lossless(pipe),
        "attention": lambda: set_attention_backend(pipe, "math"),
    }
    return doors[patch]()


@families()
def test_answer_is_what_the_front_door_gives(family: Family) -> None:
    pipe = few_blocks(family)
    report = check_pipeline(pipe)
    for patch in PATCHES:
        verdict = report.verdict(patch)
        if patch == "plan":  # calibrated below
            assert verdict.answer == "yes"
        elif patch == "lossless":
            with apply_lossless(pipe) as made:
                assert (verdict.answer == "yes") == (len(made.left_alone) < len(family.transformers))
        elif verdict.answer == "yes":
            applied(patch, pipe).remove()
        else:
            with pytest.raises((ConfigError, UnsupportedModelError)) as raised:
                applied(patch, pipe)
            assert (verdict.answer == "no") == isinstance(raised.value, UnsupportedModelError) or patch == "attention"
            assert str(raised.value) == verdict.reason


def loosened(patch: str, family: Family, pipe: Any) -> Any:
    """The patch with settings by which it acts in a few steps, and with what the verdict says is missing."""
    return {
        "adaptive": lambda: adaptive(pipe),
        "plan": lambda: apply_cache_plan(pipe, plan_for(family.name), speedup=2.0),
        "dbcache": lambda: reuse(pipe),
        "teacache": lambda: teacache(pipe),
        "magcache": lambda: magcache(pipe),
    }[patch]()


@cross(
    "patch, family",
    ("dbcache", "adaptive", "plan", "teacache", "magcache"),
    [family_param(name) for name in ("qwen", *(name for name in FAMILIES if name != "qwen"))],
)
def test_yes_acts_in_the_loop_and_branches_that_it_names(patch: str, family: Family) -> None:
    pipe = family.make() if patch == "plan" else few_blocks(family)
    report = check_pipeline(pipe)
    assert report.verdict(patch).answer in ("yes", "in part")
    made = loosened(patch, family, pipe)
    family.run(pipe, steps=STEPS)
    assert skips_some(made)
    assert report.loop.is_placed is True
    assert not made.stats.unplaced
    seen = set(made.stats.runs[-1].branches)
    assert seen <= set(report.loop.branches)
    if family.other_guidance is not None:
        family.run(pipe, steps=STEPS, guidance=family.other_guidance[0])
        seen |= set(made.stats.runs[-1].branches)
    assert {*family.contexts} - {"cond_uncond", "pred_cond", "pred_uncond"} <= {*report.loop.contexts}
    assert report.loop.is_batched == ("cond_uncond" in family.branches)
    assert seen - {"cond"} <= set(report.loop.branches)


@families("hunyuan", "lumina2", "ltx", matrix=FAMILIES)
def test_lossless_and_attention_act_where_they_say_so(family: Family) -> None:
    pipe = few_blocks(family)
    report = check_pipeline(pipe)
    answers = {patch: report.verdict(patch).answer for patch in ("lossless", "attention")}
    backend = set_attention_backend(pipe, "math") if answers["attention"] == "yes" else None
    lossless = apply_lossless(pipe)
    family.run(pipe, steps=2)
    if backend is not None:
        assert any(sum(calls.values()) for calls in backend.calls.values())
    calls = lossless.stats.calls
    assert any(calls.values()) == (answers["lossless"] == "yes")


# What it refuses, and why


def test_scheduler_that_adds_noise() -> None:
    pipe = present("wan").make(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    report = check_pipeline(pipe)
    assert report.scheduler.adds_noise
    assert (report.verdict("adaptive").answer, report.verdict("plan").answer) == ("in part", "no")
    assert "fewer steps" in report.verdict("adaptive").reason
    assert "adds noise of its own" in str(report)


@pytest.mark.parametrize(
    ("scheduler", "looks_back"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), False),
        (diffusers.FlowMatchHeunDiscreteScheduler(), False),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), True),
        (diffusers.DDIMScheduler(clip_sample=False), False),
    ],
    ids=["Euler", "Heun", "UniPC", "DDIM"],
)
def test_deterministic_schedulers(scheduler: Any, looks_back: bool) -> None:
    found = check_pipeline(present("wan").make(scheduler=scheduler)).scheduler
    assert found.is_linear
    assert found.looks_back == looks_back


def test_diffusers_own_cache_is_in_the_way_of_caches_alone() -> None:
    pipe = present("wan").make()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    report = check_pipeline(pipe)
    answers = {each.patch: each.answer for each in report.patches}
    assert {answers[name] for name in ("adaptive", "plan", "dbcache", "teacache", "magcache")} == {"no"}
    assert answers["attention"] == "yes"
    assert "disable_cache" in report.verdict("adaptive").reason


def test_model_whose_blocks_cannot_be_cached() -> None:
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        caption_channels=8, cross_attention_dim=16,
    )  # fmt: skip
    report = check_pipeline(model)
    answers = {each.patch: each.answer for each in report.patches}
    assert {answers[name] for name in ("dbcache", "teacache", "magcache")} == {"no"}
    assert answers["adaptive"] == "yes"
    assert report.denoisers[0].blocks == {}
    assert "interleaved" in report.denoisers[0].wiring
    for apply in (apply_cache_dit, lambda model: apply_magcache(model, [1.0] * STEPS)):
        with pytest.raises(UnsupportedModelError, match="interleaved"):
            apply(model)


def test_one_block_leaves_nothing_to_dbcache() -> None:
    pipe = present("wan").make(num_layers=1)
    assert check_pipeline(pipe).verdict("dbcache").answer == "no"
    with pytest.raises(ConfigError):
        apply_cache_dit(pipe)
    assert check_pipeline(pipe).verdict("magcache").answer == "yes"


def test_linear_attention_is_in_part_and_the_rest_can_be_set() -> None:
    pipe = present("sana").make()
    verdict = check_pipeline(pipe).verdict("attention")
    assert (verdict.answer, "layers=" in verdict.call) == ("in part", True)
    set_attention_backend(pipe, "math", layers="*.attn2")


def test_constants_of_wan_depend_on_the_pipeline() -> None:
    verdict = check_pipeline(present("wan").make()).verdict("lossless")
    assert (verdict.answer, "keys and values of the text" in verdict.reason) == ("in part", True)
    assert "one timestep" not in verdict.reason
    assert "at most 10% of the transformer's weights" in verdict.memory
    pipe = present("wan").make()
    pipe.register_to_config(expand_timesteps=True)
    assert "one timestep" in check_pipeline(pipe).verdict("lossless").reason
    assert "guidance_scale_2=1" in check_pipeline(present("wan22").make()).verdict("lossless").reason


def test_without_transformer_or_pipeline() -> None:
    with pytest.raises(ConfigTypeError):
        check_pipeline("wan")
    with pytest.raises(ConfigError, match="Did you mean 'latents'"):
        check_pipeline(present("wan").make(), latent=(1, 2, 3))
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        check_pipeline(nn.DataParallel(present("wan").make().transformer))


def test_loop_that_is_not_seen_is_not_guessed() -> None:
    pipe = present("wan").make()

    class Other(type(pipe)):
        def __call__(self, prompt: str) -> None:
            """Another loop, over something else."""

    pipe.__class__ = Other
    report = check_pipeline(pipe)
    assert report.loop.is_placed is False
    assert "in a loop where its calls are placed" in report.verdict("adaptive").reason
    assert "after the first run print(patch) tells" in str(report)


def test_loop_that_a_subclass_calls_is_seen() -> None:
    pipe = present("wan").make()

    class Other(type(pipe)):
        def __call__(self, *args: Any, **given: Any) -> Any:
            """Does something before, and hands on."""
            return super().__call__(*args, **given)

    pipe.__class__ = Other
    assert check_pipeline(pipe).loop.is_placed
    made = adaptive(pipe)
    FAMILIES["wan"].run(pipe, steps=STEPS)
    assert not made.stats.unplaced


# Nothing is changed


@families("wan22", "qwen", "hunyuan15", "sana")
def test_nothing_is_changed_and_nothing_run(family: Family) -> None:
    pipe = few_blocks(family)
    expected = family.run(pipe, steps=2)
    before = Snapshot(pipe)
    scheduler = dict(vars(pipe.scheduler))
    calls: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
        for name in family.transformers
        for module in getattr(pipe, name).modules()
    ]
    check_pipeline(pipe, latents=(1, 16, 16))
    for handle in handles:
        handle.remove()
    assert calls == []
    assert_same(before, pipe)
    assert all(vars(pipe.scheduler)[name] is value for name, value in scheduler.items())
    assert torch.equal(family.run(pipe, steps=2), expected)


def test_patched_pipeline_is_looked_at_as_it_is_without() -> None:
    family = present("flux")
    pipe = family.make()
    plain = check_pipeline(pipe)
    with apply_auto(pipe), set_attention_backend(pipe, "math"):
        assert check_pipeline(pipe) == plain


# What is held


@families("wan", "qwen", "flux")
def test_whole_calls_hold_what_is_said(family: Family) -> None:
    pipe = few_blocks(family)
    latents = family.call(pipe)["latents"].shape
    said = check_pipeline(pipe, latents=latents).verdict("adaptive").held_bytes
    made, held = adaptive(pipe), [0]
    pipe.transformer.register_forward_hook(lambda *_: held.append(made.held_bytes()))
    family.run(pipe, steps=12)
    branches = len(check_pipeline(pipe).loop.branches) / len(family.branches)
    assert said is not None
    assert max(held) * branches <= said <= 1.3 * max(held) * branches


@families("wan", "qwen", "flux")
def test_blocks_hold_what_is_said_and_the_text(family: Family) -> None:
    pipe = few_blocks(family)
    latents = family.call(pipe)["latents"].shape
    said = check_pipeline(pipe, latents=latents).verdict("dbcache").held_bytes
    made, held = reuse(pipe), [0]
    family.run(
        pipe, steps=STEPS, callback_on_step_end=lambda _, __, ___, given: held.append(made.held_bytes()) or given
    )
    branches = len(check_pipeline(pipe).loop.branches) / len(family.branches)
    assert said is not None
    assert said <= 1.01 * max(held) * branches
    assert max(held) * branches <= 3 * said


@pytest.mark.parametrize("latents", [(1, 2), (1, 2, 3, 4, 5, 6), (1, 0, 3), "abc", 5, (1, 2.5, 3)], ids=str)
def test_bad_shapes(latents: Any) -> None:
    with pytest.raises((ConfigError, ConfigTypeError), match="latents"):
        check_pipeline(present("wan").make(), latents=latents)


# How it is shown


def test_text_html_and_json() -> None:
    report = check_pipeline(present("wan22").make())
    found = json.loads(report.to_json())
    assert found["format"] == 1
    assert [each["component"] for each in found["denoisers"]] == ["transformer", "transformer_2"]
    assert {each["patch"]: each["answer"] for each in found["patches"]} == {
        each.patch: each.answer for each in report.patches
    }
    for text in (str(report), report._repr_html_()):
        assert all(each.patch in text and each.answer in text for each in report.patches)
        assert "WanPipeline" in text
        assert "branches: cond, uncond" in text
    assert isinstance(report, PipelineReport)
    assert "adaptive yes" in repr(report)
    with pytest.raises(AttributeError):
        report.pipeline = "other"  # type: ignore[misc]


def test_weights_are_counted_by_dtype() -> None:
    pipe = present("wan").make()
    pipe.transformer.to(torch.bfloat16)
    (found,) = check_pipeline(pipe).denoisers
    assert found.is_loaded
    assert found.parameters == sum(each.numel() for each in pipe.transformer.parameters())
    assert found.weights["bfloat16"] == 2 * found.parameters
    assert found.blocks == {"blocks": 6}
    assert "sdpa" in found.attention
