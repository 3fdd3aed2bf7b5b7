"""The patch touches one pipeline, at the steps it is set for, beside any cache, and is undone exactly."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor

from invariants import (
    CACHES,
    FixedPath,
    Interrupted,
    Snapshot,
    assert_same,
    cross,
    families,
    family_params,
    skips_some,
    transformer_outputs,
)
from invariants.families import present
from sgl_diffusion_accel import remove
from sgl_diffusion_accel.attention.attention_handlers import Steps
from sgl_diffusion_accel.attention.attention_patch import AttentionPatch
from sgl_diffusion_accel.attention.backends import registry as backends
from sgl_diffusion_accel.attention.backends.registry import register_attention_backend
from sgl_diffusion_accel.attention.select import set_attention_backend
from zoo import Family

torch.set_num_threads(1)


def half(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Something else than attention, so that where it ran is seen."""
    return value.mean(-2, keepdim=True).expand(*query.shape[:-1], -1) * 0.5


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", {})
    register_attention_backend("half", half, mask_and_causal=True)


def layers(family: Family) -> str | None:
    return "*.attn2" if family.name == "sana" else None


def wan(**config: Any) -> tuple[Family, Any]:
    family = present("wan")
    return family, family.make(**config)


# Removal


@families()
def test_remove_leaves_nothing_behind(family: Family) -> None:
    pipe = family.make()
    expected = family.run(pipe, steps=2)
    before = Snapshot(pipe)
    patch = set_attention_backend(pipe, "half", layers=layers(family))
    assert before.differences(Snapshot(pipe))
    assert not torch.equal(family.run(pipe, steps=2), expected)
    for _ in range(2):
        patch.remove()
        assert not patch.active
        assert_same(before, pipe)
    assert torch.equal(family.run(pipe, steps=2), expected)


def test_run_leaves_no_trace_on_classes_and_process() -> None:
    family, pipe = wan()
    family.run(pipe, steps=2)
    set_attention_backend(pipe, "math", skip_first_steps=1)
    before = Snapshot(pipe)
    family.run(pipe, steps=2)
    assert_same(before, pipe)


@families("wan", "wan22", "cogvideox")
def test_remove_of_the_pipeline(family: Family) -> None:
    pipe = family.make()
    family.run(pipe, steps=2)
    before = Snapshot(pipe)
    patch = set_attention_backend(pipe, "math")
    for _ in range(2):
        remove(pipe)
        assert not patch.active
        assert_same(before, pipe)


def test_patch_of_one_expert_leaves_the_other() -> None:
    family = present("wan22")
    pipe = family.make()
    family.run(pipe, steps=2)
    before = Snapshot(pipe)
    patch = set_attention_backend(pipe.transformer_2, "math")
    assert not [
        line for line in before.differences(Snapshot(pipe)) if line.startswith(("transformer.", "type(transformer."))
    ]
    remove(pipe)
    assert not patch.active
    assert_same(before, pipe)


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_with_block_undoes_on_an_error(error: type[BaseException]) -> None:
    family, pipe = wan()
    expected = family.run(pipe, steps=2)
    before = Snapshot(pipe)

    def run_and_fail() -> None:
        with set_attention_backend(pipe, "math") as patch:
            assert isinstance(patch, AttentionPatch)
            family.run(pipe, steps=2)
            raise error("on purpose")

    with pytest.raises(error, match="on purpose"):
        run_and_fail()
    assert_same(before, pipe)
    assert torch.equal(family.run(pipe, steps=2), expected)


@families("wan", "wan22", "cogvideox", matrix=["flux", "sd3"])
def test_second_patch_replaces_the_first(family: Family) -> None:
    pipe = family.make()
    expected = family.run(pipe, steps=2)
    before = Snapshot(pipe)
    first = set_attention_backend(pipe, "half")
    second = set_attention_backend(pipe, "math")
    assert not first.active
    assert second.active
    alone = family.make()
    set_attention_backend(alone, "math")
    output = family.run(pipe, steps=2)
    assert torch.equal(output, family.run(alone, steps=2))
    assert not any(first.calls.values())
    first.remove()  # a patch that was replaced undoes nothing of its successor
    assert torch.equal(family.run(pipe, steps=2), output)
    second.remove()
    assert_same(before, pipe)
    assert torch.equal(family.run(pipe, steps=2), expected)


def test_patch_is_removed_from_inside_a_run() -> None:
    family, pipe = wan()
    family.run(pipe, steps=4)
    before = Snapshot(pipe)
    patch = set_attention_backend(pipe, "math")

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            patch.remove()
        return values

    family.run(pipe, steps=4, callback_on_step_end=stop)
    assert patch.calls == {"transformer": {"math": 2 * 24}}
    assert_same(before, pipe)


def test_patch_that_is_kept_keeps_no_model_alive() -> None:
    family, pipe = wan()
    patch = set_attention_backend(pipe, "math")
    family.run(pipe, steps=1)
    gone = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert gone() is None
    assert patch.calls == {"transformer": {"math": 24}}
    patch.remove()


def test_processor_that_somebody_else_has_set_meanwhile_stays() -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    family, pipe = wan(num_layers=2)
    expected = family.run(pipe, steps=1)
    patch = set_attention_backend(pipe, "math")
    theirs = WanAttnProcessor()
    pipe.transformer.blocks[0].attn1.processor = theirs
    family.run(pipe, steps=1)
    assert patch.calls == {"transformer": {"math": 6}}
    patch.remove()
    assert pipe.transformer.blocks[0].attn1.processor is theirs
    assert torch.equal(family.run(pipe, steps=1), expected)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_processors_that_were_taken_from_a_patch_are_processors_like_others(name: str) -> None:
    """As `attn_processors` and `set_attn_processor` of diffusers are used."""
    family = present(name)
    pipe = family.make()
    expected = family.run(pipe, steps=2)
    patch = set_attention_backend(pipe, "half")
    layers = [layer for layer in pipe.transformer.modules() if getattr(layer, "processor", None) is not None]
    kept = [layer.processor for layer in layers]
    patch.remove()
    for layer, processor in zip(layers, kept, strict=True):
        layer.processor = processor
    assert torch.equal(family.run(pipe, steps=2), expected), "of a patch that is removed"
    other = set_attention_backend(pipe, "half")
    assert not torch.equal(family.run(pipe, steps=2), expected)
    assert other.calls["transformer"]["half"] > 0


# Isolation


@families("wan", "cogvideox")
def test_other_pipelines_of_the_class_are_untouched(family: Family) -> None:
    pipe, other = family.make(), family.make()
    expected = family.run(other, steps=2)
    before = Snapshot(other)
    with set_attention_backend(pipe, "half"):
        assert not torch.equal(family.run(pipe, steps=2), expected)
        assert torch.equal(family.run(other, steps=2), expected)
        assert_same(before, other)


@families("wan", "cogvideox")
def test_two_pipelines_with_two_backends(family: Family) -> None:
    alone = {}
    for name in ("math", "half"):
        set_attention_backend(pipe := family.make(), name)
        alone[name] = family.run(pipe, steps=2)
    pipes = {name: family.make() for name in alone}
    patches = {name: set_attention_backend(pipe, name) for name, pipe in pipes.items()}
    for _ in range(2):
        for name, pipe in pipes.items():
            assert torch.equal(family.run(pipe, steps=2), alone[name])
    for name, patch in patches.items():
        assert [*patch.calls["transformer"]] == [name]


@families("wan", "sd3")
def test_two_threads_with_two_backends(family: Family) -> None:
    pipes = {name: family.make() for name in ("math", "half")}
    patches = {name: set_attention_backend(pipe, name) for name, pipe in pipes.items()}
    expected = {name: family.run(pipe, steps=6) for name, pipe in pipes.items()}
    once = {name: patch.calls["transformer"][name] for name, patch in patches.items()}
    outputs: dict[str, list[Tensor]] = {name: [] for name in pipes}
    start = threading.Barrier(2)

    def work(name: str) -> None:
        start.wait()
        outputs[name] += [family.run(pipes[name], steps=6) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(name,)) for name in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, seen in outputs.items():
        assert len(seen) == 3
        assert all(torch.equal(output, expected[name]) for output in seen)
        assert patches[name].calls["transformer"] == {name: 4 * once[name]}


def test_default_of_diffusers_stays_what_it_is() -> None:
    family, pipe = wan()
    before = _AttentionBackendRegistry._active_backend, dict(_AttentionBackendRegistry._backends)
    for name in ("math", "half"):
        with set_attention_backend(pipe, name):
            family.run(pipe, steps=1)
            assert (_AttentionBackendRegistry._active_backend, dict(_AttentionBackendRegistry._backends)) == before
    assert (_AttentionBackendRegistry._active_backend, dict(_AttentionBackendRegistry._backends)) == before


# Beside a cache


def attention(pipe: Any) -> Any:
    return set_attention_backend(pipe, "math")


@cross("family, cache", family_params("wan", "cogvideox"), ["teacache", "reuse"])
def test_cache_and_attention_in_both_orders(family: Family, cache: str) -> None:
    """The output is the same, and removing them in any order restores exactly."""
    with attention(pipe := family.make()):
        computed = family.run(pipe)
    apply: dict[str, Callable[[Any], Any]] = {"cache": CACHES[cache], "attention": attention}
    outputs = []
    for first, second in (("cache", "attention"), ("attention", "cache")):
        for removed_first in ("cache", "attention"):
            pipe = family.make()
            expected = family.run(pipe)
            before = Snapshot(pipe)
            patches = {name: apply[name](pipe) for name in (first, second)}
            outputs.append(family.run(pipe))
            assert skips_some(patches["cache"])
            assert not torch.equal(outputs[-1], computed)
            assert patches["attention"].calls["transformer"]["math"] > 0
            patches.pop(removed_first).remove()
            (remaining,) = patches.values()
            assert remaining.active
            left = family.run(pipe)
            assert torch.equal(left, computed) == (removed_first == "cache")
            remaining.remove()
            assert_same(before, pipe)
            assert torch.equal(family.run(pipe), expected)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_one_replaced_beside_the_other() -> None:
    family, pipe = wan()
    family.run(pipe)
    before = Snapshot(pipe)
    cache = CACHES["reuse"](pipe)
    first = attention(pipe)
    CACHES["taylor"](pipe)
    assert not cache.active
    assert first.active
    second = set_attention_backend(pipe, "sdpa")
    assert not first.active
    output = family.run(pipe)
    CACHES["taylor"](alone := family.make())
    assert torch.equal(output, family.run(alone))
    assert second.calls["transformer"]["sdpa"] > 0
    remove(pipe)
    assert_same(before, pipe)


def test_steps_that_keep_their_attention_beside_a_cache() -> None:
    family = present("wan")
    outputs = []
    for order in (0, 1):
        pipe = family.make()
        both = [CACHES["reuse"], lambda pipe: set_attention_backend(pipe, "half", skip_first_steps=2)]
        patches = [apply(pipe) for apply in (both if order else both[::-1])]
        outputs.append(family.run(pipe))
        cache = next(patch for patch in patches if patch.kind == "cache")
        computed = cache.stats.runs[-1].branches["cond"].computed
        assert not all(computed)
        (mine,) = (patch for patch in patches if patch.kind == "attention")
        # 12 layers, of which the cache lets 2 run at the steps that it skips
        count = sum(2 * (12 if full else 2) for full in computed[2:])
        assert mine.calls == {"transformer": {"half": count}}
    assert torch.equal(*outputs)


# Steps


def test_steps_at_both_ends() -> None:
    assert not Steps()
    assert [Steps(2, 1).includes(step, 6) for step in range(6)] == [False, False, True, True, True, False]
    assert [Steps(0, 4).includes(step, 6) for step in range(6)] == [True, True, False, False, False, False]
    assert not any(Steps(4, 4).includes(step, 6) for step in range(6))


def on_a_fixed_path(
    family: Family, patch_with: dict[str, Any] | None = None, steps: int = 6, **given: Any
) -> list[Tensor]:
    """What the transformers return, call by call, where no call can see what another one returned."""
    pipe = family.make(scheduler=FixedPath())
    if patch_with is not None:
        set_attention_backend(pipe, "half", **patch_with)
    return transformer_outputs(family, pipe, steps=steps, **given)


STEPS_OF = [
    *(("wan", *ends) for ends in ((2, 0), (0, 1), (1, 2), (5, 5))),
    *((name, 2, 1) for name in ("wan22", "ltx", "flux")),
    *(pytest.param(name, 2, 1, marks=pytest.mark.matrix) for name in ("sd3", "qwen", "hunyuan", "zimage", "lumina2")),
]


@pytest.mark.parametrize(("name", "first", "last"), STEPS_OF)
def test_steps_are_left_bit_by_bit_as_they_are(name: str, first: int, last: int) -> None:
    """Two experts, one call a step for both branches, and a call for each of them."""
    family = present(name)
    unpatched = on_a_fixed_path(family)
    patched = on_a_fixed_path(family, {"skip_first_steps": first, "skip_last_steps": last})
    branches = len(family.branches)
    assert len(patched) == len(unpatched) == 6 * branches
    for step in range(6):
        for call in range(step * branches, (step + 1) * branches):
            kept = not first <= step < 6 - last
            assert torch.equal(patched[call], unpatched[call]) == kept, f"step {step}"


def test_steps_of_another_number_and_of_the_run_after_an_error() -> None:
    family, pipe = wan()
    patch = set_attention_backend(pipe, "math", skip_first_steps=1, skip_last_steps=1)
    for steps in (3, 8, 2):
        before = sum(patch.calls["transformer"].values())
        family.run(pipe, steps=steps)
        assert patch.calls["transformer"]["math"] - before == 24 * (steps - 2)

    def fail(*args: Any) -> dict[str, Any]:
        if args[1] == 2:
            raise Interrupted
        return args[3]

    with pytest.raises(Interrupted):
        family.run(pipe, steps=6, callback_on_step_end=fail)
    before = patch.calls["transformer"]["math"]
    family.run(pipe, steps=6)
    assert patch.calls["transformer"]["math"] - before == 24 * 4


@families("wan", "ltx")
def test_other_guidance_counts_steps_alike(family: Family) -> None:
    assert family.other_guidance is not None
    guidance, branches = family.other_guidance
    unpatched = on_a_fixed_path(family, steps=3, guidance=guidance)
    patched = on_a_fixed_path(family, {"skip_first_steps": 1, "skip_last_steps": 1}, steps=3, guidance=guidance)
    assert len(patched) == 3 * len(branches)
    same = [torch.equal(*pair) for pair in zip(patched, unpatched, strict=True)]
    assert same == [True] * len(branches) + [False] * len(branches) + [True] * len(branches)


def test_call_outside_of_any_loop() -> None:
    """Belongs to no step: it keeps its own attention where steps are skipped, and has the backend where none are."""
    family, pipe = wan()
    bare = family.bare()

    def output() -> Tensor:
        with torch.no_grad():
            return pipe.transformer(**bare)[0]

    expected = output()
    with set_attention_backend(pipe, "half", skip_last_steps=1) as patch:
        assert torch.equal(output(), expected)
        family.run(pipe, steps=2)
        assert patch.calls == {"transformer": {"half": 24}}
        assert torch.equal(output(), expected)
    with set_attention_backend(pipe, "half"):
        assert not torch.equal(output(), expected)


def test_memory_of_steps_is_let_go() -> None:
    family, pipe = wan()
    set_attention_backend(pipe, "math", skip_first_steps=1)
    seen: list[weakref.ref[Any]] = []

    def look(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(weakref.ref(pipe.scheduler.timesteps))
        return values

    family.run(pipe, steps=2, callback_on_step_end=look)
    pipe.scheduler.timesteps = None
    gc.collect()
    assert seen[0]() is None
