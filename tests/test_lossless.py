"""`apply_lossless` on pipelines: exact, undone exactly, once read, beside everything else, and what it says."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from invariants import CACHES, Snapshot, assert_same, failing_at, families
from invariants.caches import KINDS
from padded import present as model_of
from padded import relative
from sgl_diffusion_accel import (
    ConfigError,
    ConfigTypeError,
    LosslessConfig,
    LosslessError,
    Trimmed,
    apply_lossless,
    compare,
    profile,
    register_attention_backend,
    remove,
    set_attention_backend,
)
from sgl_diffusion_accel.attention.backends import registry as backends
from sgl_diffusion_accel.lossless.padding.table import ROWS, Row, Stream
from sgl_diffusion_accel.patch import patches_of
from sgl_diffusion_accel.slots import slot_of
from zoo import Family

torch.set_num_threads(1)

PADDED = ("hunyuan", "hunyuan15", "mochi", "lumina2", "ideogram4")
"""Families whose usual run has padding, or a mask that hides nothing."""
RUN = 1e-4
"""Largest relative difference of a run of 6 steps."""


def run(family: Family, pipe: Any, **more: Any) -> Tensor:
    return family.run(pipe, **more)


def hunyuan15() -> Any:
    return model_of("HunyuanVideo15Transformer3DModel")


@families(*PADDED, "ltx", "sana", "qwen", "flux", "wan22")
def test_run_is_the_same_and_as_before_once_removed(family: Family) -> None:
    pipe = family.make()
    expected = run(family, pipe)
    before = Snapshot(pipe)
    patch = apply_lossless(pipe)
    assert relative(run(family, pipe), expected) < RUN
    patch.remove()
    patch.remove()
    assert_same(before, pipe)
    assert torch.equal(run(family, pipe), expected)


@families(*PADDED)
def test_masks_are_read_once_for_each_prompt(family: Family) -> None:
    pipe = family.make()
    patch = apply_lossless(pipe)
    for runs in (1, 2):
        run(family, pipe)
        calls = 2 if len(family.branches) == 2 and not family.model_per_branch else 1
        assert set(patch.stats.reads.values()) == {calls * runs}


@families("hunyuan15")
def test_pipeline_of_hunyuan_video_15_with_glyphs_picture_and_50_steps(family: Family) -> None:
    pipe = family.make()
    for steps, glyphs in ((8, 0), (8, 4), (50, 2)):
        given = {name: (torch.arange(4) < glyphs).long()[None] for name in ("prompt_embeds_mask_2",)}
        expected = run(family, pipe, steps=steps, **given)
        with apply_lossless(pipe) as patch:
            assert relative(run(family, pipe, steps=steps, **given), expected) < RUN
            cuts = [told.tokens for told in patch.stats.calls["transformer"]]
        assert ("encoder_hidden_states_2", 4, glyphs) in cuts[0]
        assert all(("image_embeds", 3, 0) in cut for cut in cuts)


def test_valid_picture_of_hunyuan_video_15_is_kept() -> None:
    case = hunyuan15()
    model, given = case.make(), case.call()
    given["image_embeds"] = torch.ones_like(given["image_embeds"])
    expected = case.run(model, given)
    with apply_lossless(model) as patch:
        assert relative(case.run(model, given), expected) < 1e-5
        (told,) = patch.stats.calls["transformer"]
    assert ("image_embeds", 7, 7) in told.tokens
    assert not told.has_mask


@families("hunyuan", "hunyuan15")
@pytest.mark.parametrize("cache", KINDS)
def test_goes_with_caches_in_either_order_and_changes_no_decision(family: Family, cache: str) -> None:
    apply = CACHES[cache]
    outputs, decisions = [], []
    for order in ((apply,), (apply, apply_lossless), (apply_lossless, apply)):
        pipe = family.make()
        patches = [each(pipe) for each in order]
        outputs.append(run(family, pipe))
        (cached,) = (patch for patch in patches if patch.kind == "cache")
        decisions.append([branch.computed for branch in cached.stats.runs[0].branches.values()])
        lossless = [patch for patch in patches if patch.kind == "lossless"]
        assert all(sum(patch.stats.calls["transformer"].values()) > 0 for patch in lossless)
    assert decisions[0] == decisions[1] == decisions[2]
    assert not all(all(branch) for branch in decisions[0]), "nothing was skipped"
    assert relative(outputs[1], outputs[0]) < RUN
    assert torch.equal(outputs[1], outputs[2])


@families("hunyuan15")
def test_skipped_blocks_go_past_in_one_go(family: Family) -> None:
    """Beside a block cache, the short way past skipped blocks stays open."""
    pipe = family.make()
    CACHES["static"](pipe)
    apply_lossless(pipe)
    slots = [block.__dict__["_sgl_diffusion_accel"] for block in pipe.transformer.transformer_blocks]
    assert all(len(slot.handlers) == 2 for slot in slots)
    assert all(slot.detour is not None for slot in slots[1:])


def no_mask(query: Tensor, key: Tensor, value: Tensor, *, mask: Any, scale: Any, **_: Any) -> Tensor:
    return torch.softmax(query @ key.mT * (scale or query.shape[-1] ** -0.5), -1) @ value


@families("hunyuan", "hunyuan15")
@pytest.mark.parametrize("first", ["lossless", "attention"])
def test_kernels_that_take_no_mask_serve_all_blocks(
    family: Family, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_registered", {})
    register_attention_backend("no mask", no_mask, masks=False, causal=False, gqa=False)
    layers = [f"{name}.*" for name in family.block_lists]
    pipe = family.make()
    expected = run(family, pipe)
    if first == "lossless":
        apply_lossless(pipe)
    attention = set_attention_backend(pipe, "no mask", layers=layers)
    if first == "attention":
        apply_lossless(pipe)
    assert relative(run(family, pipe), expected) < RUN
    blocks = sum(len(getattr(pipe.transformer, name)) for name in family.block_lists)
    assert attention.calls == {"transformer": {"no mask": blocks * 6 * len(family.branches)}}
    assert attention.fallbacks == {}
    remove(pipe)
    assert torch.equal(run(family, pipe), expected)


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # tests before this one may have broken graphs
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("first", ["patch first", "compile first"])
def test_compiled_blocks_get_one_graph_more_for_a_second_length(first: str) -> None:
    case = hunyuan15()
    model = dataclasses.replace(case, config={**case.config, "num_layers": 2}).make()
    calls = [case.call((length,)) for length in (9, 13, 10, 21)]
    expected = [case.run(model, given) for given in calls]
    patch = apply_lossless(model) if first == "patch first" else None
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    if patch is None:
        case.run(model, calls[0])
        torch._dynamo.reset()
        patch = apply_lossless(model)
    graphs = []
    for given, whole in zip(calls, expected, strict=True):
        assert relative(case.run(model, given), whole) < 1e-5
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] > graphs[0]
    assert graphs[1] == graphs[2] == graphs[3]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not any(told.has_mask for told in patch.stats.calls["transformer"])
    patch.remove()
    assert relative(case.run(model, calls[0]), expected[0]) < 1e-6


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["patch, then compile", "compile, then patch", "wrapper"])
def test_transformer_compiled_as_a_whole_keeps_its_masks_and_is_not_cut_into_pieces(how: str) -> None:
    case = model_of("HunyuanVideoTransformer3DModel")
    model, given = case.make(), case.call()
    expected = case.run(model, given)
    called: Any = torch.compile(model, backend="eager") if how == "wrapper" else model
    if how == "compile, then patch":
        model.compile(backend="eager")
    patch = apply_lossless(called)
    if how == "patch, then compile":
        model.compile(backend="eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert relative(case.run(called, given), expected) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    (told,) = patch.stats.calls["transformer"]
    assert told.tokens == (("encoder_hidden_states", 24, 9),)
    assert told.has_mask
    assert "compile_repeated_blocks" in str(patch)


@pytest.mark.usefixtures("fresh_compiler")
def test_wrapper_of_the_compiler_put_on_afterwards() -> None:
    case = model_of("HunyuanVideoTransformer3DModel")
    model, given = case.make(), case.call()
    expected = case.run(model, given)
    patch = apply_lossless(model)
    compiled: Any = torch.compile(model, backend="eager")
    assert relative(case.run(compiled, given), expected) < 1e-5
    assert list(patch.stats.calls["transformer"].values()) == [1]
    patch.remove()
    assert relative(case.run(compiled, given), expected) < 1e-6


@pytest.mark.parametrize("name", ["HunyuanVideo15Transformer3DModel", "QwenImageTransformer2DModel"])
def test_half_precision_is_no_farther_from_float32_than_with_padding(name: str) -> None:
    case = model_of(name)
    model = case.make(dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    errors: dict[str, list[float]] = {"whole": [], "trimmed": []}
    for length in range(5, 21):
        given = case.call((length,), torch.bfloat16)
        is_half = {name: getattr(value, "dtype", None) == torch.bfloat16 for name, value in given.items()}
        whole = case.run(exact, {name: value.float() if is_half[name] else value for name, value in given.items()})
        errors["whole"].append(relative(case.run(model, given).float(), whole))
        with apply_lossless(model):
            errors["trimmed"].append(relative(case.run(model, given).float(), whole))
    mean = {how: sum(found) / len(found) for how, found in errors.items()}
    assert mean["whole"] > 1e-4, "nothing was rounded"
    assert mean["trimmed"] <= 1.02 * mean["whole"]


@pytest.mark.parametrize("name", ["HunyuanVideo15Transformer3DModel", "Ideogram4Transformer2DModel"])
def test_positional_arguments_and_output_class(name: str) -> None:
    case = model_of(name)
    model, given = case.make(), case.call()
    expected = case.run(model, given)
    known = list(inspect.signature(type(model).forward).parameters)[1:]
    leading = list(itertools.takewhile(given.__contains__, known))
    rest = {each: given[each] for each in given if each not in leading and each != "return_dict"}
    assert len(leading) >= 4
    with apply_lossless(model), torch.no_grad():
        output = model(*(given[each] for each in leading), **rest)
    assert relative(output.sample[:, case.unread :], expected) < 1e-5


def test_output_has_the_shape_that_it_had() -> None:
    case = model_of("Ideogram4Transformer2DModel")
    model, given = case.make(), case.call()
    with apply_lossless(model), torch.no_grad():
        (output,) = model(**given)
    assert output.shape == given["hidden_states"].shape
    assert output[:, :15].abs().max() == 0
    assert output[:, 15:].abs().min() > 0


def seen(patch: Any) -> Any:
    (told,) = patch.stats.calls["transformer"]
    return told


LEFT: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no mask": (
        "QwenImageTransformer2DModel",
        lambda given: {**given, "encoder_hidden_states_mask": None},
        "no mask",
    ),
    "a mask of weights": (
        "LTXVideoTransformer3DModel",
        lambda given: {**given, "encoder_attention_mask": given["encoder_attention_mask"] * 0.5},
        "other values than 0 and 1",
    ),
    "a bias": (
        "PixArtTransformer2DModel",
        lambda given: {**given, "encoder_attention_mask": torch.zeros(1, 1, 24)},
        "shape (1, 1, 24)",
    ),
    "a prompt without any token": (
        "SanaTransformer2DModel",
        lambda given: {**given, "encoder_attention_mask": torch.zeros(1, 24).long()},
        "no token",
    ),
    "another mask": (
        "SanaWMTransformer3DModel",
        lambda given: {**given, "mask": given["encoder_attention_mask"]},
        "is given mask",
    ),
}


@pytest.mark.parametrize("why", LEFT)
def test_call_that_is_not_understood_is_left_alone_bit_by_bit(why: str) -> None:
    name, change, told = LEFT[why]
    case = model_of(name)
    model, given = case.make(), change(case.call())
    expected = case.run(model, given)
    with apply_lossless(model) as patch:
        assert torch.equal(case.run(model, given), expected)
        assert told in seen(patch).remark
        assert told in str(patch)


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "SanaTransformer2DModel"])
def test_mask_of_fewer_samples_is_the_error_that_it_was(name: str) -> None:
    case = model_of(name)
    model, given = case.make(), case.call((9, 9))
    mark = ROWS[name].streams[0].mark
    given[mark] = given[mark][:1]
    with pytest.raises((RuntimeError, ValueError)) as before:
        case.run(model, given)
    with apply_lossless(model) as patch, pytest.raises(type(before.value)):
        case.run(model, given)
    assert "for 2 samples" in seen(patch).remark


def test_mask_with_holes_is_cut_behind_the_last_token_and_kept() -> None:
    case = model_of("HunyuanVideoTransformer3DModel")
    model, given = case.make(), case.call((9,))
    given["encoder_attention_mask"][0, 4] = 0
    expected = case.run(model, given)
    with apply_lossless(model) as patch:
        assert relative(case.run(model, given), expected) < 1e-5
    assert seen(patch).tokens == (("encoder_hidden_states", 24, 9),)
    assert seen(patch).has_mask


def test_segments_that_stand_apart_keep_their_mask() -> None:
    case = model_of("Ideogram4Transformer2DModel")
    model, given = case.make(), case.call()
    given["segment_ids"][:, -4:] = 2
    expected = case.run(model, given)
    with apply_lossless(model) as patch:
        assert relative(case.run(model, given), expected) < 1e-5
    assert seen(patch).has_mask


def test_other_processors_keep_their_masks() -> None:
    case = hunyuan15()
    model, given = case.make(), case.call()

    class Other(type(model.transformer_blocks[0].attn.processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            assert isinstance(kwargs["attention_mask"], Tensor)
            return super().__call__(*args, **kwargs)

    model.transformer_blocks[1].attn.set_processor(Other())
    expected = case.run(model, given)
    with apply_lossless(model) as patch:
        assert relative(case.run(model, given), expected) < 1e-5
        assert seen(patch).has_mask
        assert "others than diffusers' own" in str(patch)


def test_context_parallel_transformer_is_left_alone() -> None:
    case = model_of("LTXVideoTransformer3DModel")
    model, given = case.make(), case.call()
    expected = case.run(model, given)
    patch = apply_lossless(model)
    model._parallel_config = type("Config", (), {"context_parallel_config": object()})()
    assert torch.equal(case.run(model, given), expected)
    assert "context parallelism" in seen(patch).remark


def test_mask_that_is_written_to_is_read_again() -> None:
    case = model_of("QwenImageTransformer2DModel")
    model, given = case.make(), case.call((9,))
    with apply_lossless(model) as patch:
        case.run(model, given)
        given["encoder_hidden_states_mask"][:, :12] = True
        longer = case.run(model, given)
    assert patch.stats.reads == {"transformer": 2}
    assert relative(longer, case.run(model, given)) < 1e-5


def test_slices_of_one_mask_are_known_again_and_told_apart() -> None:
    case = model_of("QwenImageTransformer2DModel")
    model, given = case.make(), case.call((9,))
    both = torch.cat([case.call((length,))["encoder_hidden_states_mask"] for length in (9, 14)])
    with apply_lossless(model) as patch:
        for _ in range(3):
            for row in (0, 1):
                given["encoder_hidden_states_mask"] = both[row : row + 1]
                case.run(model, given)
    assert patch.stats.reads == {"transformer": 2}
    assert [told.tokens[0][2] for told in patch.stats.calls["transformer"]] == [9, 14]


def test_mask_in_the_memory_of_an_old_one_is_not_taken_for_it() -> None:
    case = model_of("QwenImageTransformer2DModel")
    model, given = case.make(), case.call((9,))
    memory = given["encoder_hidden_states_mask"]
    with apply_lossless(model) as patch:
        case.run(model, given)
        memory.data[:, :12] = True  # past autograd's count of writes
        given["encoder_hidden_states_mask"] = torch.empty(0, dtype=torch.bool).set_(memory)
        longer = case.run(model, given)
    assert patch.stats.reads == {"transformer": 2}
    assert relative(longer, case.run(model, given)) < 1e-5


def test_one_mask_of_two_streams_is_told_apart() -> None:
    case = model_of("LTX2VideoTransformer3DModel")
    model, given = case.make(), case.call((9,))
    video, sound = "encoder_attention_mask", "audio_encoder_attention_mask"
    calls = [{**given, sound: None}, {**given, video: None, sound: given[video]}]
    expected = [case.run(model, call) for call in calls]
    with apply_lossless(model):
        for call, whole in zip(calls, expected, strict=True):
            assert relative(case.run(model, call), whole) < 1e-5


def test_stream_without_padding_loses_its_mask_beside_one_that_keeps_it() -> None:
    case = model_of("LTX2VideoTransformer3DModel")
    model, given = case.make(), case.call((24, 24))
    given["audio_encoder_attention_mask"][0, 12:] = 0
    given["audio_encoder_attention_mask"][1] = 1
    expected = case.run(model, given)
    masks: list[Any] = []
    block = model.transformer_blocks[0]
    with apply_lossless(model):
        hook = block.attn2.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        assert relative(case.run(model, given), expected) < 1e-5
    hook.remove()
    assert masks == [None]


def test_inference_mode_reads_at_each_call() -> None:
    """Its tensors count no writes."""
    case = model_of("QwenImageTransformer2DModel")
    model = case.make()
    with torch.inference_mode():
        given = case.call((9,))
        with apply_lossless(model) as patch:
            case.run(model, given)
            given["encoder_hidden_states_mask"][:, :12] = True
            longer = case.run(model, given)
        assert patch.stats.reads == {"transformer": 2}
        assert relative(longer, case.run(model, given)) < 1e-5


def test_nothing_of_a_run_is_held() -> None:
    case = model_of("Krea2Transformer2DModel")
    model, given = case.make(), case.call()
    apply_lossless(model)
    case.run(model, given)
    held = [weakref.ref(value) for value in given.values() if isinstance(value, Tensor)]
    del given
    gc.collect()
    assert [tensor for tensor in held if tensor() is not None] == []


@families("hunyuan15")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_run_after_an_error_is_as_any_other(family: Family, error: type[BaseException]) -> None:
    pipe = family.make()
    expected = run(family, pipe)
    apply_lossless(pipe)
    clean = run(family, pipe)
    for place in ("block", "scheduler"):
        failing_at(family, pipe, place, error)
        assert torch.equal(run(family, pipe), clean)
    assert relative(clean, expected) < RUN


def test_threads_do_not_see_each_others_calls() -> None:
    case = hunyuan15()
    model = case.make()
    full, padded = case.call((9, 14)), case.call((9,))
    expected = [case.run(model, given) for given in (full, padded)]
    apply_lossless(model)
    wrong: list[float] = []

    def calls(given: dict[str, Any], whole: Tensor) -> None:
        for _ in range(8):
            difference = relative(case.run(model, given), whole)
            wrong.extend([difference] if not difference < 1e-5 else [])

    threads = [threading.Thread(target=calls, args=pair) for pair in zip((full, padded), expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@families("hunyuan15")
def test_another_pipeline_with_the_same_class_is_unaffected(family: Family) -> None:
    patched, other = family.make(), family.make()
    expected = run(family, other)
    apply_lossless(patched)
    assert torch.equal(run(family, other), expected)
    assert torch.equal(run(family, copy.deepcopy(patched)), expected)


@families("hunyuan15")
def test_profile_and_compare_go_with_it(family: Family) -> None:
    pipe = family.make()
    call = family.call(pipe, steps=3)
    report = compare(pipe, {"lossless": apply_lossless}, calls=[call])
    assert "lossless" in str(report)
    apply_lossless(pipe)
    with profile(pipe, trace=False) as prof:
        family.run(pipe, steps=3)
    assert "stages" in str(prof.report)


@families("hunyuan15")
def test_verified_run(family: Family) -> None:
    pipe = family.make()
    cache = CACHES["taylor"](pipe)
    patch = apply_lossless(pipe, verify="first")
    output = run(family, pipe)
    assert patch.stats.verified["transformer"] < 1e-5
    assert "made both ways: 2 calls" in str(patch)
    decisions = [branch.computed for branch in cache.stats.runs[0].branches.values()]
    run(family, pipe)
    assert "made both ways: 4 calls" in str(patch), "the second run has masks of its own"
    other = family.make()
    cached = CACHES["taylor"](other)
    apply_lossless(other)
    assert torch.equal(run(family, other), output)
    assert [branch.computed for branch in cached.stats.runs[0].branches.values()] == decisions


def test_verification_finds_a_row_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose padding is attended, under a row that says it is not."""
    case = model_of("QwenImageTransformer2DModel")
    model, given = case.make(), case.call((9,))
    wrong = Row((Stream("encoder_hidden_states_mask", ("hidden_states",)),))
    monkeypatch.setitem(ROWS, case.name, wrong)
    given["hidden_states"] = given["hidden_states"][:, :24]
    given["img_shapes"] = [[(1, 4, 6)]]
    patch = apply_lossless(model, verify="first")
    with pytest.raises(LosslessError, match=rf"{case.name} .*multiplied by ten.*remove\(pipe\)"):
        case.run(model, given)
    patch.remove()
    case.run(model, given)


def test_verification_finds_a_cut_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is padding, and yet it is cut."""
    from sgl_diffusion_accel.lossless.padding import cuts

    case = model_of("QwenImageTransformer2DModel")
    model, given = case.make(), case.call((9,))
    right = cuts._kept
    monkeypatch.setattr(cuts, "_kept", lambda *args: slice(0, right(*args).stop - 1))
    apply_lossless(model, verify="first")
    with pytest.raises(LosslessError, match="without its padding"):
        case.run(model, given)


def test_verification_is_of_the_blocks_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is taken away and is needed is found, too."""
    from sgl_diffusion_accel.lossless.padding.cuts import Cut

    case = hunyuan15()
    model, given = case.make(), case.call((9, 14))
    monkeypatch.setattr(Cut, "drops_in_blocks", True)
    apply_lossless(model, verify="first")
    with pytest.raises(LosslessError, match="without its padding"):
        case.run(model, given)


@pytest.mark.parametrize("what", ["removed", "another one applied"])
def test_patches_may_come_and_go_during_verification(what: str) -> None:
    case = hunyuan15()
    model, given = case.make(), case.call()
    expected = case.run(model, given)
    apply_lossless(model, verify="first")
    calls = []

    def in_mid_call(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            remove(model) if what == "removed" else set_attention_backend(model, "native")

    hook = model.register_forward_pre_hook(in_mid_call)
    assert relative(case.run(model, given), expected) < 1e-5
    hook.remove()
    slots = [slot for each in model.modules() if (slot := slot_of(each)) is not None]
    if what == "removed":
        assert slots == []
        assert torch.equal(case.run(model, given), expected)
    else:
        assert {patch.kind for patch in patches_of(model)} == {"lossless", "attention"}
        assert all(len(slot.handlers) == len(slot.kinds) for slot in slots)


def test_verification_is_of_its_thread_alone() -> None:
    case = hunyuan15()
    model = case.make()
    patch = apply_lossless(model, verify="first")
    counts = []

    def from_another_thread(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread() and not counts:
            counts.append(0)
            thread = threading.Thread(target=case.run, args=(model, case.call((5,))))
            thread.start()
            thread.join()

    hook = model.register_forward_pre_hook(from_another_thread)
    case.run(model, case.call((9,)))
    hook.remove()
    assert sorted(told.tokens[0][2] for told in patch.stats.calls["transformer"]) == [5, 9]


def test_config_and_replacing() -> None:
    model = model_of("QwenImageTransformer2DModel").make()
    first = apply_lossless(model, verify="first")
    assert first.config == LosslessConfig(verify="first")
    with apply_lossless(model, LosslessConfig()) as second:
        assert second.config == LosslessConfig()
        assert not first.active
        assert second.active
        with apply_lossless(model, first.config) as inner:
            assert inner.config == first.config
            assert not second.active
        assert second.active


def test_what_is_wrong_is_told() -> None:
    model = model_of("QwenImageTransformer2DModel").make()
    with pytest.raises(ConfigError, match=r"verify.*first"):
        apply_lossless(model, verify="always")  # type: ignore[arg-type]
    with pytest.raises(ConfigTypeError, match="padding"):
        apply_lossless(model, padding=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigTypeError, match="constants"):
        apply_lossless(model, constants="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Did you mean 'padding'"):
        apply_lossless(model, paddings=True)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="none beside it"):
        apply_lossless(model, LosslessConfig(), verify="first")
    with pytest.raises(ConfigTypeError, match="LosslessConfig"):
        apply_lossless(model, "first")  # type: ignore[arg-type]
    with pytest.raises(ConfigTypeError, match="diffusers pipeline"):
        apply_lossless(3)


def test_what_it_says() -> None:
    case = hunyuan15()
    model, given = case.make(), case.call()
    patch = apply_lossless(model)
    assert "no call yet" in repr(patch)
    assert "no call yet" in str(patch)
    case.run(model, given)
    cut = "encoder_hidden_states 24 → 9, encoder_hidden_states_2 10 → 3, image_embeds 7 → 0 tokens; without a mask"
    assert repr(patch) == f"<LosslessPatch: lossless on transformer: {cut}>"
    assert f"1 calls: {cut}" in str(patch)
    assert "read from the device 1 times" in str(patch)
    assert cut.partition(" ")[0] in patch._repr_html_()
    patch.remove()
    assert "[removed]" in repr(patch)
    assert "[removed]" in str(patch)


def test_prompts_of_all_lengths_are_counted_and_not_all_listed() -> None:
    case = model_of("QwenImageTransformer2DModel")
    model = case.make()
    patch = apply_lossless(model)
    (padding,) = patch._parts["transformer"]
    for length in range(1, 24):
        case.run(model, case.call((length,)))
    assert "calls cut to other lengths" in str(patch)
    for length in range(200):
        padding.count(Trimmed((("text", 500, length),), has_mask=False))
    counts = patch.stats.calls["transformer"]
    assert len(counts) <= 101
    assert sum(counts.values()) == 223
    assert counts[Trimmed()] == 223 - 100


def test_blocks_that_run_once_more_for_gradients_keep_their_masks() -> None:
    case = model_of("HunyuanVideoTransformer3DModel")
    model, given = case.make(), case.call()
    model.requires_grad_(True)
    expected = model(**given)[0].detach()
    model.enable_gradient_checkpointing()
    patch = apply_lossless(model)
    output = model(**given)[0]
    output.sum().backward()
    assert relative(output.detach(), expected) < 1e-5
    assert seen(patch).has_mask
    assert seen(patch).tokens == (("encoder_hidden_states", 24, 9),)
    assert "for gradients" in str(patch)


@families("flux")
def test_model_without_a_row_has_nothing_in_front_of_it(family: Family) -> None:
    pipe = family.make()
    kind = type(pipe.transformer)
    patch = apply_lossless(pipe)
    assert type(pipe.transformer) is kind
    assert "its padding as well" in patch.left_alone["transformer"]
    assert "is left alone" in str(patch)
    assert repr(patch) == "<LosslessPatch: lossless on transformer: left alone>"
    remove(pipe)
    assert not patch.active


def test_padding_false_does_nothing() -> None:
    case = model_of("QwenImageTransformer2DModel")
    model, given = case.make(), case.call()
    expected = case.run(model, given)
    patch = apply_lossless(model, padding=False)
    assert torch.equal(case.run(model, given), expected)
    assert patch.left_alone == {"transformer": "padding=False"}


def test_derived_class_has_the_row_of_the_forward_that_it_takes() -> None:
    from diffusers import QwenImageTransformer2DModel as Base

    class Mine(Base):  # type: ignore[misc]
        """Another name."""

    class Other(Base):  # type: ignore[misc]
        """Another forward."""

        def forward(self, hidden_states: Any, encoder_hidden_states_mask: Any = None, **kwargs: Any) -> Any:
            return super().forward(hidden_states, encoder_hidden_states_mask=encoder_hidden_states_mask, **kwargs)

    config = model_of("QwenImageTransformer2DModel").config
    assert apply_lossless(Mine(**config)).left_alone == {}
    assert "nothing is known" in apply_lossless(Other(**config)).left_alone["transformer"]


def test_older_version_of_a_class_is_left_alone() -> None:
    """Qwen-Image's attention had no mask at first."""
    from diffusers import QwenImageTransformer2DModel as Base

    class Older(Base):  # type: ignore[misc]
        """Its forward of diffusers 0.35."""

        def forward(self, hidden_states: Any, txt_seq_lens: Any = None, **kwargs: Any) -> Any:
            return super().forward(hidden_states, **kwargs)

    Older.__name__ = Base.__name__
    patch = apply_lossless(Older(**model_of("QwenImageTransformer2DModel").config))
    assert "attends its padding" in patch.left_alone["transformer"]


def test_class_that_lost_a_parameter_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    case = model_of("QwenImageTransformer2DModel")
    monkeypatch.setitem(ROWS, case.name, Row((Stream("gone", ("encoder_hidden_states",)),)))
    patch = apply_lossless(case.make())
    assert "has no gone" in patch.left_alone["transformer"]


def test_call_through_a_wrapper_is_cut_once() -> None:
    case = hunyuan15()
    model, given = case.make(), case.call()
    expected = case.run(model, given)
    wrapper = checkpoint_wrapper(model)
    patch = apply_lossless(wrapper)
    assert relative(case.run(wrapper, given), expected) < 1e-5
    assert list(patch.stats.calls["transformer"].values()) == [1]
    assert not seen(patch).has_mask
    patch.remove()
    assert torch.equal(case.run(wrapper, given), expected)


@pytest.mark.parametrize("first", ["patch", "offload"])
def test_goes_with_offloading_block_by_block(first: str) -> None:
    case = hunyuan15()
    model, given = case.make(), case.call()
    expected = case.run(model, given)
    patch = apply_lossless(model) if first == "patch" else None
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    patch = patch or apply_lossless(model)
    assert relative(case.run(model, given), expected) < 1e-5
    assert not seen(patch).has_mask


@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_goes_with_adapters(first: str) -> None:
    case = model_of("HunyuanVideoTransformer3DModel")
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    torch.manual_seed(0)
    model, given = case.make(), case.call()
    patch = apply_lossless(model) if first == "patch" else None
    plain = case.run(model, given)
    model.add_adapter(adapter)
    patch = patch or apply_lossless(model)
    adapted = case.run(model, given)
    patch.remove()
    assert relative(adapted, case.run(model, given)) < 1e-5
    assert relative(adapted, plain) > 1e-3
