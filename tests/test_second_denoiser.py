"""A pipeline with a denoiser for each branch (Ideogram 4): both are patched, and both skip the same steps."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from invariants import CACHES, NEVER_SKIPPING, Apply, Snapshot, assert_same, count_blocks
from invariants.families import present
from sgl_diffusion_accel import (
    CachePatch,
    ConfigError,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    apply_magcache,
    apply_teacache,
    attention_backends,
    calibrate,
    check_plan,
    fit_teacache,
    profile,
    remove,
    set_attention_backend,
)
from zoo import Family
from zoo.base import flow_euler

COMPONENTS = ("transformer", "unconditional_transformer")
STEPS = 20


@pytest.fixture
def family() -> Family:
    return present("ideogram4")


@pytest.fixture
def pipe(family: Family) -> Any:
    return family.make()


def ran(family: Family, pipe: Any, **call: Any) -> dict[str, int]:
    """How often the last block of each denoiser ran in one run."""
    with count_blocks(family, pipe) as counts:
        family.run(pipe, **{"steps": STEPS, **call})
    return {name: counts[name, "layers", 5] for name in COMPONENTS}


def check(patch: CachePatch) -> None:
    """One branch for each denoiser, named by what it is for, with a record for each step."""
    run = patch.stats.runs[-1]
    assert list(run.branches) == ["cond", "uncond"]
    for branch, component in zip(run.branches.values(), COMPONENTS, strict=True):
        assert branch.components == (component,) * run.steps
        assert [record.step for record in branch.records] == list(range(run.steps))
    assert patch.stats.outside == 0


def test_adaptive_cache_skips_both_on_the_same_steps(family: Family, pipe: Any) -> None:
    patch = apply_adaptive_cache(pipe, 0.1)
    counts = ran(family, pipe)
    check(patch)
    one, other = (branch.computed for branch in patch.stats.runs[-1].branches.values())
    assert one == other
    assert counts == dict.fromkeys(COMPONENTS, sum(one))
    assert sum(one) < STEPS
    assert "another model or shape" not in patch.stats.runs[-1].branches["cond"].reasons


def test_plan_computes_both_at_its_steps(family: Family, pipe: Any) -> None:
    call = family.call(pipe, steps=STEPS, seed=3)
    plan = calibrate(pipe, [call])
    assert plan.transformers == ("Ideogram4Transformer2DModel",) * 2
    assert plan.magnitude_ratios is not None
    assert {name: list(branches) for name, branches in plan.magnitude_ratios.ratios.items()} == {
        "transformer": ["cond"],
        "unconditional_transformer": ["uncond"],
    }
    assert plan.teacache is not None
    plan = check_plan(pipe, plan, [call], [2.0])
    patch = apply_cache_plan(pipe, plan, speedup=2.0)
    assert ran(family, pipe) == dict.fromkeys(COMPONENTS, 10)
    check(patch)


@pytest.mark.parametrize("name", list(CACHES))
def test_each_cache_is_on_both(family: Family, pipe: Any, name: str) -> None:
    expected = family.run(pipe)
    before = Snapshot(pipe)
    patch = CACHES[name](pipe)
    assert patch.components == list(COMPONENTS)
    counts = ran(family, pipe, steps=6)
    check(patch)
    computed = [sum(branch.computed) for branch in patch.stats.runs[-1].branches.values()]
    assert list(counts.values()) == (computed if name != "taylor" else [6, 6])  # its last block is of the tail
    assert max(computed) < 6
    patch.remove()
    assert_same(before, pipe)
    assert torch.equal(family.run(pipe), expected)


@pytest.mark.parametrize("apply", NEVER_SKIPPING.values(), ids=NEVER_SKIPPING)
def test_nothing_changes_where_nothing_is_skipped(family: Family, pipe: Any, apply: Apply) -> None:
    expected = family.run(pipe)
    apply(pipe)
    assert torch.equal(family.run(pipe), expected)


def test_gap_control_of_blocks_decides_for_both_together(family: Family, pipe: Any) -> None:
    patch = apply_cache_dit(pipe, tolerance=0.1, taylorseer_order=1, fn_compute_blocks=0)
    family.run(pipe, steps=STEPS)
    check(patch)
    one, other = (branch.computed for branch in patch.stats.runs[-1].branches.values())
    assert one == other
    assert sum(one) < STEPS


def test_teacache_is_fitted_on_both_and_shared(family: Family, pipe: Any) -> None:
    coefficients = fit_teacache(pipe, [family.call(pipe, steps=STEPS)])
    assert coefficients.secondary is None
    patch = apply_teacache(pipe, 0.1, coefficients=coefficients)
    family.run(pipe, steps=STEPS)
    check(patch)
    assert all(not all(branch.computed) for branch in patch.stats.runs[-1].branches.values())


def test_denoiser_that_does_not_run_is_left_out_of_a_fit() -> None:
    """One that the calls have no use for: a model for references, and calls without any."""
    wan = present("wan")
    pipe = wan.make()
    calls = [wan.call(pipe, steps=12)]
    assert fit_teacache(Extra(pipe, wan.make(seed=1).transformer), calls) == fit_teacache(pipe, calls)


class Extra:
    """A pipeline with one component more than its class knows of."""

    def __init__(self, pipe: Any, extra: Any) -> None:
        self._pipe = pipe
        self.components = {**pipe.components, "extra": extra}

    def __call__(self, **call: Any) -> Any:
        return self._pipe(**call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def test_ratios_of_one_denoiser_alone_are_refused(family: Family, pipe: Any) -> None:
    plan = calibrate(pipe, [family.call(pipe, steps=STEPS)], teacache=False)
    assert plan.magnitude_ratios is not None
    some = type(plan.magnitude_ratios)({"transformer": plan.magnitude_ratios.ratios["transformer"]})
    with pytest.raises(ConfigError, match="unconditional_transformer"):
        apply_magcache(pipe, some)


def test_secondary_is_for_the_second_expert_alone(pipe: Any) -> None:
    with pytest.raises(ConfigError, match="transformer_2"):
        apply_cache_dit(pipe, secondary={"residual_diff_threshold": 0.1})
    with pytest.raises(ConfigError, match="transformer_2"):
        apply_teacache(pipe, 0.1, coefficients=[0, 0, 0, 1, 0], secondary={"teacache_thresh": 0.2})


def test_attention_backend_is_set_on_both_unless_one_is_named(family: Family, pipe: Any) -> None:
    expected = family.run(pipe)
    patch = set_attention_backend(pipe, "math")
    assert patch.backends == dict.fromkeys(COMPONENTS, "math")
    torch.testing.assert_close(family.run(pipe), expected, rtol=1e-4, atol=1e-4)
    assert patch.calls == {name: {"math": 6 * 6} for name in COMPONENTS}
    assert set_attention_backend(pipe, {"transformer": "math"}).backends == dict.fromkeys(COMPONENTS, "math")
    named = {"transformer": "math", "unconditional_transformer": "sdpa"}
    assert set_attention_backend(pipe, named).backends == named
    remove(pipe)
    only = set_attention_backend(pipe, "math", components="unconditional_transformer")
    assert only.backends == {"unconditional_transformer": "math"}
    assert any(each.is_usable for each in attention_backends(pipe, "unconditional_transformer"))


def test_profile_shows_both_as_branches_of_a_step(family: Family, pipe: Any) -> None:
    with profile(pipe, trace=False) as prof:
        family.run(pipe)
    branches = {
        (branch.name, branch.component) for call in prof.report.calls for step in call.steps for branch in step.branches
    }
    assert branches == {("cond", "transformer"), ("uncond", "unconditional_transformer")}


def test_modular_pipeline_skips_both_on_the_same_steps(family: Family, pipe: Any) -> None:
    blocks = importlib.import_module("diffusers.modular_pipelines.ideogram4.denoise").Ideogram4DenoiseStep()
    modular = blocks.init_pipeline()
    modular.update_components(**{name: getattr(pipe, name) for name in (*COMPONENTS, "scheduler")})
    modular.set_progress_bar_config(disable=True)
    call, steps = family.call(pipe), 12
    longest = call["max_sequence_length"]
    embeds, *layout = pipe.encode_prompt(call["prompt"], 4, 4, longest, None)
    layout = dict(zip(("position_ids", "segment_ids", "indicator"), layout, strict=True))
    pipe.scheduler.set_timesteps(steps)
    patch = apply_adaptive_cache(modular, 0.1)
    modular(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds[:, longest:]),
        **layout,
        **{f"negative_{name}": value[:, longest:] for name, value in layout.items()},
        gw=torch.full((steps,), 4.0),
        latents=call["latents"],
        timesteps=pipe.scheduler.timesteps,
        num_inference_steps=steps,
        batch_size=1,
    )
    check(patch)
    one, other = (branch.computed for branch in patch.stats.runs[-1].branches.values())
    assert one == other
    assert sum(one) < steps


class Constant(nn.Module):
    """Says the same at each step."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value), requires_grad=False)

    def forward(self, hidden: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(hidden) * self.value


class TwoInTheDark(DiffusionPipeline):
    """A pipeline of somebody's own, with a second denoiser under a name that tells nothing."""

    def __init__(self, transformer: nn.Module, refiner: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, refiner=refiner, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)
        self.seen: list[tuple[float, float]] = []

    @torch.no_grad()
    def __call__(self, steps: int) -> None:
        self.scheduler.set_timesteps(steps)
        timesteps, hidden = self.scheduler.timesteps, torch.ones(2, 4)
        with self.progress_bar(total=steps) as progress_bar:
            for t in timesteps:
                said = [self.transformer(hidden, t), self.refiner(hidden, t)]
                self.seen.append((float(said[0].mean()), float(said[1].mean())))
                hidden = self.scheduler.step(said[0] + said[1], t, hidden, return_dict=False)[0]
                progress_bar.update()


def test_second_denoiser_that_is_known_by_its_class_alone_keeps_its_own_outputs() -> None:
    pipe = TwoInTheDark(Constant(1.0), Constant(2.0), flow_euler())
    patch = apply_adaptive_cache(pipe, 0.1)
    pipe(STEPS)
    assert patch.components == ["transformer", "refiner"]
    run = patch.stats.runs[-1]
    assert set(run.branches) == {"cond", "cond of refiner"}
    assert torch.tensor(pipe.seen).sub(torch.tensor([1.0, 2.0])).abs().max() < 1e-5
    assert all(len(branch.records) == STEPS for branch in run.branches.values())
    assert all(sum(branch.computed) < STEPS for branch in run.branches.values())
