"""What has one result is computed once, and what is multiplied by nothing not at all."""

from __future__ import annotations

import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from torch import Tensor

from invariants import CACHES, Snapshot, assert_same, failing_at, families
from invariants.families import present
from padded import relative, tensor_of
from sgl_diffusion_accel import apply_lossless, branch, denoising_steps, remove
from sgl_diffusion_accel.lossless.constants.equal_timesteps import EqualTimesteps
from zoo import Family
from zoo.base import build
from zoo.wan import CONFIG

torch.set_num_threads(1)

RUN = 1e-4
"""Largest relative difference of a run of 6 steps."""
TOKENS = 2 * 4 * 4


def expanding(seed: int = 0, **config: Any) -> Any:
    """Wan2.2-TI2V-5B, text to video: a timestep for each token, and all are equal."""
    pipe = present("wan").make(seed, **config)
    pipe.register_to_config(expand_timesteps=True)
    return pipe


def per_token(timestep: Tensor) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(1)),
        "return_dict": False,
    }


def run(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return tensor_of(model(**given))


@functools.cache
def wan() -> Any:
    return build("WanTransformer3DModel", 0, **CONFIG)


def test_equal_timesteps_of_a_pipeline_become_one() -> None:
    family, pipe = present("wan"), expanding()
    expected = family.run(pipe)
    before = Snapshot(pipe)
    patch = apply_lossless(pipe)
    seen: list[torch.Size] = []
    with pipe.transformer.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[2].shape)):
        assert relative(family.run(pipe), expected) < RUN
    assert {len(shape) for shape in seen} == {3}, "the modulation was made for each token"
    ((told, calls),) = patch.stats.timesteps["transformer"].items()
    assert (calls, "→ 1: all equal" in told) == (12, True)
    assert patch.stats.reads == {"transformer": 6}, "once a step, for both branches"
    assert told in str(patch)
    assert told in repr(patch)
    patch.remove()
    assert_same(before, pipe)
    assert torch.equal(family.run(pipe), expected)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "ChronoEditTransformer3DModel"])
def test_call_with_one_timestep_is_exact(name: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    model = build(name, 0, **CONFIG)
    given = per_token(torch.full((1, TOKENS), 500.0))
    expected = run(model, given)
    with apply_lossless(model):
        assert relative(run(model, given), expected) < 1e-5


def test_picture_to_video_keeps_a_timestep_for_each_token() -> None:
    timestep = torch.full((1, TOKENS), 500.0)
    timestep[:, :16] = 0
    given = per_token(timestep)
    expected = run(wan(), given)
    with apply_lossless(wan()) as patch:
        assert torch.equal(run(wan(), given), expected)
        assert "different timesteps" in str(patch)


def test_samples_may_differ() -> None:
    given = per_token(torch.tensor([[500.0], [300.0]]).expand(2, TOKENS))
    given |= {
        name: given[name].expand(2, *given[name].shape[1:]) for name in ("hidden_states", "encoder_hidden_states")
    }
    expected = run(wan(), given)
    with apply_lossless(wan()) as patch:
        assert relative(run(wan(), given), expected) < 1e-5
        assert "all equal" in str(patch)


def test_timestep_that_is_written_to_is_read_again() -> None:
    given = per_token(torch.full((1, TOKENS), 500.0))
    with apply_lossless(wan()) as patch:
        run(wan(), given)
        given["timestep"][:, :16] = 0
        changed = run(wan(), given)
        assert patch.stats.reads == {"transformer": 2}
    assert torch.equal(changed, run(wan(), given))


def test_usual_timesteps_cost_no_read() -> None:
    given = per_token(torch.tensor([500.0]))
    expected = run(wan(), given)
    with apply_lossless(wan()) as patch:
        assert torch.equal(run(wan(), given), expected)
        assert patch.stats.reads == {"transformer": 0}


def test_equal_timesteps_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    family, pipe = present("wan"), expanding()
    patch = apply_lossless(pipe, verify="first")
    family.run(pipe, steps=2)
    assert patch.stats.verified["transformer"] < 1e-5
    assert "made both ways: 1 calls" in str(patch)
    monkeypatch.setattr(EqualTimesteps, "_are_equal", lambda *_: True)
    given = per_token(torch.arange(TOKENS)[None] * 10.0)
    apply_lossless(wan(), verify="first")
    with pytest.raises(Exception, match="one timestep for all tokens"):
        run(wan(), given)
    remove(wan())


@pytest.mark.parametrize("cache", ["taylor", "teacache", "adaptive"])
def test_equal_timesteps_go_with_caches_in_either_order(cache: str) -> None:
    family, apply = present("wan"), CACHES[cache]
    outputs, decisions = [], []
    for order in ((apply,), (apply, apply_lossless), (apply_lossless, apply)):
        pipe = expanding()
        patches = [each(pipe) for each in order]
        outputs.append(family.run(pipe))
        (cached,) = (patch for patch in patches if patch.kind == "cache")
        decisions.append([each.computed for each in cached.stats.runs[0].branches.values()])
    assert decisions[0] == decisions[1] == decisions[2]
    assert relative(outputs[1], outputs[0]) < RUN
    assert torch.equal(outputs[1], outputs[2])


IDLE = {"guidance_scale_2": 1.0}


@families("wan22")
def test_idle_branch_of_the_second_stage_is_left_out(family: Family) -> None:
    pipe = family.make()
    expected = family.run(pipe, **IDLE)
    before = Snapshot(pipe)
    patch = apply_lossless(pipe)
    calls = {"transformer": 0, "transformer_2": 0}

    def count(name: str, *_: Any) -> None:
        calls[name] += 1

    hooks = [
        getattr(pipe, name).patch_embedding.register_forward_hook(functools.partial(count, name)) for name in calls
    ]
    assert relative(family.run(pipe, **IDLE), expected) < RUN
    assert calls == {"transformer": 6, "transformer_2": 3}
    assert patch.stats.idle == {"transformer_2": 3}
    assert "3 calls without the prompt were left out" in str(patch)
    assert patch.held_bytes() == 0
    for hook in hooks:
        hook.remove()
    patch.remove()
    assert_same(before, pipe)
    assert torch.equal(family.run(pipe, **IDLE), expected)


@families("wan22")
@pytest.mark.parametrize("scales", [{}, {"guidance_scale_2": 2.0}], ids=["one scale", "two scales"])
def test_branch_that_counts_is_computed(family: Family, scales: dict[str, float]) -> None:
    pipe = family.make()
    expected = family.run(pipe, **scales)
    with apply_lossless(pipe) as patch:
        assert torch.equal(family.run(pipe, **scales), expected)
        assert patch.stats.idle == {"transformer_2": 0}


@families("wan22")
def test_one_branch_alone_is_computed_and_nothing_held(family: Family) -> None:
    pipe = family.make()
    expected = family.run(pipe, guidance=1.0)
    with apply_lossless(pipe) as patch:
        assert torch.equal(family.run(pipe, guidance=1.0), expected)
        assert patch.stats.idle == {"transformer_2": 0}
        assert patch.held_bytes() == 0


@families("wan22")
@pytest.mark.parametrize("cache", ["taylor", "adaptive"])
def test_idle_branch_goes_with_caches_in_either_order(
    family: Family, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = []
    for order in ((CACHES[cache],), (CACHES[cache], apply_lossless), (apply_lossless, CACHES[cache])):
        pipe = family.make()
        patches = [each(pipe) for each in order]
        outputs.append(family.run(pipe, **IDLE))
        assert all(patch.stats.idle["transformer_2"] > 0 for patch in patches if patch.kind == "lossless")
    assert relative(outputs[1], outputs[0]) < RUN
    assert torch.equal(outputs[1], outputs[2])
    assert "without calling its blocks" not in caplog.text


@pytest.mark.parametrize("first", ["patch", "wrapper"])
def test_idle_branch_behind_a_wrapper(first: str) -> None:
    family = present("wan22")
    pipe = family.make()
    expected = family.run(pipe, **IDLE)
    patch = apply_lossless(pipe) if first == "patch" else None
    pipe.transformer_2 = torch.compile(pipe.transformer_2, backend="eager")
    patch = patch or apply_lossless(pipe)
    assert relative(family.run(pipe, **IDLE), expected) < RUN
    assert patch.stats.idle == {"transformer_2": 3}
    torch._dynamo.reset()


@families("wan22")
def test_run_after_an_error_is_as_any_other(family: Family) -> None:
    pipe = family.make()
    patch = apply_lossless(pipe)
    expected = family.run(pipe, **IDLE)
    failing_at(family, pipe, "scheduler", RuntimeError, at=4)
    assert torch.equal(family.run(pipe, **IDLE), expected)
    assert patch.held_bytes() == 0


@families("wan22")
def test_loop_of_ones_own_is_computed(family: Family) -> None:
    """How it combines the branches is not known."""
    pipe = family.make()
    pipe.scheduler.set_timesteps(3)
    given = family.bare()
    text = given.pop("encoder_hidden_states")
    given.pop("timestep")
    with apply_lossless(pipe) as patch, torch.no_grad():
        for timestep in denoising_steps(pipe.scheduler.timesteps, scheduler=pipe.scheduler, guidance=1.0):
            for name, prompt in (("cond", text), ("uncond", -text)):
                with branch(name):
                    pipe.transformer_2(timestep=timestep[None], encoder_hidden_states=prompt, **given)
        assert patch.stats.idle == {"transformer_2": 0}


@families("wan22")
def test_pipeline_that_combines_the_branches_in_another_way_is_computed(family: Family) -> None:
    """Where a scale of 0 is that without guidance, one of 1 is none to leave out."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(diffusers.WanPipeline.__call__)))
    formula = "noise_uncond + current_guidance_scale *"
    assert formula in source
    source = source[source.index("def ") :].replace(formula, "noise_pred + current_guidance_scale *")
    mine = {**sys.modules[diffusers.WanPipeline.__module__].__dict__, "__name__": "mine"}
    exec(source, mine)
    derived = type("Mine", (diffusers.WanPipeline,), {"__call__": torch.no_grad()(mine["__call__"])})
    pipe = family.make()
    usual = family.run(pipe, **IDLE)
    pipe.__class__ = derived
    expected = family.run(pipe, **IDLE)
    assert relative(expected, usual) > 0.01
    with apply_lossless(pipe) as patch:
        assert torch.equal(family.run(pipe, **IDLE), expected)
        assert patch.stats.idle == {"transformer_2": 0}


@families("wan22")
def test_constants_false_leaves_all_as_it_is(family: Family) -> None:
    pipe = family.make()
    expected = family.run(pipe, **IDLE)
    kinds = [type(pipe.transformer), type(pipe.transformer_2)]
    patch = apply_lossless(pipe, constants=False)
    assert [type(pipe.transformer), type(pipe.transformer_2)] == kinds
    assert torch.equal(family.run(pipe, **IDLE), expected)
    assert patch.stats.idle == {}


@families("ideogram4")
def test_projection_of_the_prompt_is_computed_once_a_run_and_branch(family: Family) -> None:
    pipe = family.make()
    with apply_lossless(pipe, constants=False):
        expected = family.run(pipe)
    before = Snapshot(pipe)
    patch = apply_lossless(pipe)
    calls = []
    hooks = [
        model.llm_cond_proj.register_forward_hook(lambda *_: calls.append(1))
        for model in (pipe.transformer, pipe.unconditional_transformer)
    ]
    for runs in (1, 2):
        assert torch.equal(family.run(pipe), expected)
        assert len(calls) == 2 * runs
        assert patch.held_bytes() == 0
    assert patch.stats.spared == {"transformer": 10, "unconditional_transformer": 10}
    assert "llm_cond_proj computed 2 times in 12 calls" in str(patch)
    for hook in hooks:
        hook.remove()
    patch.remove()
    assert_same(before, pipe)


@families("ideogram4")
def test_projection_of_another_prompt_is_computed(family: Family) -> None:
    pipe = family.make()
    outputs = {}
    for prompt in ("a", "b"):
        with apply_lossless(pipe, constants=False):
            outputs[prompt] = family.run(pipe, prompt=[prompt])
    assert not torch.equal(outputs["a"], outputs["b"])
    apply_lossless(pipe)
    for prompt in ("a", "b", "a"):
        assert torch.equal(family.run(pipe, prompt=[prompt]), outputs[prompt])


@families("ideogram4")
def test_projection_whose_prompt_is_written_to_is_computed_again(family: Family) -> None:
    """As at a step's end, by a callback."""
    pipe = family.make()
    given = family.bare()
    timesteps = torch.tensor([0.9, 0.5, 0.1])

    def loop() -> list[Tensor]:
        text = given["encoder_hidden_states"].clone()
        outputs = []
        for step, timestep in enumerate(denoising_steps(timesteps)):
            if step == 2:
                text *= 2
            with branch("cond"), torch.no_grad():
                call = given | {"encoder_hidden_states": text, "timestep": timestep[None]}
                outputs.append(tensor_of(pipe.transformer(**call))[:, 8:])
        return outputs

    with apply_lossless(pipe.transformer, constants=False):
        expected = loop()
    with apply_lossless(pipe.transformer) as patch:
        assert all(map(torch.equal, loop(), expected))
        assert patch.stats.spared == {"transformer": 1}
        assert patch.held_bytes() == 0


def test_call_outside_of_a_loop_keeps_nothing() -> None:
    family = present("ideogram4")
    pipe, given = family.make(), family.bare()
    with apply_lossless(pipe.transformer) as patch, torch.no_grad():
        for _ in range(2):
            pipe.transformer(**given)
        assert patch.stats.spared == {"transformer": 0}
        assert patch.held_bytes() == 0


@families("ideogram4")
def test_projection_goes_with_an_adapter_that_changes_in_mid_run(family: Family) -> None:
    peft = pytest.importorskip("peft")
    outputs, seen = [], []
    for constants in (False, True):
        pipe = family.make()
        apply_lossless(pipe, constants=constants)
        torch.manual_seed(0)
        pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["llm_cond_proj"], init_lora_weights=False))

        def off(pipe: Any, step: int, _: Any, given: dict[str, Any]) -> dict[str, Any]:
            seen.append(step)
            if step == 2:
                pipe.transformer.disable_adapters()
            return given

        outputs.append(family.run(pipe, callback_on_step_end=off))
    assert seen == [*range(6), *range(6)]
    assert torch.equal(outputs[0], outputs[1])


def scaled(pipe: Any, name: str = "llm_cond_proj") -> None:
    with torch.no_grad():
        getattr(pipe.transformer, name).weight.mul_(1.5)


def exchanged(pipe: Any) -> None:
    layer = pipe.transformer.llm_cond_proj
    layer.weight = torch.nn.Parameter(layer.weight * 1.5, requires_grad=False)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "written to": scaled,
    "before it written to": lambda pipe: scaled(pipe, "llm_cond_norm"),
    "exchanged": exchanged,
    "assigned as data": lambda pipe: setattr(
        pipe.transformer.llm_cond_proj.weight, "data", pipe.transformer.llm_cond_proj.weight * 1.5
    ),
    "a hook": lambda pipe: pipe.transformer.llm_cond_proj.register_forward_hook(lambda _, __, output: output * 1.5),
}
ADAPTER_CHANGES: dict[str, Callable[[Any], Any]] = {
    "off": lambda pipe: pipe.transformer.disable_adapters(),
    "scaled": lambda pipe: pipe.transformer.set_adapters(["default"], [0.3]),
    "merged": lambda pipe: pipe.transformer.fuse_lora(lora_scale=2.0),
    "deleted": lambda pipe: pipe.transformer.delete_adapters("default"),
    "unloaded": lambda pipe: pipe.transformer.unload_lora(),
}


def changed_in_mid_run(family: Family, change: Callable[[Any], Any], steps: Sequence[Callable[[Any], Any]]) -> Tensor:
    pipe = family.make()
    for each in steps:
        each(pipe)

    def at_step_2(pipe: Any, step: int, _: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            change(pipe)
        return given

    return family.run(pipe, callback_on_step_end=at_step_2)


@families("ideogram4")
@pytest.mark.parametrize("how", CHANGES)
def test_projection_whose_weights_change_in_mid_run_is_computed_again(family: Family, how: str) -> None:
    expected = changed_in_mid_run(family, CHANGES[how], [])
    assert relative(changed_in_mid_run(family, lambda _: None, []), expected) > 1e-3
    assert relative(changed_in_mid_run(family, CHANGES[how], [apply_lossless]), expected) < RUN


@families("ideogram4")
@pytest.mark.parametrize("first", ["patch", "adapter"])
@pytest.mark.parametrize("how", ADAPTER_CHANGES)
def test_projection_whose_adapter_changes_in_mid_run_is_right(family: Family, how: str, first: str) -> None:
    peft = pytest.importorskip("peft")

    def adapt(pipe: Any) -> None:
        torch.manual_seed(0)
        pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["llm_cond_proj"], init_lora_weights=False))

    expected = changed_in_mid_run(family, ADAPTER_CHANGES[how], [adapt])
    steps = [apply_lossless, adapt] if first == "patch" else [adapt, apply_lossless]
    assert relative(changed_in_mid_run(family, ADAPTER_CHANGES[how], steps), expected) < RUN


@families("ideogram4")
def test_autocast_that_begins_in_mid_run_is_obeyed(family: Family) -> None:
    patches = []

    def begin(_: Any) -> None:
        torch.set_autocast_dtype("cpu", torch.bfloat16)
        torch.set_autocast_enabled("cpu", True)

    with torch.autocast("cpu", enabled=False):  # ends what is begun
        changed_in_mid_run(family, begin, [lambda pipe: patches.append(apply_lossless(pipe))])
    assert patches[0].stats.spared == {"transformer": 4, "unconditional_transformer": 4}


@families("ideogram4")
def test_gradients_of_each_step_have_a_graph_of_their_own(family: Family) -> None:
    pipe, given = family.make(), family.bare()

    def gradients() -> list[Tensor]:
        text = given["encoder_hidden_states"].clone().requires_grad_()
        found = []
        for timestep in denoising_steps(torch.tensor([0.9, 0.5, 0.1])):
            with branch("cond"):
                call = given | {"encoder_hidden_states": text, "timestep": timestep[None]}
                output = tensor_of(pipe.transformer(**call))[:, 8:]
            found.extend(torch.autograd.grad(output.square().sum(), text))
        return found

    expected = gradients()
    with apply_lossless(pipe.transformer):
        assert all(relative(one, two) < RUN for one, two in zip(gradients(), expected, strict=True))


@families("ideogram4")
@pytest.mark.parametrize("cache", ["taylor", "adaptive"])
def test_projection_goes_with_caches(family: Family, cache: str) -> None:
    outputs = []
    for order in ((CACHES[cache], apply_lossless), (apply_lossless, CACHES[cache])):
        pipe = family.make()
        for each in order:
            each(pipe)
        outputs.append(family.run(pipe))
    pipe = family.make()
    CACHES[cache](pipe)
    apply_lossless(pipe, constants=False)
    assert torch.equal(family.run(pipe), outputs[0])
    assert torch.equal(outputs[0], outputs[1])


def test_transformer_compiled_as_a_whole_is_not_cut_at_its_projection() -> None:
    family = present("ideogram4")
    torch._dynamo.reset()
    pipe = family.make(num_layers=1)
    expected = family.run(pipe, steps=2)
    patch = apply_lossless(pipe)
    for model in (pipe.transformer, pipe.unconditional_transformer):
        model.compile(backend="eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert relative(family.run(pipe, steps=2), expected) < RUN
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    assert set(patch.stats.spared.values()) == {0}
    torch._dynamo.reset()


@families("ideogram4")
def test_projection_whose_weights_are_moved_is_called(family: Family) -> None:
    """Offloading may fetch the next layer's weights when a layer is called."""
    pipe = family.make()
    with apply_lossless(pipe, constants=False):
        expected = family.run(pipe)
    patch = apply_lossless(pipe)
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert torch.equal(family.run(pipe), expected)
    assert patch.stats.spared == {"transformer": 0, "unconditional_transformer": 5}
