"""Each branch of guidance is cached as if it were alone."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from invariants import (
    CACHES,
    TWO_BRANCH,
    Apply,
    FixedPath,
    count_blocks,
    cross,
    families,
    family_params,
    skips_some,
    transformer_outputs,
)
from invariants.families import present
from sgl_diffusion_accel import CachePatch, apply_cache_dit
from zoo import Family

REUSE = CACHES["reuse"]
STEPS = 6


def dynamic(pipe: Any) -> CachePatch:
    return apply_cache_dit(pipe, residual_diff_threshold=0.5, max_warmup_steps=1, max_continuous_cached_steps=3)


@cross(
    "family, apply",
    family_params(*TWO_BRANCH),
    {"dynamic": dynamic, **{name: CACHES[name] for name in ("taylor", "teacache", "magcache, Taylor")}},
)
def test_branches_that_change_places_give_the_same(family: Family, apply: Apply) -> None:
    """On a fixed path through the latents the prompt's calls return the same, whichever branch the prompt is on."""
    pipe = family.make(scheduler=FixedPath())
    first, second = family.branches
    patch = apply(pipe)
    outputs = transformer_outputs(family, pipe, steps=10)
    swapped = transformer_outputs(family, pipe, steps=10, swap=True)
    assert len(outputs) == len(swapped) == 20
    assert not torch.equal(outputs[0], outputs[1])
    for step in range(10):
        assert torch.equal(outputs[2 * step], swapped[2 * step + 1])
        assert torch.equal(outputs[2 * step + 1], swapped[2 * step])
    one, other = patch.stats.runs
    assert set(one.branches) == {"cond", "uncond"} == {first, second}
    assert one.branches["cond"].changes == other.branches["uncond"].changes
    assert one.branches["cond"].computed == other.branches["uncond"].computed
    assert one.branches["uncond"].computed == other.branches["cond"].computed
    assert skips_some(patch)


EITHER = {"dynamic": dynamic, "teacache": CACHES["teacache"]}


@cross(
    "family, apply",
    family_params("wan", "wan22", "qwen", "lumina2", matrix=["chroma", "kandinsky5", "ovis"]),
    EITHER,
)
def test_cond_is_what_it_is_without_guidance(family: Family, apply: Apply) -> None:
    assert family.other_guidance is not None
    alone = family.make(scheduler=FixedPath())
    apply(alone)
    expected = transformer_outputs(family, alone, steps=10, guidance=family.other_guidance[0])
    pipe = family.make(scheduler=FixedPath())
    patch = apply(pipe)
    outputs = transformer_outputs(family, pipe, steps=10)
    assert len(expected) == 10
    assert all(torch.equal(cond, one) for cond, one in zip(outputs[::2], expected, strict=True))
    assert skips_some(patch)


@cross("family, apply", family_params(), EITHER)
def test_stats_tell_what_ran(family: Family, apply: Apply) -> None:
    pipe = family.make()
    patch = apply(pipe)
    with count_blocks(family, pipe) as counts:
        family.run(pipe, steps=STEPS)
    assert len(patch.stats.runs) == 1
    run = patch.stats.runs[0]
    assert run.steps == STEPS
    assert len(run.branches) == len(family.branches)
    if len(family.branches) == 2:
        assert set(run.branches) == set(family.branches)
    records = [record for branch in run.branches.values() for record in branch.records]
    for component in family.transformers:
        blocks = [count for (name, _, _), count in counts.items() if name == component]
        mine = [record for record in records if record.component == component]
        computed = sum(record.computed for record in mine)
        assert blocks[0] == (len(mine) if apply is dynamic else computed), "DBCache runs its first block at every step"
        assert set(blocks[1:]) == {computed}
    for branch in run.branches.values():
        assert [record.step for record in branch.records] == list(range(STEPS))
        assert len(branch.reasons) == STEPS
        assert all(branch.reasons)
    full = sum(len(family.blocks(getattr(pipe, record.component))) for record in records)
    assert run.compute_share == pytest.approx(sum(counts.values()) / full)
    assert run.compute_share < 1


@families("wan", "qwen", "flux", "hunyuan", "zimage", "sd3", "lumina2")
def test_other_guidance_has_its_own_branches(family: Family) -> None:
    if family.other_guidance is None:
        pytest.skip("this diffusers has one kind of guidance for it")
    guidance, branches = family.other_guidance
    pipe = family.make()
    patch = REUSE(pipe)
    family.run(pipe, guidance=guidance)
    assert set(patch.stats.runs[-1].branches) == set(branches)


def truncated(name: str, **kw: Any) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    """Outputs on a fixed path of a cached run whose guidance ends half way, and of one without truncation."""
    family = present(name)
    pipe = family.make(scheduler=FixedPath())
    whole = _cached(family, pipe)
    patch = apply_cache_dit(pipe, residual_diff_threshold=10.0, max_warmup_steps=1, max_continuous_cached_steps=2)
    return patch, transformer_outputs(family, pipe, steps=10, **kw), whole


def _cached(family: Family, pipe: Any) -> list[torch.Tensor]:
    with REUSE(pipe):
        return transformer_outputs(family, pipe, steps=10)


def test_truncated_guidance_by_two_calls() -> None:
    patch, outputs, whole = truncated("lumina2", cfg_trunc_ratio=0.5)
    branches = patch.stats.runs[-1].branches
    assert len(branches["cond"].computed) == 10
    guided = len(branches["uncond"].computed)
    assert 3 <= guided <= 7
    cond = [*outputs[: 2 * guided : 2], *outputs[2 * guided :]]
    assert len(cond) == 10
    assert all(torch.equal(ours, full) for ours, full in zip(cond, whole[::2], strict=True))
    assert patch.held_bytes() == 0


def test_truncated_guidance_in_one_batched_call() -> None:
    """The batch shrinks in mid-run: that step is computed, and skipping goes on after it."""
    patch, outputs, whole = truncated("zimage", cfg_truncation=0.5)
    sizes = [output.numel() for output in outputs]
    assert sorted(set(sizes)) == [sizes[0] // 2, sizes[0]]
    switch = sizes.index(sizes[0] // 2)
    (branch,) = patch.stats.runs[-1].branches.values()
    assert branch.computed[switch]
    assert branch.reasons[switch] == "nothing to reuse"
    assert not all(branch.computed[switch:])
    assert all(torch.equal(ours, full) for ours, full in zip(outputs[:switch], whole, strict=False))
    assert patch.held_bytes() == 0


def test_calls_that_leave_out_layers_are_computed_and_stay_apart() -> None:
    family = present("sd3")
    extra = {"skip_guidance_layers": [2], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    unpatched = family.make(scheduler=FixedPath())
    full = transformer_outputs(family, unpatched, steps=STEPS, **extra)
    pipe = family.make(scheduler=FixedPath())
    patch = REUSE(pipe)
    alone = transformer_outputs(family, pipe, steps=STEPS)
    outputs = transformer_outputs(family, pipe, steps=STEPS, **extra)
    lone = [index for index, output in enumerate(outputs) if output.shape[0] == 1]
    guided = [index for index, output in enumerate(outputs) if output.shape[0] == 2]
    assert len(lone) >= 3
    assert all(torch.equal(outputs[index], full[index]) for index in lone)
    assert all(torch.equal(outputs[index], one) for index, one in zip(guided, alone, strict=True))
    assert skips_some_branch(patch)
    assert patch.held_bytes() == 0


def skips_some_branch(patch: CachePatch) -> bool:
    return any(not all(branch.computed) for branch in patch.stats.runs[-1].branches.values())


def test_three_branches() -> None:
    """HunyuanVideo 1.5 with a guider of three predictions: cond and uncond are what they are with two."""
    family = present("hunyuan15")
    if not hasattr(diffusers, "SkipLayerGuidance"):
        pytest.skip("this diffusers has no SkipLayerGuidance")

    class Third(diffusers.SkipLayerGuidance):  # type: ignore[misc]
        """Asks for a third prediction, from all layers: which to leave out is known for few models."""

        def prepare_models(self, denoiser: Any) -> None:
            self._count_prepared += 1

        def cleanup_models(self, denoiser: Any) -> None:
            pass

    pipe = family.make(scheduler=FixedPath())
    patch = REUSE(pipe)
    two = transformer_outputs(family, pipe, steps=STEPS)
    pipe.guider = Third(
        guidance_scale=4.0,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=diffusers.LayerSkipConfig(indices=[2], fqn="transformer_blocks"),
    )
    three = transformer_outputs(family, pipe, steps=STEPS)
    run = patch.stats.runs[-1]
    assert len(three) == 3 * STEPS - 1, "the first step has no third prediction"
    assert [len(branch.computed) for branch in run.branches.values()] == [STEPS, STEPS, STEPS - 1]
    three.insert(2, three[0])
    for index in range(2):
        assert all(torch.equal(one, other) for one, other in zip(three[index::3], two[index::2], strict=True))
    assert skips_some(patch)


# Two experts


def experts(**knobs: Any) -> tuple[Any, Any]:
    family = present("wan22")
    pipe = family.make()
    patch = apply_cache_dit(pipe, **{"residual_diff_threshold": 10.0, **knobs})
    family.run(pipe, steps=12)
    run = patch.stats.runs[-1]
    assert run.steps == 12
    assert run.branches["cond"].components == ("transformer",) * 6 + ("transformer_2",) * 6
    assert run.branches["cond"].computed == run.branches["uncond"].computed
    return run.branches["cond"], patch


def test_mask_counts_the_steps_of_both_experts() -> None:
    mask = [1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1]
    branch, _ = experts(steps_mask=mask, steps_policy="static")
    assert branch.computed == tuple(map(bool, mask))


def test_mask_that_skips_an_experts_first_step() -> None:
    """There is nothing to reuse yet, so it is computed; the mask goes on as laid down."""
    mask = [1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1]
    branch, _ = experts(steps_mask=mask, steps_policy="static")
    mask[6] = 1
    assert branch.computed == tuple(map(bool, mask))


def test_warmup_counts_each_experts_own_steps() -> None:
    branch, _ = experts(max_warmup_steps=3, max_continuous_cached_steps=None)
    assert branch.computed == (True, True, True, False, False, False) * 2


def test_secondary_settings_are_the_second_experts() -> None:
    branch, _ = experts(
        max_warmup_steps=3, max_continuous_cached_steps=None, secondary={"max_warmup_steps": 1, "fn_compute_blocks": 2}
    )
    assert branch.computed == (True, True, True, False, False, False, True, False, False, False, False, False)
    skipped = {record.component: record.blocks_run for record in branch.records if not record.computed}
    assert skipped == {"transformer": 1, "transformer_2": 2}


def test_first_expert_lets_go_when_the_second_takes_over() -> None:
    """At the latest at the end of the run nothing of either is held."""
    _, patch = experts(max_warmup_steps=1)
    assert patch.held_bytes() == 0
