"""Patching before and after PyTorch's `fully_shard` gives the same, and no class leaks into its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from invariants import CACHES, Snapshot, assert_same, cross
from invariants.families import present
from sgl_diffusion_accel import Patch, apply_cache_dit, remove, set_attention_backend
from sgl_diffusion_accel.slots import original_class
from sgl_diffusion_accel.targets import model_class
from zoo import Family

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this PyTorch has no fully_shard", allow_module_level=True)

Apply = Callable[[Any], Patch]

PATCHES: dict[str, Apply] = {
    **{name: CACHES[name] for name in ("reuse", "teacache", "magcache, Taylor", "gap control", "adaptive", "plan")},
    "attention": lambda pipe: set_attention_backend(pipe, "math"),
}
CASES = [*(("flux", name) for name in PATCHES), ("wan", "teacache")]  # Wan's signal is the time embedding
ORDERS = ("patch, shard", "shard, patch")


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> dict[type, type]:
    """The table of `fully_shard`, empty at first: class to the sharded class."""
    from torch.distributed.fsdp._fully_shard import _fully_shard

    classes: dict[type, type] = {}
    monkeypatch.setattr(_fully_shard, "cls_to_fsdp_cls", classes)
    return classes


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Family:
    return present(getattr(request, "param", "flux"))


def shard(family: Family, pipe: Any) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for _, _, block in family.blocks(pipe.transformer):
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(pipe.transformer, mesh=mesh)


def sharded(family: Family, pipe: Any) -> list[Any]:
    return [pipe.transformer, *(block for _, _, block in family.blocks(pipe.transformer))]


def is_free(cls: type) -> bool:
    """Whether nothing of this library is in a class."""
    return not any("_sgl_diffusion_accel" in name for each in cls.__mro__ for name in vars(each))


BOTH_ORDERS = [("flux", "reuse"), ("flux", "adaptive"), ("flux", "attention")]


@pytest.mark.parametrize(
    ("family", "name", "order"),
    [
        pytest.param(*case, order, marks=[] if order == ORDERS[0] or case in BOTH_ORDERS else [pytest.mark.matrix])
        for case in CASES
        for order in ORDERS
    ],
    indirect=["family"],
)
def test_patched_and_sharded_model_gives_what_the_patched_one_gives(
    family: Family, table: dict[type, type], name: str, order: str
) -> None:
    plain, pipe = family.make(), family.make()
    unpatched = family.run(plain)
    PATCHES[name](plain)
    expected = family.run(plain)
    if order == "shard, patch":
        shard(family, pipe)
    patch = PATCHES[name](pipe)
    if order == "patch, shard":
        shard(family, pipe)
    assert all(isinstance(module, fsdp.FSDPModule) for module in sharded(family, pipe))
    assert torch.equal(family.run(pipe), expected)
    assert not torch.equal(expected, unpatched)
    patch.remove()
    assert [type(module) for module in sharded(family, pipe)] == [
        table[model_class(module)] for module in sharded(family, pipe)
    ]
    assert torch.equal(family.run(pipe), unpatched)


@cross("order, before", ORDERS, {"sharded after": False, "sharded before": True})
def test_unpatched_model_of_the_class_gets_no_intercepted_class(
    family: Family, table: dict[type, type], order: str, before: bool
) -> None:
    other, pipe = family.make(), family.make()
    if before:
        shard(family, other)
    if order == "patch, shard":
        apply_cache_dit(pipe, residual_diff_threshold=0.5)
        shard(family, pipe)
    else:
        shard(family, pipe)
        apply_cache_dit(pipe, residual_diff_threshold=0.5)
    if not before:
        shard(family, other)
    for module in sharded(family, other):
        assert type(module) is original_class(module) is table[model_class(module)]
        assert is_free(type(module))
    assert not is_free(type(pipe.transformer))
    assert {id(cls) for cls in table} == {id(model_class(module)) for module in sharded(family, other)}


def test_removal_from_a_sharded_model_is_exact(family: Family) -> None:
    pipe = family.make()
    shard(family, pipe)
    family.run(pipe)  # what is made at the first call
    before = Snapshot(pipe)
    for apply in PATCHES.values():
        apply(pipe)
        family.run(pipe)
    remove(pipe)
    assert_same(before, pipe)


def test_sharded_model_is_known_by_its_name() -> None:
    """What is known of odd models, and of TeaCache's signals, holds for the sharded model."""
    family = present("hunyuan")
    pipe = family.make()
    expected = family.run(pipe)
    shard(family, pipe)
    assert type(pipe.transformer).__name__ == "FSDPHunyuanVideoTransformer3DModel"
    assert model_class(pipe.transformer).__name__ == "HunyuanVideoTransformer3DModel"
    CACHES["plan"](pipe).remove()
    patch = apply_cache_dit(pipe, residual_diff_threshold=0.0)
    assert torch.equal(family.run(pipe), expected)
    assert patch.stats.outside == 0
