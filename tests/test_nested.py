"""A patch within the block of another one takes its place, and gives it back; one whose model is gone says so."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from invariants import CACHES, NEVER_SKIPPING, Snapshot, assert_same
from invariants.families import present
from sgl_diffusion_accel import (
    CachePatch,
    ConfigError,
    Patch,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_magcache,
    remove,
    set_attention_backend,
)
from sgl_diffusion_accel.patch import patches_on
from sgl_diffusion_accel.targets import Target
from zoo import Family

Apply = Callable[[Any], Patch]

BLOCKS: Apply = CACHES["reuse"]
WHOLE: Apply = CACHES["adaptive"]
MATH: Apply = lambda pipe: set_attention_backend(pipe, "math")  # noqa: E731
SDPA: Apply = lambda pipe: set_attention_backend(pipe, "sdpa")  # noqa: E731


@pytest.fixture
def family() -> Family:
    return present("wan22")


@pytest.fixture
def pipe(family: Family) -> Any:
    pipe = family.make()
    family.run(pipe)
    return pipe


def output_with(family: Family, *applies: Apply) -> torch.Tensor:
    pipe = family.make()
    for apply in applies:
        apply(pipe)
    return family.run(pipe)


@pytest.mark.parametrize(
    ("outer", "inner"), [(BLOCKS, WHOLE), (WHOLE, BLOCKS), (BLOCKS, CACHES["static"]), (MATH, SDPA)]
)
def test_outer_patch_acts_again_after_the_inner_one(family: Family, pipe: Any, outer: Apply, inner: Apply) -> None:
    plain, by_outer, by_inner = (output_with(family, *each) for each in ((), (outer,), (inner,)))
    before = Snapshot(pipe)
    with outer(pipe) as one:
        assert torch.equal(family.run(pipe), by_outer)
        inside = [block.attn1.processor for block in pipe.transformer.blocks]
        with inner(pipe) as other:
            assert (one.active, other.active) == (False, True)
            assert "taken its place" in str(one)
            assert "taken its place" in repr(one)
            assert patches_on(pipe) == [other]
            assert torch.equal(family.run(pipe), by_inner)
        assert (one.active, other.active) == (True, False)
        assert "taken its place" not in str(one)
        assert patches_on(pipe) == [one]
        assert torch.equal(family.run(pipe), by_outer)
        assert all(was is block.attn1.processor for was, block in zip(inside, pipe.transformer.blocks, strict=True))
        if outer is not MATH:
            assert len(one.stats.runs) == 2  # type: ignore[attr-defined]
    assert_same(before, pipe)
    assert torch.equal(family.run(pipe), plain)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_outer_patch_acts_again_after_an_error_inside(family: Family, pipe: Any, error: type[BaseException]) -> None:
    with BLOCKS(pipe) as outer:
        with pytest.raises(error), WHOLE(pipe):
            raise error
        assert outer.active
        assert torch.equal(family.run(pipe), output_with(family, BLOCKS))


def test_patch_within_that_is_removed_without_a_block_gives_the_place_back(pipe: Any) -> None:
    with BLOCKS(pipe) as outer:
        inner = WHOLE(pipe)
        assert not outer.active
        inner.remove()
        assert outer.active


def test_patch_within_that_stays_outlives_the_block(family: Family, pipe: Any) -> None:
    """It was applied for good, as anywhere else."""
    with BLOCKS(pipe) as outer:
        inner = WHOLE(pipe)
    assert (outer.active, inner.active) == (False, True)
    assert torch.equal(family.run(pipe), output_with(family, WHOLE))
    inner.remove()
    assert patches_on(pipe) == []
    assert not outer.active


def test_patch_without_a_block_is_replaced_for_good(pipe: Any) -> None:
    first = BLOCKS(pipe)
    with WHOLE(pipe):
        assert not first.active
        assert "removed" in str(first)
    assert patches_on(pipe) == []


def test_three_blocks_give_back_one_after_the_other(pipe: Any) -> None:
    with BLOCKS(pipe) as one:
        with WHOLE(pipe) as two:
            with CACHES["static"](pipe) as three:
                assert [patch.active for patch in (one, two, three)] == [False, False, True]
            assert patches_on(pipe) == [two]
        assert patches_on(pipe) == [one]
    assert patches_on(pipe) == []


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_blocks_that_end_in_any_order_leave_nothing(pipe: Any, order: tuple[int, ...]) -> None:
    """The innermost one that is still open acts."""
    before = Snapshot(pipe)
    blocks = [contextlib.ExitStack() for _ in range(3)]
    patches = [blocks[i].enter_context(apply(pipe)) for i, apply in enumerate((BLOCKS, WHOLE, CACHES["static"]))]
    open_ = [0, 1, 2]
    for index in order:
        blocks[index].close()
        open_.remove(index)
        assert patches_on(pipe) == ([patches[open_[-1]]] if open_ else [])
        assert [patch.active for patch in patches] == [i == max(open_, default=-1) for i in range(3)]
    assert_same(before, pipe)


def test_replacing_again_and_again_keeps_the_outer_one_alone(pipe: Any) -> None:
    with BLOCKS(pipe) as outer:
        for _ in range(3):
            gone = weakref.ref(inner := WHOLE(pipe))
        last = BLOCKS(pipe)
        del inner
        gc.collect()
        assert gone() is None
        last.remove()
        assert outer.active


def test_remove_of_the_pipeline_ends_outer_and_inner(family: Family, pipe: Any) -> None:
    before = Snapshot(pipe)
    with BLOCKS(pipe) as outer, MATH(pipe) as attention:
        with WHOLE(pipe) as inner, SDPA(pipe):
            remove(pipe)
            assert_same(before, pipe)
            assert not outer.active
            assert not inner.active
            assert not attention.active
        assert_same(before, pipe)
    assert_same(before, pipe)


@pytest.mark.parametrize("is_open", [True, False])
def test_old_patch_is_back_where_the_new_one_fails(
    family: Family, pipe: Any, monkeypatch: pytest.MonkeyPatch, is_open: bool
) -> None:
    """Half of the new one is on: the second expert refuses."""
    attach, expected = CachePatch.attach, output_with(family, WHOLE)

    def fails(self: CachePatch, target: Target, *rest: Any) -> None:
        if target.name == "transformer_2":
            raise RuntimeError("cannot")
        attach(self, target, *rest)

    with WHOLE(pipe) if is_open else contextlib.nullcontext(WHOLE(pipe)) as old:
        monkeypatch.setattr(CachePatch, "attach", fails)
        with pytest.raises(RuntimeError, match="cannot"):
            BLOCKS(pipe)
        assert old.active
        assert patches_on(pipe) == [old]
        assert torch.equal(family.run(pipe), expected)


def test_refused_setting_leaves_the_patch_as_it_was(pipe: Any) -> None:
    old = BLOCKS(pipe)
    with pytest.raises(ConfigError):
        apply_magcache(pipe, [1.0], threshold=0.1)
    assert old.active


def test_patch_on_a_part_of_the_model_gives_the_place_back(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    with BLOCKS(pipe) as outer:
        with WHOLE(pipe.transformer) as inner:
            assert patches_on(pipe) == [inner]
            assert "gone" not in caplog.text
        assert patches_on(pipe) == [outer]
        assert patches_on(pipe.transformer_2) == [outer]


def test_patch_on_another_part_is_not_run_over(pipe: Any) -> None:
    """The outer patch comes back only where nothing else has come meanwhile; then as a whole."""
    with BLOCKS(pipe) as outer:
        with WHOLE(pipe.transformer):
            other = WHOLE(pipe.transformer_2)
        assert not outer.active
        assert patches_on(pipe) == [other]
        other.remove()
        assert outer.active
        assert patches_on(pipe.transformer) == patches_on(pipe.transformer_2) == [outer]


def test_processor_that_was_changed_inside_is_kept(pipe: Any) -> None:
    processor = pipe.transformer.blocks[0].attn1.processor
    with MATH(pipe), SDPA(pipe):
        pipe.transformer.blocks[0].attn1.processor._attention_backend = AttentionBackendName.NATIVE
    assert pipe.transformer.blocks[0].attn1.processor is processor
    assert processor._attention_backend is AttentionBackendName.NATIVE
    mine = copy.copy(processor)
    with MATH(pipe) as outer:
        with SDPA(pipe):
            pipe.transformer.blocks[0].attn1.set_processor(mine)
        assert "1 layers were given other processors" in str(outer)
    assert pipe.transformer.blocks[0].attn1.processor is mine


def test_steps_without_the_backend_are_kept_by_the_outer_patch(family: Family, pipe: Any) -> None:
    with set_attention_backend(pipe, "math", skip_first_steps=2) as outer:
        with SDPA(pipe):
            family.run(pipe)
        assert sum(outer.calls["transformer"].values()) == 0
        family.run(pipe)
        assert 0 < sum(outer.calls["transformer"].values()) < sum(outer.calls["transformer_2"].values())


# A transformer that is replaced


@pytest.mark.parametrize("apply", [BLOCKS, WHOLE, MATH])
def test_patch_whose_transformer_was_replaced_says_so(
    family: Family, pipe: Any, apply: Apply, caplog: pytest.LogCaptureFixture
) -> None:
    patch, first = apply(pipe), pipe.transformer
    assert patch.replaced == ()
    pipe.transformer = family.make(seed=5).transformer
    assert patch.replaced == ("transformer",)
    assert patch.active, "it acts on the second expert"
    for shown in (str(patch), repr(patch), patch._repr_html_()):  # type: ignore[attr-defined]
        assert "pipe.transformer was replaced since: nothing acts on it. Apply again" in shown
    pipe.transformer_2 = family.make(seed=5).transformer_2
    assert patch.replaced == ("transformer", "transformer_2")
    assert not patch.active
    assert "pipe.transformer and pipe.transformer_2" in str(patch)
    pipe.transformer = first
    assert patch.active
    assert patch.replaced == ("transformer_2",)
    patch.remove()
    assert not patch.active
    assert "replaced" not in str(patch)


def test_statistics_warn_once_of_a_transformer_that_was_replaced(
    family: Family, pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    patch = apply_adaptive_cache(pipe)
    pipe.transformer = family.make(seed=5).transformer
    with caplog.at_level(logging.WARNING):
        assert patch.stats.runs == ()
        assert patch.stats.runs == ()
    assert caplog.text.count("was replaced since") == 1


def test_patch_is_replaced_when_its_transformer_is_no_more(family: Family, pipe: Any) -> None:
    patch = BLOCKS(pipe)
    pipe.transformer = pipe.transformer_2 = None
    gc.collect()
    assert patch.replaced == ("transformer", "transformer_2")
    assert not patch.active


def test_wrapper_around_the_transformer_replaces_nothing(pipe: Any) -> None:
    patch = BLOCKS(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert patch.replaced == ()


def test_applying_again_patches_the_new_transformer(family: Family, pipe: Any) -> None:
    old = NEVER_SKIPPING["threshold 0"](pipe)
    pipe.transformer = family.make(seed=5).transformer
    new = BLOCKS(pipe)
    assert new.active
    assert new.replaced == ()
    assert patches_on(pipe) == [new]
    assert not old.active


def test_remove_reaches_the_transformer_that_was_replaced(family: Family, pipe: Any) -> None:
    first = pipe.transformer
    patch = BLOCKS(pipe)
    pipe.transformer, pipe.transformer_2 = family.make(seed=5).transformer, None
    remove(pipe)
    assert not patch.active
    assert patches_on(first) == []
    pipe.transformer = first
    assert patches_on(pipe) == []


def test_pipeline_is_not_kept_alive_and_a_patch_outlives_it(family: Family) -> None:
    pipe = family.make()
    model, patch, gone = pipe.transformer, BLOCKS(pipe), weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    assert patch.replaced == ()
    assert patch.active
    patch.remove()
    assert patches_on(model) == []


def test_transformer_by_itself_is_of_no_pipeline(family: Family, pipe: Any) -> None:
    patch = apply_cache_dit(pipe.transformer)
    pipe.transformer = None
    assert patch.replaced == ()
    assert patch.active
