"""Never skipping changes no bit, and removing a patch leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from invariants import CACHES, NEVER_SKIPPING, Interrupted, Snapshot, assert_same, families, skips_some
from invariants.caches import KINDS, KINDS_NEVER_SKIPPING
from invariants.families import present
from sgl_diffusion_accel import ConfigError, apply_cache_dit, remove
from zoo import FAMILIES, Family


@families()
def test_never_skipping_changes_no_bit(family: Family) -> None:
    check_never_skipping(family, KINDS_NEVER_SKIPPING)


@families("wan", "wan22", "flux", matrix=FAMILIES)
def test_never_skipping_changes_no_bit_in_any_cache(family: Family) -> None:
    check_never_skipping(family, NEVER_SKIPPING)


def check_never_skipping(family: Family, names: Iterable[str]) -> None:
    pipe = family.make()
    expected = family.run(pipe)
    for name in names:
        patch = NEVER_SKIPPING[name](pipe)
        assert torch.equal(family.run(pipe), expected), name
        assert patch.stats.runs[-1].compute_share == 1.0
        assert patch.stats.outside == 0


TOO_SHORT = {("wan22", "adaptive")}
"""Two experts share the six steps, and the adaptive cache learns each of them anew."""


@families()
def test_remove_leaves_nothing_behind(family: Family) -> None:
    check_removal(family, KINDS)


@families("wan", "wan22", "flux", matrix=FAMILIES)
def test_remove_of_any_cache_leaves_nothing_behind(family: Family) -> None:
    check_removal(family, CACHES)


def check_removal(family: Family, names: Iterable[str]) -> None:
    pipe = family.make()
    expected = family.run(pipe)
    before = Snapshot(pipe)
    for name in names:
        if (family.name, name) in TOO_SHORT:
            continue
        patch = CACHES[name](pipe)
        assert before.differences(Snapshot(pipe))
        assert not torch.equal(family.run(pipe), expected), f"{name} skips nothing"
        assert skips_some(patch)
        for _ in range(2):
            patch.remove()
            assert_same(before, pipe)
    assert torch.equal(family.run(pipe), expected)


def wan() -> tuple[Family, Any]:
    family = present("wan")
    return family, family.make()


ONE_OF_EACH = [
    ("wan", "reuse"),
    ("wan", "teacache"),
    ("flux", "teacache"),
    ("wan", "magcache"),
    ("wan", "adaptive"),
    ("wan", "plan"),
]
"""By the first blocks' residual, by the time embedding, by the modulated input, by ratios, by the whole output, and by
plan."""


@pytest.mark.parametrize(("name", "cache"), ONE_OF_EACH)
def test_run_leaves_no_trace_on_classes_and_process(name: str, cache: str) -> None:
    family = present(name)
    pipe = family.make()
    family.run(pipe)
    with CACHES[cache](pipe):
        patched = Snapshot(pipe)
        family.run(pipe)
        assert_same(patched, pipe)


@pytest.mark.parametrize(("name", "cache"), ONE_OF_EACH)
def test_other_instances_of_the_class_are_untouched(name: str, cache: str) -> None:
    family = present(name)
    pipe, other = family.make(), family.make()
    expected = family.run(other)
    before = Snapshot(other)
    with CACHES[cache](pipe):
        assert torch.equal(family.run(other), expected)
        assert_same(before, other)
        family.run(pipe)
        assert_same(before, other)


@families("wan", "wan22", "flux", "hunyuan")
def test_second_patch_replaces_the_first(family: Family) -> None:
    pipe = family.make()
    expected = family.run(pipe)
    before = Snapshot(pipe)
    first = CACHES["reuse"](pipe)
    second = CACHES["taylor"](pipe)
    assert not first.active
    assert second.active
    with CACHES["taylor"](family.make()) as alone:
        pass
    assert not alone.active
    twice = family.run(pipe)
    assert not first.stats.runs
    fresh = family.make()
    CACHES["taylor"](fresh)
    assert torch.equal(twice, family.run(fresh))
    first.remove()  # a patch that was replaced undoes nothing of its successor
    assert torch.equal(family.run(pipe), twice)
    second.remove()
    assert_same(before, pipe)
    assert torch.equal(family.run(pipe), expected)


@families("wan22", "flux")
def test_remove_of_the_pipeline_undoes_every_patch(family: Family) -> None:
    pipe = family.make()
    family.run(pipe)
    before = Snapshot(pipe)
    patch = CACHES["reuse"](pipe)
    remove(pipe)
    assert not patch.active
    assert_same(before, pipe)
    remove(pipe)
    assert_same(before, pipe)


def test_patch_of_one_transformer_leaves_the_other() -> None:
    family = present("wan22")
    pipe = family.make()
    family.run(pipe)
    before = Snapshot(pipe)
    patch = CACHES["reuse"](pipe.transformer_2)
    family.run(pipe)
    assert set(patch.stats.runs[-1].branches["cond"].components) == {"transformer"}
    differences = before.differences(Snapshot(pipe))
    assert [line for line in differences if "transformer_2." in line]
    assert not [line for line in differences if "transformer." in line and not line.endswith("is new")]
    patch.remove()
    assert_same(before, pipe)


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_with_block_undoes_on_an_error(error: type[BaseException]) -> None:
    family, pipe = wan()
    expected = family.run(pipe)
    before = Snapshot(pipe)

    def run_and_fail() -> None:
        with CACHES["reuse"](pipe):
            family.run(pipe)
            raise error("on purpose")

    with pytest.raises(error, match="on purpose"):
        run_and_fail()
    assert_same(before, pipe)
    assert torch.equal(family.run(pipe), expected)


def test_refused_patch_leaves_the_one_in_place() -> None:
    family, pipe = wan()
    patch = CACHES["reuse"](pipe)
    output = family.run(pipe)
    before = Snapshot(pipe)
    with pytest.raises(ConfigError):
        apply_cache_dit(pipe, fn_compute_blocks=99)
    assert patch.active
    assert_same(before, pipe)
    assert torch.equal(family.run(pipe), output)


@pytest.mark.parametrize(("name", "cache"), ONE_OF_EACH)
def test_patch_is_removed_from_inside_a_run(name: str, cache: str) -> None:
    family = present(name)
    pipe = family.make()
    family.run(pipe)
    before = Snapshot(pipe)
    patch = CACHES[cache](pipe)

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            patch.remove()
        return values

    family.run(pipe, callback_on_step_end=stop)
    assert len(patch.stats.runs[-1].branches["cond"].computed) == 2
    assert patch.held_bytes() == 0
    assert_same(before, pipe)
