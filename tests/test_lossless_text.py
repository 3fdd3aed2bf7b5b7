"""Keys and values that blocks make of the text are computed once a run and branch, and never stale."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from torch import Tensor, nn

from invariants import CACHES, Snapshot, assert_same, failing_at, families
from invariants.families import present as present_family
from padded import CASES, as_pipe, relative, tensor_of
from padded import present as present_case
from sgl_diffusion_accel import apply_lossless, branch, denoising_steps
from sgl_diffusion_accel.errors import LosslessError
from sgl_diffusion_accel.lossless.constants import constant_table, worth
from sgl_diffusion_accel.lossless.constants.constant_table import ONCE_A_RUN
from sgl_diffusion_accel.lossless.constants.part_state import LayerState
from sgl_diffusion_accel.slots import slot_of
from zoo import Family
from zoo.base import build, normal
from zoo.wan import CONFIG

torch.set_num_threads(1)

Given = dict[str, Any]
WAN = "WanTransformer3DModel"
SANA = "SanaTransformer2DModel"
LTX2 = "LTX2VideoTransformer3DModel"
ROWS = [name for name, row in ONCE_A_RUN.items() if row.blocks]
TIMESTEPS = (900.0, 600.0, 300.0)


@pytest.fixture(autouse=True)
def _tiny_models_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights are few beside what they make of a text; the bounds have tests of their own."""
    monkeypatch.setattr(worth, "MOST_BYTES", 10.0)


def made(name: str, **config: Any) -> tuple[nn.Module, Given]:
    """A model, and the arguments of its call but for the timestep."""
    if name == WAN:
        latents = normal(1, 4, 2, 8, 8, seed=0, key="latents")
        text = normal(1, 9, 24, seed=0, key="text")
        given = {"hidden_states": latents, "encoder_hidden_states": text, "return_dict": False}
        return build(WAN, 0, **{**CONFIG, "num_layers": 2, **config}), given
    case = replace(present_case(name), config={**CASES[name].config, **config})
    given = case.call((9,))
    del given["timestep"]
    return case.make(), given


def loop(
    model: Any, given: Given, at_step: Callable[[int], Any] = lambda _: None, prompts: Given | None = None
) -> list[Tensor]:
    """Steps of a loop, each with both branches; the prompts of the one without are the same, negated."""
    outputs = []
    prompts = prompts if prompts is not None else {}
    texts = {name: value for name, value in given.items() if name in TEXTS}
    both = {"cond": texts, "uncond": {name: -value for name, value in texts.items()}}
    for step, timestep in enumerate(denoising_steps(torch.tensor(TIMESTEPS))):
        at_step(step)
        for name, own in both.items():
            with branch(name), torch.no_grad():
                call = {**given, **own, **(prompts if name == "cond" else {})}
                outputs.append(tensor_of(model(**call, timestep=timestep[None])).clone())
    return outputs


TEXTS = ("encoder_hidden_states", "audio_encoder_hidden_states")
CALLS = 2 * len(TIMESTEPS)


@contextmanager
def lossless(model: Any, **settings: Any) -> Iterator[Any]:
    with apply_lossless(model, **settings) as patch:
        yield patch


def layers_of(model: nn.Module) -> list[nn.Module]:
    row = ONCE_A_RUN[type(model).__name__]
    names = [name for each in row.parts for name in each.layers]
    return [block.get_submodule(name) for block in model.get_submodule(row.blocks) for name in names]  # type: ignore[union-attr]


@contextmanager
def counted(modules: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Calls that come through to the layers' weights."""
    calls: list[nn.Module] = []
    forwards = {each: each.forward for each in modules}

    def counting(each: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any) -> Any:
            calls.append(each)
            return forwards[each](*args)

        return forward

    for each in modules:
        each.forward = counting(each)
    try:
        yield calls
    finally:
        for each in modules:
            del each.forward


@pytest.mark.parametrize("padding", [True, False], ids=["cut", "padded"])
@pytest.mark.parametrize("name", ROWS)
def test_keys_and_values_are_computed_once_a_run_and_branch(name: str, padding: bool) -> None:
    model, given = made(name)
    plain = loop(model, given)
    with lossless(model, constants=False, padding=padding):
        expected = loop(model, given)
    layers = layers_of(model)
    held: list[int] = []
    pipe = as_pipe(model)
    before = Snapshot(pipe)
    with lossless(model, padding=padding) as patch:
        with counted(layers) as calls:
            got = loop(model, given, lambda _: held.append(patch.held_bytes()))
        assert len(calls) == 2 * len(layers), "once a branch"
        assert patch.held_bytes() == 0
        parts = len(ONCE_A_RUN[name].parts)
        assert patch.stats.spared == {"transformer": (CALLS - 2) * (len(layers) + parts)}
        assert f"computed {2 * len(layers)} times, reused {(CALLS - 2) * len(layers)} times" in str(patch)
    assert all(map(torch.equal, got, expected)), "the same products are used again"
    assert max(relative(one, two) for one, two in zip(got, plain, strict=True)) < 1e-5
    assert not torch.equal(plain[0], plain[1]), "the branches differ"
    assert held[0] == 0 < held[1] == held[2]
    assert_same(before, pipe)
    assert all(map(torch.equal, loop(model, given), plain))


def test_what_is_held_is_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = made(LTX2)
    held: list[int] = []
    with lossless(model) as patch:
        loop(model, given, lambda _: held.append(patch.held_bytes()))
        found = next(iter(patch._parts["transformer"]))
        assert found.layers._most_bytes == held[-1] > 0


def scaled(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(1.5)


def exchanged(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight * 1.5, requires_grad=False)


def assigned(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 1.5


def biased(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.bias.add_(1.0)


def hooked(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda _, __, output: output * 1.5)


CHANGES: list[Callable[[nn.Linear], None]] = [scaled, exchanged, assigned, biased, hooked]
CHANGED = {"a layer": "attn2.to_k", "another": "attn2.to_v"}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["attn2.to_v", "caption_projection.linear_1", "caption_norm"])
def test_changed_weights_are_used(change: Callable[[nn.Linear], None], where: str) -> None:
    if where == "caption_norm" and change is biased:
        pytest.skip("it has no bias")

    def run(patched: bool) -> list[Tensor]:
        model, given = made(SANA)
        block: Any = model.transformer_blocks[1]  # type: ignore[union-attr, index]
        layer = (block if where.startswith("attn2") else model).get_submodule(where)
        if not patched:
            return loop(model, given, lambda step: change(layer) if step == 2 else None)
        with lossless(model, padding=False) as patch:
            outputs = loop(model, given, lambda step: change(layer) if step == 2 else None)
            assert patch.stats.spared["transformer"] > 0
        return outputs

    plain, got = run(False), run(True)
    assert all(map(torch.equal, got, plain))
    unchanged = loop(*made(SANA))
    assert relative(plain[-2], unchanged[-2]) > 1e-4, "the change shows"


@pytest.mark.parametrize("how", ["written to", "another"])
@pytest.mark.parametrize("name", [SANA, WAN, LTX2])
def test_changed_prompt_is_used(name: str, how: str) -> None:
    def run(patched: bool) -> list[Tensor]:
        model, given = made(name)
        text, prompts = given["encoder_hidden_states"], {"encoder_hidden_states": given["encoder_hidden_states"]}

        def change(step: int) -> None:
            if step == 2 and how == "written to":
                text.mul_(2)
            elif step == 2:
                prompts["encoder_hidden_states"] = text * 2

        if not patched:
            return loop(model, given, change, prompts)
        with lossless(model, padding=False):
            return loop(model, given, change, prompts)

    plain, got = run(False), run(True)
    assert all(map(torch.equal, got, plain))
    assert relative(plain[4], loop(*made(name))[4]) > 1e-4


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "off": lambda model: model.disable_adapters(),
    "scaled": lambda model: model.set_adapters(["default"], [0.3]),
    "merged": lambda model: model.fuse_lora(lora_scale=2.0),
    "deleted": lambda model: model.delete_adapters("default"),
    "unloaded": lambda model: model.unload_lora(),
}


def adapted(model: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["attn2.to_k", "attn2.to_v"], init_lora_weights=False))


@pytest.mark.parametrize("first", ["patch", "adapter"])
@pytest.mark.parametrize("how", ADAPTERS)
def test_adapter_that_changes_in_mid_run_is_used(how: str, first: str) -> None:
    def run(patched: bool) -> list[Tensor]:
        model, given = made(SANA)
        change: Callable[[int], Any] = lambda step: ADAPTERS[how](model) if step == 2 else None  # noqa: E731
        if not patched:
            adapted(model)
            return loop(model, given, change)
        if first == "adapter":
            adapted(model)
        with lossless(model, padding=False) as patch:
            if first == "patch":
                adapted(model)
            outputs = loop(model, given, change)
            assert patch.stats.spared["transformer"] > 0
        return outputs

    plain, got = run(False), run(True)
    assert max(relative(one, two) for one, two in zip(got, plain, strict=True)) < 1e-6
    model, given = made(SANA)
    adapted(model)
    assert relative(plain[4], loop(model, given)[4]) > 1e-4, "the change shows"


def test_adapter_that_is_loaded_in_mid_run_is_used() -> None:
    def run(patched: bool) -> list[Tensor]:
        model, given = made(SANA)
        if not patched:
            return loop(model, given, lambda step: adapted(model) if step == 2 else None)
        with lossless(model, padding=False):
            return loop(model, given, lambda step: adapted(model) if step == 2 else None)

    plain, got = run(False), run(True)
    assert max(relative(one, two) for one, two in zip(got, plain, strict=True)) < 1e-6


def test_other_dtype_in_mid_run_is_used() -> None:
    def run(patched: bool) -> list[Tensor]:
        model, given = made(SANA)
        prompts: Given = {}

        def cast(step: int) -> None:
            if step == 2:
                model.to(torch.float64)
                given.update({name: each.double() for name, each in given.items() if each_floats(each)})
                prompts["encoder_hidden_states"] = given["encoder_hidden_states"]

        def run_cond() -> list[Tensor]:
            outputs = []
            for step, timestep in enumerate(denoising_steps(torch.tensor(TIMESTEPS))):
                cast(step)
                with branch("cond"), torch.no_grad():
                    outputs.append(tensor_of(model(**given, timestep=timestep[None])))
            return outputs

        if not patched:
            return run_cond()
        with lossless(model, padding=False) as patch:
            outputs = run_cond()
            assert patch.stats.spared["transformer"] > 0
        return outputs

    plain, got = run(False), run(True)
    assert plain[2].dtype == torch.float64
    assert all(map(torch.equal, got, plain))


def each_floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def test_other_device_in_mid_run_is_used() -> None:
    """`meta` is the other device that any machine has; what was kept lies on the first one."""
    model, given = made(WAN)
    with lossless(model) as patch:
        devices = []
        for step, timestep in enumerate(denoising_steps(torch.tensor(TIMESTEPS))):
            if step == 2:
                model.to("meta")
                given = {name: each.to("meta") if isinstance(each, Tensor) else each for name, each in given.items()}
                timestep = timestep.to("meta")
            with branch("cond"), torch.no_grad():
                devices.append(tensor_of(model(**given, timestep=timestep[None])).device.type)
        assert devices == ["cpu", "cpu", "meta"]
        assert patch.stats.spared["transformer"] == 5


def test_weights_that_were_moved_and_came_back_are_read_again() -> None:
    model, given = made(SANA)

    def move(step: int) -> None:
        for weight in model.parameters() if step == 2 else ():
            weight.data = weight.data.clone()

    expected = loop(model, given)
    with lossless(model, padding=False) as patch:
        assert all(map(torch.equal, loop(model, given, move), expected))
        assert patch.stats.spared["transformer"] == 2 * (len(layers_of(model)) + 2)


def test_autocast_that_begins_in_mid_run_is_obeyed() -> None:
    def run(patched: bool) -> list[Tensor]:
        model, given = made(SANA)

        def begin(step: int) -> None:
            if step == 2:
                torch.set_autocast_dtype("cpu", torch.bfloat16)
                torch.set_autocast_enabled("cpu", True)

        with torch.autocast("cpu", enabled=False):  # ends what is begun
            if not patched:
                return loop(model, given, begin)
            with lossless(model, padding=False) as patch:
                outputs = loop(model, given, begin)
                assert patch.stats.spared["transformer"] > 0
            return outputs

    assert all(map(torch.equal, run(True), run(False)))


def test_gradients_have_graphs_of_their_own() -> None:
    model, given = made(SANA)

    def gradients() -> list[Tensor]:
        found = []
        text = given["encoder_hidden_states"].clone().requires_grad_()
        for timestep in denoising_steps(torch.tensor(TIMESTEPS)):
            with branch("cond"):
                output = tensor_of(model(**{**given, "encoder_hidden_states": text}, timestep=timestep[None]))
            found.extend(torch.autograd.grad(output.square().sum(), text))
        return found

    expected = gradients()
    with lossless(model, padding=False) as patch:
        assert all(map(torch.equal, gradients(), expected))
        assert patch.stats.spared == {"transformer": 0}


def test_gradients_that_begin_in_mid_run_get_a_graph() -> None:
    model, given = made(SANA)
    with lossless(model, padding=False):
        for step, timestep in enumerate(denoising_steps(torch.tensor(TIMESTEPS))):
            with branch("cond"), torch.set_grad_enabled(step == 2):
                text = given["encoder_hidden_states"].requires_grad_(step == 2)
                output = tensor_of(model(**{**given, "encoder_hidden_states": text}, timestep=timestep[None]))
        (gradient,) = torch.autograd.grad(output.square().sum(), text)
        assert gradient.abs().sum() > 0


def test_inference_mode_keeps_nothing() -> None:
    model, given = made(SANA)
    expected = loop(model, given)
    with lossless(model, padding=False) as patch, torch.inference_mode():
        assert all(map(torch.equal, loop(model, given), expected))
        assert patch.stats.spared == {"transformer": 0}


def test_model_that_was_made_in_inference_mode_runs() -> None:
    with torch.inference_mode():
        model, _ = made(SANA)
    _, given = made(SANA)
    expected = loop(model, given)
    with lossless(model, padding=False) as patch:
        assert all(map(torch.equal, loop(model, given), expected))
        assert patch.stats.spared["transformer"] > 0


def test_text_that_is_made_anew_in_each_call_is_not_kept() -> None:
    model, given = made(SANA)
    text, prompts = given["encoder_hidden_states"], {}

    def anew(_: int) -> None:
        prompts["encoder_hidden_states"] = text.clone()

    expected = loop(model, given)
    held: list[int] = []

    def at_step(step: int) -> None:
        held.append(patch.held_bytes())
        anew(step)

    prompts["encoder_hidden_states"] = text
    with lossless(model, padding=False) as patch:
        assert all(map(torch.equal, loop(model, given, at_step, prompts), expected))
        assert "were others than of the first" in str(patch)
        layers = len(layers_of(model)) + 2
        assert patch.stats.spared == {"transformer": 2 * layers}, "of the branch whose text stays"
    assert held[2] < held[1]


@pytest.mark.parametrize(
    "config",
    [{"cross_attn_mod": True, "audio_cross_attn_mod": True, "use_prompt_embeddings": False}, {"cross_attn_mod": True}],
    ids=["LTX-2.3", "with captions"],
)
@pytest.mark.parametrize("said", [True, False], ids=["said by the config", "seen by the tensor"])
def test_text_that_blocks_change_by_the_timestep_is_computed(
    config: Given, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not said:
        row = replace(ONCE_A_RUN[LTX2], unless=())
        monkeypatch.setitem(constant_table.ONCE_A_RUN, LTX2, row)
    model, given = made(LTX2, **{"caption_channels": 24, **config})
    given |= {"sigma": torch.tensor([0.5])}
    if "use_prompt_embeddings" in config:
        given["encoder_hidden_states"] = normal(1, 24, 24, seed=0, key="text")
        given["audio_encoder_hidden_states"] = normal(1, 24, 16, seed=0, key="audio text")
    else:
        given["encoder_hidden_states"] = normal(1, 24, 24, seed=0, key="text")
        given["audio_encoder_hidden_states"] = normal(1, 24, 24, seed=0, key="audio text")
    with lossless(model, constants=False):
        expected = loop(model, given)
    with lossless(model) as patch:
        with counted(layers_of(model)) as calls:
            assert all(map(torch.equal, loop(model, given), expected))
        assert len(calls) == CALLS * len(layers_of(model))
        assert ("as LTX-2.3 does by the timestep" in str(patch)) is said


def test_picture_that_is_joined_to_the_text_is_computed() -> None:
    config = {"image_dim": 16, "added_kv_proj_dim": 32}
    model, given = made(WAN, **config)
    given["encoder_hidden_states"] = normal(1, 512, 24, seed=0, key="text")
    given["encoder_hidden_states_image"] = normal(1, 5, 16, seed=0, key="picture")
    expected = loop(model, given)
    with lossless(model) as patch:
        assert all(map(torch.equal, loop(model, given), expected))
        assert "joins the tokens of a picture to its text" in str(patch)


def test_compiled_blocks_stay_whole() -> None:
    torch._dynamo.reset()
    for order in ("patch", "compiler"):
        model, given = made(WAN, num_layers=1)
        expected = loop(model, given)
        if order == "compiler":
            model.compile_repeated_blocks(fullgraph=True, backend="eager")  # type: ignore[operator]
        patch = apply_lossless(model, padding=False)
        if order == "patch":
            loop(model, given)
            model.compile_repeated_blocks(fullgraph=True, backend="eager")  # type: ignore[operator]
        spared = patch.stats.spared
        assert max(relative(a, b) for a, b in zip(loop(model, given), expected, strict=True)) < 1e-5
        assert patch.stats.spared == spared
        assert "its blocks are compiled" in str(patch)
        patch.remove()
    torch._dynamo.reset()


def test_transformer_compiled_as_a_whole_stays_whole() -> None:
    torch._dynamo.reset()
    model, given = made(SANA, num_layers=1)
    expected = loop(model, given)
    patch = apply_lossless(model, padding=False)
    model.compile(backend="eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert max(relative(a, b) for a, b in zip(loop(model, given), expected, strict=True)) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    assert patch.stats.spared == {"transformer": 0}
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["one by one", "block by block"])
def test_layers_whose_weights_are_moved_are_called(how: str) -> None:
    model, given = made(SANA)
    expected = loop(model, given)
    patch = apply_lossless(model, padding=False)
    device = torch.device("cpu")
    if how == "one by one":
        accelerate.cpu_offload(model, execution_device=device)
    else:
        try:
            model.enable_group_offload(device, device, offload_type="block_level", num_blocks_per_group=1)  # type: ignore[operator]
        except AttributeError:
            if torch.accelerator.current_accelerator() is None and diffusers.__version__ < "0.42":
                pytest.skip(f"group offloading of diffusers {diffusers.__version__} needs an accelerator")
            raise
    assert all(map(torch.equal, loop(model, given), expected))
    assert patch.stats.spared == {"transformer": 0}
    assert "offloading moves the weights" in str(patch)


def test_transformer_that_is_moved_as_a_whole_keeps() -> None:
    model, given = made(SANA)
    expected = loop(model, given)
    patch = apply_lossless(model, padding=False)
    accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    assert all(map(torch.equal, loop(model, given), expected))
    assert patch.stats.spared["transformer"] > 0


def test_threads_have_runs_of_their_own() -> None:
    model, given = made(SANA)
    prompts = [given["encoder_hidden_states"] * scale for scale in (1.0, 2.0, 3.0)]
    calls = [{**given, "encoder_hidden_states": prompt} for prompt in prompts]
    expected = [loop(model, call) for call in calls]
    got: dict[int, list[Tensor]] = {}
    with lossless(model, padding=False) as patch:
        threads = [
            threading.Thread(target=lambda n=n, call=call: got.__setitem__(n, loop(model, call)))
            for n, call in enumerate(calls)
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert patch.stats.spared["transformer"] > 0
        assert patch.held_bytes() == 0
    assert all(torch.equal(a, b) for n in got for a, b in zip(got[n], expected[n], strict=True))


def test_call_that_fails_ends_the_memory_of_its_run() -> None:
    model, given = made(SANA)
    expected = loop(model, given)

    def fail(step: int) -> None:
        if step == 2:
            raise RuntimeError("stop")

    with lossless(model, padding=False) as patch:
        with pytest.raises(RuntimeError, match="stop"):
            loop(model, given, fail)
        assert patch.held_bytes() == 0
        assert all(map(torch.equal, loop(model, given), expected))


def test_removal_in_mid_run_frees_and_is_exact() -> None:
    model, given = made(SANA)
    expected = loop(model, given)
    patch = apply_lossless(model, padding=False)
    held = []

    def remove(step: int) -> None:
        held.append(patch.held_bytes())
        if step == 2:
            patch.remove()
            held.append(patch.held_bytes())

    assert all(map(torch.equal, loop(model, given, remove), expected))
    assert held[1] > 0
    assert held[-1] == 0


def test_calls_outside_of_a_loop_keep_nothing() -> None:
    model, given = made(SANA)
    with lossless(model) as patch, torch.no_grad():
        for _ in range(2):
            model(**given, timestep=torch.tensor([500.0]))
        assert patch.stats.spared == {"transformer": 0}
        assert patch.held_bytes() == 0


def test_more_memory_than_it_is_worth_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = made(SANA)
    with lossless(model, padding=False) as patch:
        loop(model, given)
        bound = next(iter(patch._parts["transformer"])).layers._most_bytes
    weights = sum(each.nbytes for each in model.parameters())
    expected = loop(model, given)
    for most, spares in ((bound, True), (bound - 1, False)):
        monkeypatch.setattr(worth, "MOST_BYTES", (most + 0.5) / weights)
        held: list[int] = []
        with lossless(model, padding=False) as patch:
            assert all(
                map(torch.equal, loop(model, given, lambda _, p=patch, h=held: h.append(p.held_bytes())), expected)
            )
            assert max(held) <= bound
            assert ("a run would hold" not in str(patch)) is spares
            assert patch.stats.spared["transformer"] > 0, "the first branch fits"


def test_small_share_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the place of a call looked for."""
    model, given = made(SANA)
    share = "an estimated 0."
    expected = loop(model, given)
    big = {**given, "hidden_states": normal(1, 4, 128, 128, seed=0, key="latents")}
    with lossless(model, padding=False) as patch:
        loop(model, big)
        assert patch.stats.spared == {"transformer": 0}
        assert share in str(patch)
        assert f"less than {worth.LEAST_SHARE:.1%}" in str(patch)
        assert all(map(torch.equal, loop(model, given), expected))
        assert patch.stats.spared["transformer"] > 0


def test_estimated_share_is_that_of_counted_work() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, given = made(WAN, num_attention_heads=4)
    counter = FlopCounterMode(display=False, depth=8)
    with torch.no_grad(), counter:
        model(**given, timestep=torch.tensor([500.0]))
    counts = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    layers = sum(each for name, each in counts.items() if name.endswith(("attn2.to_k", "attn2.to_v", "text_embedder")))
    with lossless(model) as patch:
        loop(model, given)
        estimated = next(part for part in patch._parts["transformer"] if hasattr(part, "layers")).layers._share
    assert estimated == pytest.approx(layers / counts["Global"], rel=0.35)
    assert estimated > layers / counts["Global"], "attention itself is not counted"


def test_what_is_kept_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = made(SANA)
    with lossless(model, verify="first", padding=False) as patch:
        expected = loop(model, given)
        assert patch.stats.verified["transformer"] < 1e-5
        assert patch.stats.spared["transformer"] == 2 * (len(layers_of(model)) + 2), "the second calls were compared"
    with lossless(model, padding=False):
        assert all(map(torch.equal, loop(model, given), expected))
    layer: Any = layers_of(model)[0]
    monkeypatch.setattr(LayerState, "is_still", lambda *_: True)
    with lossless(model, verify="first"), pytest.raises(LosslessError, match=r"attn2\.to_k than in an earlier call"):
        loop(model, given, lambda step: scaled(layer) if step == 1 else None)


@families("sana", "wan", "ltx")
def test_pipeline_reuses_keys_and_values(family: Family) -> None:
    pipe = family.make()
    with apply_lossless(pipe, constants=False):
        expected = family.run(pipe)
    before = Snapshot(pipe)
    patch = apply_lossless(pipe)
    for _ in range(2):
        assert torch.equal(family.run(pipe), expected)
        assert patch.held_bytes() == 0
    layers = len(layers_of(pipe.transformer)) + len(ONCE_A_RUN[type(pipe.transformer).__name__].parts)
    branches = len(family.branches)
    assert patch.stats.spared["transformer"] == 2 * branches * 5 * layers
    failing_at(family, pipe, "scheduler", RuntimeError, at=4)
    assert patch.held_bytes() == 0
    assert torch.equal(family.run(pipe), expected)
    patch.remove()
    assert_same(before, pipe)


@pytest.mark.parametrize("cache", ["taylor", "adaptive", "teacache"])
@families("sana", "wan")
def test_goes_with_caches_in_either_order(family: Family, cache: str) -> None:
    pipe = family.make()
    CACHES[cache](pipe)
    apply_lossless(pipe, constants=False)
    expected = family.run(pipe)
    for order in ((CACHES[cache], apply_lossless), (apply_lossless, CACHES[cache])):
        pipe = family.make()
        patches = [each(pipe) for each in order]
        assert torch.equal(family.run(pipe), expected)
        assert next(each for each in patches if each.kind == "lossless").stats.spared["transformer"] > 0


def test_constants_false_keeps_nothing() -> None:
    family = present_family("sana")
    pipe = family.make()
    with apply_lossless(pipe, constants=False) as patch:
        family.run(pipe)
        assert patch.stats.spared == {}


def test_nothing_stands_before_layers_until_it_is_of_use() -> None:
    model, given = made(SANA)
    patch = apply_lossless(model, padding=False)
    big = {**given, "hidden_states": normal(1, 4, 128, 128, seed=0, key="latents")}
    with torch.no_grad():
        model(**given, timestep=torch.tensor([500.0]))
    loop(model, big)
    assert not any(map(slot_of, layers_of(model)))
    loop(model, given)
    assert all(map(slot_of, layers_of(model)))
    with lossless(model, padding=False):
        assert not any(map(slot_of, layers_of(model))), "of the patch that waits"
    patch.remove()
    assert not any(map(slot_of, layers_of(model)))


def test_text_that_is_divided_among_devices_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = made(SANA)
    expected = loop(model, given)
    with lossless(model, padding=False) as patch:
        monkeypatch.setattr(model, "_parallel_config", SimpleNamespace(context_parallel_config=True), raising=False)
        assert all(map(torch.equal, loop(model, given), expected))
        assert patch.stats.spared == {"transformer": 0}
        assert "divided over several devices" in str(patch)


def test_model_that_lacks_a_layer_is_left_alone() -> None:
    model, _ = made(SANA)
    del model.transformer_blocks[1].attn2  # type: ignore[union-attr, index]
    with lossless(model) as patch:
        assert "it has no attn2.to_k" in str(patch)
    model.caption_norm = None  # type: ignore[assignment]
    with lossless(model) as patch:
        assert "it has no caption_norm" in str(patch)


def test_reasons_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = made(SANA)
    monkeypatch.setattr(worth, "MOST_BYTES", 0.0)
    with lossless(model, padding=False) as patch:
        for tokens in range(1, 13):
            text = given["encoder_hidden_states"][:, :1].expand(1, tokens, -1) * 1
            mask = torch.ones(1, tokens, dtype=torch.long)
            loop(model, {**given, "encoder_hidden_states": text, "encoder_attention_mask": mask})
        assert len(str(patch).splitlines()) < 16
