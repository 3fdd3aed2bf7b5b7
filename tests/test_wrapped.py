"""A model in a wrapper of PyTorch's is patched inside, whichever came first; a wrapper that copies it is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from invariants import CACHES, count_blocks
from invariants.families import present
from sgl_diffusion_accel import (
    Patch,
    UnsupportedModelError,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_cache_plan,
    calibrate,
    profile,
    remove,
    set_attention_backend,
)
from sgl_diffusion_accel.slots import SLOT, original_class
from sgl_diffusion_accel.targets import find_targets, is_in_compiled_wrapper, unwrap
from zoo import Family

PATCHES: dict[str, Callable[[Any], Patch]] = {
    **{name: CACHES[name] for name in ("reuse", "teacache", "gap control", "adaptive")},
    "attention": lambda pipe: set_attention_backend(pipe, "math"),
}


class Delegating(DistributedDataParallel):
    """As users write it: a pipeline asks its transformer for more than a call."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


def distributed(model: nn.Module) -> nn.Module:
    return Delegating(model)


def shares(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single process shares nothing
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def each_block(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: Any) -> nn.Module:
        for blocks in (model.transformer_blocks, model.single_transformer_blocks):
            for index, block in enumerate(blocks):
                blocks[index] = wrap(block)
        return model

    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": distributed,
    "FSDP": shares,
    "FSDP, by block": lambda model: shares(each_block(shares)(model)),
    "checkpointing": each_block(checkpoint_wrapper),
    "compiled DDP": lambda model: torch.compile(distributed(model), backend="eager"),
    "DDP, compiled": lambda model: distributed(torch.compile(model, backend="eager")),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def family() -> Family:
    return present("flux")


@pytest.fixture
def pipe(family: Family) -> Any:
    return family.make()


def wrap(pipe: Any, wrapper: str) -> None:
    pipe.transformer.requires_grad_()  # which these wrappers insist on
    pipe.transformer = WRAPPERS[wrapper](pipe.transformer)


CASES = [
    *(("FSDP, by block", name) for name in PATCHES),
    *(("DDP", name) for name in PATCHES),
    *((wrapper, name) for wrapper in ("FSDP", "checkpointing") for name in ("reuse", "adaptive")),
    *((wrapper, "adaptive") for wrapper in ("compiled DDP", "DDP, compiled")),
]


BY_DEFAULT = {
    *(("FSDP, by block", name, "patch") for name in PATCHES),
    *((wrapper, "adaptive", first) for wrapper in ("DDP", "FSDP", "checkpointing") for first in ("patch", "wrap")),
    *((wrapper, "reuse", "wrap") for wrapper in ("FSDP, by block", "checkpointing")),
    *(("DDP", name, "wrap") for name in ("reuse", "attention")),
    ("compiled DDP", "adaptive", "patch"),
    ("DDP, compiled", "adaptive", "wrap"),
}
"""Each wrapper in both orders, and each patch."""


@pytest.mark.parametrize(
    ("wrapper", "name", "first"),
    [
        pytest.param(*case, first, marks=[] if (*case, first) in BY_DEFAULT else [pytest.mark.matrix])
        for case in CASES
        for first in ("patch", "wrap")
    ],
)
def test_wrapped_model_gives_what_the_model_gives(
    family: Family, pipe: Any, wrapper: str, name: str, first: str
) -> None:
    inner, plain = pipe.transformer, family.make()
    PATCHES[name](plain)
    expected = family.run(plain)
    if first == "wrap":
        wrap(pipe, wrapper)
    patch = PATCHES[name](pipe)
    if first == "patch":
        wrap(pipe, wrapper)
    assert unwrap(pipe.transformer) is inner
    assert torch.equal(family.run(pipe), expected)
    remove(pipe)
    assert not patch.active
    assert all(type(module) is original_class(module) for module in pipe.transformer.modules())
    assert all(SLOT not in vars(module) for module in pipe.transformer.modules())


def test_distributed_model_is_skipped_as_a_whole(family: Family, pipe: Any) -> None:
    wrap(pipe, "DDP")
    calls: list[None] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(None))
    patch = CACHES["adaptive"](pipe)
    family.run(pipe)
    assert len(calls) == sum(patch.stats.runs[-1].branches["cond"].computed) < 6


def test_plan_of_a_model_is_for_the_wrapped_one(family: Family, pipe: Any) -> None:
    plan = calibrate(pipe, [family.call(pipe, steps=12)], teacache=False, magnitudes=False)
    wrap(pipe, "DDP")
    patch = apply_cache_plan(pipe, plan, speedup=2.0)
    family.run(pipe, steps=12)
    assert sum(patch.stats.runs[-1].branches["cond"].computed) == 6


def test_wrapped_model_by_itself(pipe: Any) -> None:
    inner = pipe.transformer
    inner.requires_grad_()
    wrapper = DistributedDataParallel(inner)
    patch = apply_cache_dit(wrapper)
    assert patch.components == ["transformer"]
    (target,) = find_targets(wrapper)
    assert (target.name, target.wrapper, target.module) == ("transformer", wrapper, unwrap(wrapper))
    remove(wrapper)
    assert not patch.active
    assert type(wrapper) is DistributedDataParallel


def test_blocks_of_a_distributed_model_are_traced(family: Family, pipe: Any, tmp_path: Any) -> None:
    wrap(pipe, "DDP")
    with profile(pipe, steps=1, output_dir=tmp_path) as prof:
        family.run(pipe)
    assert "compiled" not in str(prof.report)


def test_compiled_wrapper_is_seen_inside_and_outside_of_another(pipe: Any) -> None:
    pipe.transformer.requires_grad_()
    inner = pipe.transformer
    assert not is_in_compiled_wrapper(inner)
    assert not is_in_compiled_wrapper(WRAPPERS["DDP"](inner))
    assert is_in_compiled_wrapper(WRAPPERS["compiled DDP"](inner))
    assert is_in_compiled_wrapper(WRAPPERS["DDP, compiled"](inner))


def test_module_with_a_part_named_module_is_no_wrapper() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    model = Twice()
    assert unwrap(model) is model


@pytest.mark.parametrize(
    "apply", [apply_cache_dit, apply_adaptive_cache, lambda pipe: set_attention_backend(pipe, "math")]
)
@pytest.mark.parametrize("outer", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_wrapper_that_copies_the_model_is_refused(pipe: Any, apply: Any, outer: Any) -> None:
    inner = pipe.transformer
    pipe.transformer = outer(nn.DataParallel(inner))
    with pytest.raises(UnsupportedModelError, match=r"transformer\.module.*DistributedDataParallel"):
        apply(pipe)
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        apply(pipe.transformer)
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        set_attention_backend(pipe, "math", components="transformer")
    assert type(inner) is original_class(inner)


def test_copies_of_a_patched_model_are_refused_when_they_are_made(family: Family, pipe: Any) -> None:
    """On several devices; on one the wrapper calls the model itself."""
    patch = apply_cache_dit(pipe, residual_diff_threshold=0.5)
    for module in (pipe.transformer, pipe.transformer.transformer_blocks[1]):
        with pytest.raises(UnsupportedModelError, match=r"remove\(pipe\)"):
            module._replicate_for_data_parallel()
    with count_blocks(family, pipe) as counts:
        family.run(pipe, steps=12)
    assert min(counts.values()) < 12
    patch.remove()
    assert type(pipe.transformer._replicate_for_data_parallel()) is type(pipe.transformer)
