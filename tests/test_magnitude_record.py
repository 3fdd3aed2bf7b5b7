"""Recording magnitudes: what plain hooks see in uncached runs, what diffusers' MagCache measures, little memory."""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from invariants import families
from invariants.families import present
from sgl_diffusion_accel import ConfigError, calibrate
from sgl_diffusion_accel.calibration.magnitude_record import MagnitudeRecorder, token_norms
from zoo import Family

STEPS = 8


def hidden(value: Any) -> Tensor:
    """The stream that becomes the picture, of what Wan's and Qwen-Image's blocks return."""
    return value[1] if isinstance(value, tuple) else value


def observed(family: Family, pipe: Any, call: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    """What the block list has added at each call of each transformer, by plain hooks."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in family.transformers}
    entering: list[Tensor] = []
    hooks = []
    for name in family.transformers:
        blocks = getattr(getattr(pipe, name), family.block_lists[0])

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            entering.append((args[0] if args else kwargs["hidden_states"]).clone())

        def leave(module: Any, args: Any, output: Any, name: str = name) -> None:
            seen[name].append((hidden(output) - entering.pop()).double().numpy())

        hooks += [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
        hooks += [blocks[-1].register_forward_hook(leave)]
    with torch.no_grad():
        pipe(**call)
    for hook in hooks:
        hook.remove()
    return seen


def gammas(residuals: list[np.ndarray]) -> list[float]:
    """Mean over tokens of the ratio of norms, from step to step."""
    norms = [np.linalg.norm(residual, axis=-1) for residual in residuals]
    return [float((now / before).mean()) for before, now in itertools.pairwise(norms)]


def known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


@families("wan", "qwen", "wan22")
def test_ratios_are_those_of_what_hooks_see_in_uncached_runs(family: Family) -> None:
    pipe = family.make()
    calls = [family.call(pipe, steps=STEPS, seed=seed) for seed in (0, 1)]
    ratios = calibrate(pipe, calls, teacache=False).magnitude_ratios
    seen = [observed(family, pipe, call) for call in calls]
    assert ratios.steps == STEPS
    assert ratios.calls == 2
    for name in family.transformers:
        for place, branch in enumerate(("cond", "uncond")):
            both = [gammas(each[name][place::2]) for each in seen]
            rows = [row[:-1] if name == family.transformers[-1] else row for row in both]  # the last step is no use
            assert known(ratios.of(name, branch)) == pytest.approx(np.mean(rows, axis=0), rel=1e-4)
            assert ratios.spread[name][branch] == pytest.approx(np.sqrt(np.var(rows, axis=0).mean()), rel=0.01)


def test_each_of_two_experts_has_ratios_at_its_own_steps() -> None:
    family = present("wan22")
    ratios = calibrate(family.make(), [family.call(None, steps=STEPS)]).magnitude_ratios
    first, second = (ratios.of(name, "cond") for name in family.transformers)
    boundary = 1 + max(step for step, value in enumerate(first) if value is not None)
    assert [value is not None for value in first] == [0 < step < boundary for step in range(STEPS)]
    assert [value is not None for value in second] == [boundary < step < STEPS - 1 for step in range(STEPS)]


@families("wan", "qwen", "flux", "hunyuan")
def test_ratios_are_those_that_diffusers_measures(family: Family) -> None:
    """Of all block lists together, and of the picture's tokens alone."""
    if not hasattr(diffusers, "MagCacheConfig"):
        pytest.skip("this diffusers has no MagCache")
    pipe, printed = family.make(), io.StringIO()
    pipe.transformer.enable_cache(diffusers.MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    with contextlib.redirect_stdout(printed):
        family.run(pipe, steps=STEPS)
    pipe.transformer.disable_cache()
    theirs = [ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[1")]
    ratios = calibrate(pipe, [family.call(pipe, steps=STEPS)], teacache=False).magnitude_ratios
    assert len(theirs) == len(ratios.ratios["transformer"])
    for branch, expected in zip(("cond", "uncond"), theirs, strict=False):
        assert ratios.of("transformer", branch)[1:-1] == pytest.approx(expected[1:-1], rel=1e-4)


@families("wan", "flux")
def test_ratios_are_the_same_with_and_without_the_fit_of_teacache(family: Family) -> None:
    pipe = family.make()
    given = [family.call(pipe, steps=STEPS)]
    both = calibrate(pipe, given)
    assert both.magnitudes == calibrate(pipe, given, teacache=False).magnitudes
    alone = calibrate(pipe, given, magnitudes=False)
    assert both.teacache == alone.teacache
    with pytest.raises(ConfigError, match=r"no magnitude ratios.*calibrate\(pipe, calls, magnitudes=True\)"):
        _ = alone.magnitude_ratios


class Block(nn.Module):
    """Adds a multiple of its input; its only attention has no part of that name for TeaCache to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm = nn.Identity()
        self.scale = 1.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.scale * self.attn_norm(hidden_states)


class Growing(nn.Module):
    """Adds twice as much at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, hidden_states: Tensor, timestep: Any) -> Tensor:
        return self.blocks[0](hidden_states)


class Pipe(DiffusionPipeline):  # type: ignore[misc]
    """Gives its transformer the same latents at each step."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int) -> None:
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        for i, t in enumerate(timesteps):
            self.transformer.blocks[0].scale = 2.0**i
            output = self.transformer(torch.ones(2, 4, 8), t)
            self.scheduler.step(output, t, torch.ones(2, 4, 8))


def test_model_without_a_signal_for_teacache_has_magnitudes_all_the_same() -> None:
    pipe = Pipe(Growing(), FlowMatchEulerDiscreteScheduler())
    plan = calibrate(pipe, [{"num_inference_steps": STEPS}])
    assert plan.teacache is None
    assert plan.magnitude_ratios.of("transformer", "cond") == (None, *[2.0] * (STEPS - 2), None)


def test_runs_too_short_for_a_ratio_have_none() -> None:
    family = present("flux")
    plan = calibrate(family.make(), [family.call(None, steps=2)])
    with pytest.raises(ConfigError, match="fewer than 3 steps"):
        _ = plan.magnitude_ratios


def test_ratios_that_differ_from_call_to_call_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    family = present("wan")
    pipe = family.make()
    given = [family.call(pipe, steps=STEPS, seed=seed) for seed in (0, 1)]
    steady = calibrate(pipe, [given[0], given[0]], teacache=False).magnitude_ratios
    assert steady.noise == pytest.approx(0, abs=1e-6)
    assert "magnitude ratios differ" not in caplog.text
    wild = calibrate(pipe, given, teacache=False)  # without training, other latents go other ways
    assert wild.magnitude_ratios.noise > 1
    assert "magnitude ratios differ from call to call" in caplog.text


# The recorder, on plain tensors


def test_lists_that_see_the_same_tokens_are_added_up_and_others_count_by_themselves() -> None:
    same = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    other = torch.tensor([[[0.0, 4.0], [0.0, 1.0]]])
    longer = torch.tensor([[[6.0, 8.0], [0.0, 0.0], [1.0, 0.0]]])
    assert token_norms([same, other]).tolist() == [5.0, 2.0]
    assert token_norms([same, longer, other]).tolist() == [5.0, 2.0, 10.0, 0.0, 1.0]


def recorded(steps: dict[int, Tensor], **fields: Any) -> dict[int, float]:
    recorder = MagnitudeRecorder(**fields)
    for step, residual in steps.items():
        recorder.add(1, "cond", step, [residual])
    return recorder.ratios.get((1, "cond"), {})


def test_padding_is_no_token() -> None:
    before = torch.tensor([[[1.0], [2.0], [0.0]]])
    assert recorded({0: before, 1: before * 3}) == {1: 3.0}
    assert recorded({0: before * 0, 1: before}) == {}


def test_step_after_a_gap_or_a_change_of_size_has_no_ratio() -> None:
    one = torch.ones(1, 4, 2)
    assert recorded({0: one, 1: one, 3: one, 4: one * 2}) == {1: 1.0, 4: 2.0}
    assert recorded({0: one, 1: one[:, :2], 2: one[:, :2]}) == {2: 1.0}


def test_ranks_that_share_the_tokens_record_the_mean_over_all() -> None:
    before = torch.ones(1, 6, 2)
    now = before * torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0, 8.0])[:, None]

    def reduction() -> Any:
        return lambda sums: sums.add_(torch.tensor([4.0 + 6.0 + 8.0, 3.0]))  # what the other rank sees

    assert recorded({0: before[:, :3], 1: now[:, :3]}, reduction=reduction) == {1: 4.0}


def test_one_number_a_token_is_kept_and_old_runs_are_forgotten() -> None:
    recorder = MagnitudeRecorder()
    for run in range(1, 5):
        for step in range(5):
            recorder.add(run, "cond", step, [torch.ones(1, 4, 64)])
    assert {key: tuple(norms.shape) for key, (_, norms) in recorder._norms.items()} == {
        (3, "cond"): (4,),
        (4, "cond"): (4,),
    }
    recorder.clear()
    assert not recorder._norms
    assert not recorder.ratios


def test_ratios_go_by_run_and_branch() -> None:
    recorder = MagnitudeRecorder()
    for step in range(3):
        recorder.add(1, "cond", step, [torch.full((1, 4, 2), 2.0**step)])
        recorder.add(1, "uncond", step, [torch.full((1, 4, 2), 4.0**step)])
        recorder.add(2, "cond", step, [torch.full((1, 4, 2), 8.0**step)])
    assert recorder.ratios == {(1, "cond"): {1: 2, 2: 2}, (1, "uncond"): {1: 4, 2: 4}, (2, "cond"): {1: 8, 2: 8}}
