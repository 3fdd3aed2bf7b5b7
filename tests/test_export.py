"""A patched model is not exported or traced: the graph would hold what the patch decided once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from invariants import CACHES, families
from sgl_diffusion_accel import AccelError, Patch, apply_adaptive_cache, profile, remove, set_attention_backend
from zoo import Family

PATCHES: dict[str, Callable[[Any], Patch]] = {
    "blocks": CACHES["reuse"],
    "teacache": CACHES["teacache"],
    "adaptive": apply_adaptive_cache,
    "attention": lambda pipe: set_attention_backend(pipe, "math"),
    "attention at some steps": lambda pipe: set_attention_backend(pipe, "math", skip_first_steps=1),
}


class Whole(nn.Module):
    """A model of the user's own with the transformer inside."""

    def __init__(self, transformer: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.transformer = transformer
        self.names = names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        output: torch.Tensor = self.transformer(**given, return_dict=False)[0]
        return output


def few_blocks(family: Family) -> Any:
    """A pipeline with few blocks: a graph of more takes longer and says the same."""
    return family.make(num_layers=1, num_single_layers=2)


def whole(family: Family, pipe: Any) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    given = {name: value for name, value in family.bare().items() if isinstance(value, torch.Tensor)}
    return Whole(pipe.transformer, list(given)), tuple(given.values())


def traced(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    return torch.jit.trace(model, inputs, check_trace=False)


def exported(strict: bool) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], Any]:
    return lambda model, inputs: torch.export.export(model, inputs, strict=strict).module()


WAYS = {"strict": exported(True), "not strict": exported(False), "traced": traced}
CASES = [
    *((name, "not strict") for name in PATCHES if name != "teacache"),
    ("blocks", "traced"),
    *(
        pytest.param(name, way, marks=pytest.mark.matrix)
        for name, way in (
            ("teacache", "not strict"),
            ("blocks", "strict"),
            ("adaptive", "strict"),
            ("adaptive", "traced"),
            ("attention", "strict"),
            ("attention", "traced"),
        )
    ),
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@torch.no_grad()
@families("flux")
@pytest.mark.parametrize(("name", "way"), CASES)
def test_patched_model_is_refused_with_what_to_type(family: Family, name: str, way: str) -> None:
    pipe = few_blocks(family)
    model, inputs = whole(family, pipe)
    expected = model(*inputs)
    patch = PATCHES[name](pipe)
    with pytest.raises(Exception, match=re.escape("remove(pipe)")) as seen:
        WAYS[way](model, inputs)
    assert isinstance(seen.value, torch._dynamo.exc.Unsupported if way == "strict" else AccelError)
    assert patch.active
    remove(pipe)
    graph = WAYS[way](model, inputs)
    PATCHES[name](pipe)
    assert torch.equal(graph(*inputs), expected), "the graph is that of the model, whatever the model is given later"


@torch.no_grad()
@families("flux")
def test_patch_acts_as_before_after_an_export_that_was_refused(family: Family) -> None:
    pipe, plain = few_blocks(family), few_blocks(family)
    CACHES["reuse"](plain)
    expected = family.run(plain)
    CACHES["reuse"](pipe)
    model, inputs = whole(family, pipe)
    for way in (exported(True), exported(False)):
        with pytest.raises(Exception, match="remove"):
            way(model, inputs)
    torch._dynamo.reset()
    assert torch.equal(family.run(pipe), expected)


@torch.no_grad()
@families("flux")
def test_part_without_a_handler_is_exported_with_the_backend(family: Family) -> None:
    """A block's attention is redirected by its processor, which decides nothing."""
    pipe = family.make()
    block, hidden = pipe.transformer.single_transformer_blocks[0].attn, torch.randn(1, 6, 32)
    set_attention_backend(pipe, "math")
    expected = block(hidden)
    graph = torch.export.export(block, (hidden,), strict=False).module()
    remove(pipe)
    torch.testing.assert_close(graph(hidden), expected)


@torch.no_grad()
@families("flux")
def test_model_that_is_only_watched_is_exported_as_it_is(family: Family) -> None:
    pipe = few_blocks(family)
    model, inputs = whole(family, pipe)
    expected = model(*inputs)
    with profile(pipe, trace=False) as prof:
        graph = torch.export.export(model, inputs, strict=False).module()
    assert not prof.report.calls
    assert torch.equal(graph(*inputs), expected)
