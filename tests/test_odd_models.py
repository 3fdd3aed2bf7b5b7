"""Transformers and pipelines out of the ordinary: cached rightly, or refused with a word.

The blocks of the toys add a constant that does not depend on the step. So a skipped step must give exactly what a
computed one gives, and any difference to the unpatched pipeline is a mistake.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from invariants.families import present
from sgl_diffusion_accel import (
    CacheDiTConfig,
    CachePatch,
    ConfigTypeError,
    UnsupportedModelError,
    apply_cache_dit,
    apply_teacache,
    remove,
)

STEPS = 12
MASK = [1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1]
STATIC_0 = {"fn_compute_blocks": 0, "steps_mask": MASK, "steps_policy": "static"}
STATIC_1 = {**STATIC_0, "fn_compute_blocks": 1}
DEFAULT: dict[str, Any] = {}
TEACACHE: dict[str, Any] = {"teacache_thresh": 0.25, "coefficients": [0, 0, 0, 0, 0.1]}
SETTINGS = {"static, fn 0": STATIC_0, "static, fn 1": STATIC_1, "default": DEFAULT, "teacache": TEACACHE}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())

LATENTS = torch.full((2, 4, 8), 0.5)
PROMPT, NEGATIVE = torch.full((1, 4, 8), 2.0), torch.full((1, 4, 8), 7.0)


def apply(target, settings) -> CachePatch:
    return apply_teacache(target, **settings) if "teacache_thresh" in settings else apply_cache_dit(target, **settings)


class Block(nn.Module):
    """Adds 1."""

    def __init__(self):
        super().__init__()
        self.attn = nn.Identity()

    def forward(self, hidden_states):
        return self.attn(hidden_states) + 1


class Toy(nn.Module):
    """Runs its blocks one after the other."""

    def __init__(self, block=Block, count=4):
        super().__init__()
        self.step = 0
        self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, hidden_states, timestep=None, context=None):
        return self.run(hidden_states * 2, context) * 1.0

    def run(self, x, context):
        for block in self.blocks:
            x = block(x)
        return x


class Pipe(DiffusionPipeline):
    """Loops as most pipelines of diffusers do."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, prompt_embeds=None, steps=STEPS):
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        outputs = []
        with self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(timesteps):
                self.transformer.step = i
                outputs += self.predict(i, t, prompt_embeds)
                progress_bar.update()
        return outputs

    def predict(self, i, t, prompt_embeds):
        return [self.transformer(LATENTS.clone(), t, context=prompt_embeds)]


def make(transformer, pipeline=Pipe):
    return pipeline(transformer, FlowMatchEulerDiscreteScheduler())


def marks(patch: CachePatch, branch: str = "cond") -> str:
    """The last run's steps of a branch: # computed, . skipped."""
    return "".join("#" if computed else "." for computed in patch.stats.runs[-1].branches[branch].computed)


def pattern(settings) -> str:
    """The steps as the settings lay them down, where the signal stays the same."""
    if settings is DEFAULT:
        return "####...#...#"
    return "#..#..#..#.#" if settings is TEACACHE else "##..#..#...#"


def assert_equal(outputs, expected):
    assert len(outputs) == len(expected)
    for output, one in zip(outputs, expected, strict=True):
        assert torch.equal(output, one)


def check(transformer, settings, pipeline=Pipe, runs=2, **given) -> CachePatch:
    """Asserts that cached runs give what unpatched ones give, skip steps, and keep nothing."""
    pipe = make(transformer, pipeline)
    expected = pipe(**given)
    patch = apply(pipe, settings)
    for _ in range(runs):
        assert_equal(pipe(**given), expected)
        run = patch.stats.runs[-1]
        assert any("." in marks(patch, name) for name in run.branches)
        assert patch.held_bytes() == 0
    assert patch.stats.outside == 0
    patch.remove()
    assert_equal(pipe(**given), expected)
    return patch


def check_refused(transformer, settings, match, pipeline=Pipe):
    """Asserts that a run is refused, that nothing is kept of it, and that all is well after removal."""
    pipe = make(transformer, pipeline)
    expected = pipe()
    patch = apply(pipe, settings)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=match):
            pipe()
        assert patch.held_bytes() == 0
    patch.remove()
    assert_equal(pipe(), expected)


@every_setting
def test_plain_toy_is_cached_exactly(settings):
    """So that the comparisons below compare something."""
    patch = check(Toy(), settings)
    assert marks(patch) == pattern(settings)


# Blocks that write over their input


class Within(Block):
    def forward(self, hidden_states):
        self.attn(hidden_states)
        hidden_states += 1
        return hidden_states


class WithinAndOut(Block):
    def forward(self, hidden_states):
        self.attn(hidden_states)
        hidden_states += 1
        return hidden_states + 1


class HeadApart(Toy):
    """Its first block leaves its input alone."""

    def __init__(self):
        super().__init__(WithinAndOut)
        self.blocks[0] = Block()


@every_setting
@pytest.mark.parametrize("toy", [lambda: Toy(Within), lambda: Toy(WithinAndOut), HeadApart])
def test_blocks_that_write_over_their_input_are_cached(settings, toy):
    """The first step shows it and keeps nothing; inputs are copied from then on, also in later runs."""
    patch = check(toy(), settings)
    first, second = (run.branches["cond"].computed for run in patch.stats.runs)
    if not (settings is TEACACHE and toy is HeadApart):  # its span starts at the block that leaves its input alone
        assert all(first[:2])
    assert not all(first[2:])
    assert not all(second[2:])
    if settings is not DEFAULT:
        assert "".join("#" if computed else "." for computed in second) == pattern(settings)


@every_setting
@pytest.mark.parametrize("block", [Within, WithinAndOut])
def test_blocks_that_write_over_inference_tensors_are_cached(settings, block):
    """Torch counts no writes to inference tensors, so they are copied from the start."""
    with torch.inference_mode():
        patch = check(Toy(block), settings)
    assert not all(patch.stats.runs[0].branches["cond"].computed[2:])


@pytest.mark.parametrize("block", [Within, WithinAndOut])
def test_skip_right_after_a_step_that_wrote_over_its_input_is_computed(block):
    """At the second step of the first run there is nothing to reuse yet; in the second run there is."""
    pipe = make(Toy(block))
    expected = pipe(steps=4)
    patch = apply_cache_dit(pipe, fn_compute_blocks=0, steps_mask=[1, 0, 0, 1], steps_policy="static")
    assert_equal(pipe(steps=4), expected)
    assert marks(patch) == "##.#"
    assert_equal(pipe(steps=4), expected)
    assert marks(patch) == "#..#"


# Blocks that are not called in their order


class Twice(Toy):
    def run(self, x, context):
        return super().run(super().run(x, context), context)


class Backwards(Toy):
    def run(self, x, context):
        for block in reversed(self.blocks):
            x = block(x)
        return x


class TwoLists(Toy):
    def __init__(self):
        super().__init__()
        self.others = nn.ModuleList(Block() for _ in range(4))


class Interleaved(TwoLists):
    def run(self, x, context):
        for block, other in zip(self.blocks, self.others, strict=True):
            x = other(block(x))
        return x


class InterleavedSecondFirst(TwoLists):
    def run(self, x, context):
        for block, other in zip(self.blocks, self.others, strict=True):
            x = block(other(x))
        return x


class LeavesOut(Toy):
    """Leaves out a block at each odd step."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def run(self, x, context):
        for index, block in enumerate(self.blocks):
            if index != self.index or self.step % 2 == 0:
                x = block(x)
        return x


DYNAMIC = {"max_warmup_steps": 2}


@pytest.mark.parametrize(
    "settings",
    [STATIC_0, STATIC_1, DYNAMIC, TEACACHE],
    ids=["static, fn 0", "static, fn 1", "dynamic", "teacache"],
)
@pytest.mark.parametrize(
    ("toy", "name"),
    [
        (Twice, r"Twice\.blocks"),
        (Backwards, r"Backwards\.blocks"),
        (Interleaved, r"Interleaved\.blocks"),
        (InterleavedSecondFirst, r"InterleavedSecondFirst\.(blocks|others)"),
        (lambda: LeavesOut(0), r"LeavesOut\.blocks"),
        (lambda: LeavesOut(1), r"LeavesOut\.blocks"),
        (lambda: LeavesOut(3), r"LeavesOut\.blocks"),
    ],
    ids=["twice", "backwards", "interleaved", "interleaved second first", "no first", "no middle", "no last"],
)
def test_blocks_out_of_order_are_refused_by_the_name_of_their_list(toy, name, settings):
    check_refused(toy(), settings, name)


@every_setting
def test_block_that_is_twice_in_a_list_is_refused_when_applying(settings):
    toy = Toy()
    toy.blocks.append(toy.blocks[0])
    pipe = make(toy)
    with pytest.raises(UnsupportedModelError, match=r"Toy\.blocks holds a block more than once"):
        apply(pipe, settings)
    assert type(toy) is Toy
    assert type(toy.blocks[0]) is Block


# What blocks return


class Named(NamedTuple):
    hidden: torch.Tensor
    rest: torch.Tensor | None


class ReturnsNamed(Block):
    def forward(self, hidden_states):
        return Named(self.attn(hidden_states) + 1, None)


class ReturnsList(Block):
    def forward(self, hidden_states):
        return [self.attn(hidden_states) + 1]


class ReturnsTuple(Block):
    def forward(self, hidden_states):
        return self.attn(hidden_states) + 1, None


class ReturnsDict(Block):
    def forward(self, hidden_states):
        return {"hidden": self.attn(hidden_states) + 1}


class TakesFirst(Toy):
    def run(self, x, context):
        for block in self.blocks:
            output = block(x)
            assert type(output) in (tuple, list)
            x = output[0]
        return x


class TakesNamed(Toy):
    def run(self, x, context):
        for block in self.blocks:
            output = block(x)
            assert type(output) is Named
            assert output.rest is None
            x = output.hidden
        return x


class TakesDict(Toy):
    def run(self, x, context):
        for block in self.blocks:
            x = block(x)["hidden"]
        return x


class EndsWithTensor(Toy):
    def __init__(self):
        super().__init__(ReturnsTuple)
        self.blocks[-1] = Block()

    def run(self, x, context):
        for block in self.blocks[:-1]:
            x = block(x)[0]
        return self.blocks[-1](x)


@every_setting
@pytest.mark.parametrize(
    ("toy", "block"),
    [(TakesNamed, ReturnsNamed), (TakesFirst, ReturnsList), (TakesFirst, ReturnsTuple)],
    ids=["namedtuple", "list", "tuple with None"],
)
def test_output_keeps_its_form(settings, toy, block):
    check(toy(block), settings)


@every_setting
def test_output_that_is_a_dict_is_refused_by_its_type(settings):
    check_refused(TakesDict(ReturnsDict), settings, "a block returns a dict")


@every_setting
def test_last_block_with_another_form_of_output_is_refused(settings):
    check_refused(EndsWithTensor(), settings, r"blocks of EndsWithTensor\.blocks return 2 things, but one of them 1")


class OptionalStream(Block):
    """Returns the context too, where it has one."""

    def forward(self, hidden_states, context=None):
        if context is None:
            return self.attn(hidden_states) + 1
        return self.attn(hidden_states) + 2, context + 3


class TakesContext(Toy):
    def __init__(self):
        super().__init__(OptionalStream)

    def run(self, x, context):
        for block in self.blocks:
            if context is None:
                x = block(x)
            else:
                x, context = block(x, context)
        return x if context is None else x + context.mean()


class OnePromptOnly(Pipe):
    """Guidance whose second call has no context at all."""

    def predict(self, i, t, prompt_embeds):
        latents = LATENTS.clone()
        return [self.transformer(latents, t, context=prompt_embeds), self.transformer(latents, t)]


@every_setting
def test_stream_that_comes_and_goes_between_runs(settings):
    pipe = make(TakesContext())
    expected = {given: pipe(given) for given in (None, PROMPT)}
    patch = apply(pipe, settings)
    for given in (PROMPT, None, PROMPT, None, None):
        assert_equal(pipe(given), expected[given])
        assert "." in marks(patch)


@every_setting
def test_stream_that_only_one_branch_has(settings):
    patch = check(TakesContext(), settings, OnePromptOnly, prompt_embeds=PROMPT)
    run = patch.stats.runs[-1]
    assert [len(branch.records) for branch in run.branches.values()] == [STEPS, STEPS]
    assert all("." in marks(patch, name) for name in run.branches)


class ContextEnds(Pipe):
    """Goes on without context in mid-run, on the same branch."""

    def predict(self, i, t, prompt_embeds):
        return [self.transformer(LATENTS.clone(), t, context=prompt_embeds if i < 6 else None)]


@every_setting
def test_stream_that_ends_in_mid_run(settings):
    patch = check(TakesContext(), settings, ContextEnds, prompt_embeds=PROMPT)
    assert "." in marks(patch)[:6]
    assert marks(patch)[6] == "#"
    assert "." in marks(patch)[7:]


# How blocks are called


class MixedCalls(Toy):
    """By position and by name in turns, within a call and from step to step."""

    def run(self, x, context):
        for index, block in enumerate(self.blocks):
            x = block(x) if (index + self.step) % 2 else block(hidden_states=x)
        return x


@every_setting
def test_blocks_called_by_position_and_by_name_in_turns(settings):
    check(MixedCalls(), settings)


@pytest.mark.parametrize("before", [False, True], ids=["switched on after a run", "switched off after a run"])
def test_gradient_checkpointing_that_changes_between_runs(before):
    """With it FLUX calls its blocks by position, without it by name."""
    family = present("flux")
    knobs = {"max_warmup_steps": 2, "residual_diff_threshold": 0.5}

    def run(pipe, checkpointing):
        transformer = pipe.transformer.requires_grad_(checkpointing)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        else:
            transformer.disable_gradient_checkpointing()
        with torch.set_grad_enabled(checkpointing):
            given = family.call(pipe, steps=6)
            (output,) = type(pipe).__call__.__wrapped__(pipe, **given, return_dict=False)
        assert output.requires_grad is checkpointing
        return output.detach()

    fresh = family.make()
    apply_cache_dit(fresh, **knobs)
    expected = run(fresh, not before)
    pipe = family.make()
    patch = apply_cache_dit(pipe, **knobs)
    run(pipe, before)
    assert torch.equal(run(pipe, not before), expected)
    assert "." in marks(patch)
    assert len(patch.stats.runs) == 2


# Branches that no name tells apart


class AddsContext(Block):
    """Adds the conditioning's mean: residuals of one branch are wrong for the other."""

    def forward(self, hidden_states, context):
        return self.attn(hidden_states) + context.mean()


class Conditioned(Toy):
    def __init__(self):
        super().__init__(AddsContext)

    def run(self, x, context):
        for block in self.blocks:
            x = block(x, context)
        return x


class OrderedBranches(Pipe):
    """Holds the conditioning in a dict, and calls its branches as `order` tells for each step."""

    def predict(self, i, t, prompt_embeds):
        embeds, latents = {"neg": NEGATIVE, "pos": PROMPT}, LATENTS.clone()
        return [self.transformer(latents, t, context=embeds[name]) for name in self.order(i)]


class Truncated(OrderedBranches):
    def order(self, i):
        return ("neg", "pos") if i < 6 else ("pos",)


class Swapping(OrderedBranches):
    def order(self, i):
        return ("neg", "pos") if i % 2 == 0 else ("pos", "neg")


class SwappingLists(Swapping):
    """Hands the conditioning over in a list, made anew at each step."""

    def predict(self, i, t, prompt_embeds):
        embeds, latents = {"neg": NEGATIVE, "pos": PROMPT}, LATENTS.clone()
        return [self.transformer(latents, t, context=[embeds[name]]) for name in self.order(i)]


class ConditionedByList(Conditioned):
    def run(self, x, context):
        return super().run(x, context[0])


@every_setting
def test_conditioning_in_lists_tells_the_branches_apart(settings):
    patch = check(ConditionedByList(), settings, SwappingLists)
    assert all("." in marks(patch, name) for name in patch.stats.runs[-1].branches)


@every_setting
def test_guidance_that_ends_leaves_the_other_branch_its_own_residuals(settings):
    patch = check(Conditioned(), settings, Truncated)
    lengths = [len(branch.records) for branch in patch.stats.runs[-1].branches.values()]
    assert lengths == [6, STEPS]


@every_setting
def test_branches_that_swap_their_order_keep_their_own_residuals(settings):
    patch = check(Conditioned(), settings, Swapping)
    branches = patch.stats.runs[-1].branches
    assert [len(branch.records) for branch in branches.values()] == [STEPS, STEPS]
    assert all("." in marks(patch, name) for name in branches)


# Limits over a change of shape


class Shrinking(Pipe):
    """Loses half its batch in mid-run, as where guidance in one batched call ends."""

    def predict(self, i, t, prompt_embeds):
        return [self.transformer(LATENTS.clone() if i < 6 else LATENTS[:1].clone(), t)]


@pytest.mark.parametrize("most", [0, 1, 2, 3, 5])
def test_most_cached_steps_hold_over_a_change_of_the_batch(most):
    pipe = make(Toy(), Shrinking)
    expected = pipe()
    patch = apply_cache_dit(pipe, max_warmup_steps=2, max_cached_steps=most)
    assert_equal(pipe(), expected)
    assert marks(patch).count(".") == most


# Caches of diffusers


def first_block_cache(transformer):
    diffusers.hooks.apply_first_block_cache(transformer, diffusers.FirstBlockCacheConfig(threshold=0.1))


def attention_broadcast(transformer):
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    diffusers.hooks.apply_pyramid_attention_broadcast(transformer, config)


def faster_cache(transformer):
    config = diffusers.FasterCacheConfig(current_timestep_callback=lambda: 500)
    diffusers.hooks.apply_faster_cache(transformer, config)


def mag_cache(transformer):
    config = diffusers.MagCacheConfig(mag_ratios=torch.ones(6), num_inference_steps=6)
    diffusers.hooks.apply_mag_cache(transformer, config)


def taylorseer_cache(transformer):
    diffusers.hooks.apply_taylorseer_cache(transformer, diffusers.TaylorSeerCacheConfig(cache_identifiers=[r".*attn1"]))


@pytest.fixture(params=[first_block_cache, attention_broadcast, faster_cache, mag_cache, taylorseer_cache])
def foreign(request):
    config = {mag_cache: "MagCacheConfig", taylorseer_cache: "TaylorSeerCacheConfig"}.get(request.param)
    if config is not None and not hasattr(diffusers, config):
        pytest.skip(f"this diffusers has no {config}")
    return request.param


def test_foreign_cache_that_was_applied_by_function_is_refused_when_applying(foreign):
    pipe = present("wan").make()
    foreign(pipe.transformer)
    with pytest.raises(UnsupportedModelError, match="own caches"):
        apply_cache_dit(pipe)


def test_foreign_cache_that_is_applied_by_function_later_is_refused_at_the_next_run(foreign):
    family = present("wan")
    pipe = family.make()
    patch = apply_cache_dit(pipe)
    family.run(pipe, steps=2)
    foreign(pipe.transformer)
    with pytest.raises(UnsupportedModelError, match=r"own caches.*remove\(pipe\)"):
        family.run(pipe, steps=2)
    assert patch.held_bytes() == 0
    remove(pipe)
    assert type(pipe.transformer) is diffusers.WanTransformer3DModel


def test_foreign_cache_that_was_taken_off_again_is_no_obstacle():
    family = present("wan")
    pipe = family.make()
    expected = family.run(pipe, steps=2)
    first_block_cache(pipe.transformer)
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    for name in ("fbc_leader_block_hook", "fbc_block_hook"):
        registry.remove_hook(name, recurse=True)
    patch = apply_cache_dit(pipe, residual_diff_threshold=0)
    assert torch.equal(family.run(pipe, steps=2), expected)
    assert len(patch.stats.runs) == 1


# Pipelines that tell little


class Unplaced(Pipe):
    """Neither an element of the timesteps, nor numbers of theirs, nor a count of them among the loop's variables."""

    @torch.no_grad()
    def __call__(self):
        self.scheduler.set_timesteps(STEPS)
        timesteps = self.scheduler.timesteps.tolist()
        outputs = []
        self.transformer.step = 0
        while timesteps:
            outputs.append(self.transformer(LATENTS.clone(), timesteps.pop(0)))
            self.transformer.step += 1
        return outputs


@every_setting
def test_loop_that_cannot_be_placed_is_computed_in_full_with_one_warning(settings, caplog):
    pipe = make(Toy(), Unplaced)
    expected = pipe()
    patch = apply(pipe, settings)
    with caplog.at_level(logging.WARNING, "sgl_diffusion_accel"):
        assert_equal(pipe(), expected)
        assert_equal(pipe(), expected)
    assert patch.stats.outside == 2 * STEPS
    assert patch.stats.runs == ()
    assert len(caplog.records) == 1
    assert "Unplaced.__call__ has no variable that proves the step" in caplog.text
    assert f"{2 * STEPS} calls not placed" in str(patch)


class KeepsLocals(Pipe):
    @torch.no_grad()
    def __call__(self):
        self.scheduler.set_timesteps(STEPS)
        timesteps, latents = self.scheduler.timesteps, LATENTS.clone()
        outputs = []
        held = locals()
        for i, t in enumerate(timesteps):
            outputs.append(self.transformer(held["latents"], t))
            assert held["self"] is self
            assert held["outputs"] is outputs
            assert i < STEPS
        return outputs


@every_setting
def test_locals_that_a_pipeline_holds_stay(settings):
    check(Toy(), settings, KeepsLocals)


class Idle(Toy):
    def run(self, x, context):
        return x


@every_setting
def test_transformer_that_does_not_call_its_blocks_gives_one_warning(settings, caplog):
    pipe = make(Idle())
    expected = pipe()
    apply(pipe, settings)
    with caplog.at_level(logging.WARNING, "sgl_diffusion_accel"):
        for _ in range(2):
            assert_equal(pipe(), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "Idle ran without calling its blocks: nothing can be cached."
    ]


# What users hand over


@pytest.mark.parametrize(
    "mask",
    [np.array(MASK), np.array(MASK, dtype=bool), torch.tensor(MASK), list(np.array(MASK)), tuple(MASK)],
    ids=["array", "booleans", "tensor", "list of numpy integers", "tuple"],
)
def test_masks_of_other_types_are_accepted(mask):
    settings = {**STATIC_0, "steps_mask": mask}
    assert CacheDiTConfig(**settings) == CacheDiTConfig(**STATIC_0)
    assert marks(check(Toy(), settings)) == "##..#..#...#"


def test_mask_of_bytes_is_refused():
    with pytest.raises(ConfigTypeError, match="steps_mask is a bytes"):
        CacheDiTConfig(steps_mask=bytes(MASK), steps_policy="static")


def test_numbers_of_numpy_are_accepted():
    config = CacheDiTConfig(
        fn_compute_blocks=np.int64(1),
        max_warmup_steps=np.int32(2),
        residual_diff_threshold=np.float32(0.5),
        max_continuous_cached_steps=np.int64(-1),
        max_cached_steps=np.uint8(4),
        max_accumulated_residual_diff=np.float64(2),
    )
    assert config == CacheDiTConfig(
        max_warmup_steps=2,
        residual_diff_threshold=0.5,
        max_continuous_cached_steps=None,
        max_cached_steps=4,
        max_accumulated_residual_diff=2.0,
    )
    assert type(config.fn_compute_blocks) is int
    assert type(config.residual_diff_threshold) is float


class TwoExperts(Pipe):
    def __init__(self, transformer, transformer_2, scheduler):
        super().__init__(transformer, scheduler)
        self.register_modules(transformer_2=transformer_2)


def test_replacing_a_patch_through_a_pipeline_with_one_of_its_transformers_warns(caplog):
    one, other = Toy(), Toy()
    both = TwoExperts(one, other, FlowMatchEulerDiscreteScheduler())
    alone = make(one)
    old = apply_cache_dit(both)
    with caplog.at_level(logging.WARNING, "sgl_diffusion_accel"):
        new = apply_cache_dit(alone)
    assert len(caplog.records) == 1
    assert "was also on transformer and transformer_2: it is gone there" in caplog.text
    assert not old.active
    assert new.active
    assert type(other) is Toy
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sgl_diffusion_accel"):
        apply_cache_dit(both)
        apply_cache_dit(both)
    assert caplog.records == []


def test_summary_counts_the_runs_that_are_no_longer_kept():
    pipe = make(Toy(count=2))
    patch = apply_cache_dit(pipe)
    for _ in range(66):
        pipe(steps=1)
    assert len(patch.stats.runs) == 64
    assert "run 66: 1 steps" in str(patch)
