"""The attention of a model is found wherever it is, and sent elsewhere without touching anything but the layer."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import threading
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from invariants.families import families, present
from sgl_diffusion_accel.attention.backends.backend_table import Backend
from sgl_diffusion_accel.attention.backends.registry import find_backend
from sgl_diffusion_accel.attention.redirect import Redirect
from sgl_diffusion_accel.attention.select import set_attention_backend
from sgl_diffusion_accel.attention.sites import (
    Scope,
    Site,
    _exchangeable,
    _with_exchanged_names,
    find_scopes,
    find_sites,
    redirected,
)
from zoo import Family


def redirect(name: str = "math") -> Redirect:
    return Redirect("transformer", find_backend(name), "error")


def zeros() -> Redirect:
    """To a backend that answers with zeros, so that its work is seen."""
    return Redirect("transformer", Backend("zeros", lambda: lambda query, *_, **__: torch.zeros_like(query)), "error")


# Layers with processors


@families()
def test_every_attention_layer_is_found_in_order(family: Family) -> None:
    transformer = family.make().transformer
    sites = list(find_sites(transformer))
    assert [site.name for site in sites] == [
        name for name, module in transformer.named_modules() if getattr(module, "processor", None) is not None
    ]
    for site in sites:
        assert transformer.get_submodule(site.name) is site.layer
        assert site.layer.processor is site.processor
        assert site.can_redirect == ("Linear" not in type(site.processor).__name__)


def test_linear_attention_is_told_apart() -> None:
    sites = list(find_sites(present("sana").make().transformer))
    assert {site.why_not for site in sites if not site.can_redirect} == {
        "SanaLinearAttnProcessor2_0 is linear attention, which has no softmax"
    }
    assert {site.name.rsplit(".")[-1] for site in sites if site.can_redirect} == {"attn2"}


class OwnSoftmax:
    """Attention without PyTorch's function for it."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.softmax(hidden_states @ hidden_states.mT, -1) @ hidden_states


def test_processor_that_computes_by_itself_is_told() -> None:
    layer = Attention(query_dim=8, heads=2, dim_head=4, processor=OwnSoftmax())
    (site,) = find_sites(layer)
    assert not site.can_redirect
    assert site.why_not == "OwnSoftmax computes attention by itself, without PyTorch's function for it"


def classes_of_diffusers() -> Iterator[type]:
    """The attention processors of the installed diffusers."""
    names = ["diffusers.models.attention_processor"]
    folder = importlib.import_module("diffusers.models.transformers")
    names += [f"{folder.__name__}.{each.name}" for each in pkgutil.iter_modules(folder.__path__)]
    for name in names:
        module = importlib.import_module(name)
        for found in vars(module).values():
            if inspect.isclass(found) and found.__module__ == name and "Processor" in found.__name__:
                yield found


def test_what_can_be_redirected_is_redirected_in_all_of_diffusers() -> None:
    """A processor that reached the function by another way than those known would be left as it is in silence."""
    seen = 0
    for found in classes_of_diffusers():
        if not _exchangeable(object.__new__(found)):
            continue
        seen += 1
        method = found.forward if found.__call__ is nn.Module.__call__ else found.__call__
        made = _with_exchanged_names(method, redirect())
        assert [
            name for name in made.__code__.co_names if made.__globals__.get(name) is not method.__globals__.get(name)
        ]
    assert seen > 40


def site_of(family: Family) -> Site:
    return next(iter(find_sites(family.make().transformer)))


@families("wan", "flux", "sd3", "cogvideox")
def test_redirected_processor_is_a_copy_that_looks_the_same(family: Family) -> None:
    site = site_of(family)
    base, before = type(site.processor), dict(vars(site.processor))
    made = redirected(site, redirect(), {})
    assert made is not site.processor
    assert isinstance(made, base)
    assert type(made) is not base
    assert (type(made).__name__, type(made).__qualname__, type(made).__module__) == (
        *(base.__name__, base.__qualname__),
        base.__module__,
    )
    assert inspect.signature(type(made).__call__) == inspect.signature(base.__call__)
    own, original = type(made).__call__.__code__, base.__call__.__code__
    assert own == original, "made from diffusers' own code at run time"
    assert own is not original, "what the compiler keeps with one must not serve the other"
    assert type(site.processor) is base
    assert vars(site.processor) == before
    assert site.layer.processor is site.processor


def test_nothing_outside_of_the_processor_is_touched() -> None:
    from diffusers.models.transformers import transformer_wan

    site = site_of(present("wan"))
    before = dict(vars(transformer_wan)), dict(vars(F)), dict(vars(type(site.processor)))
    redirected(site, redirect(), {})
    assert (dict(vars(transformer_wan)), dict(vars(F)), dict(vars(type(site.processor)))) == before


def test_layers_with_one_class_of_processor_share_one() -> None:
    """So that compiled blocks are compiled once."""
    sites = list(find_sites(present("flux").make().transformer))
    classes: dict[type, type] = {}
    made = [redirected(site, redirect(), classes) for site in sites]
    assert len({type(each) for each in made}) == 1
    assert type(redirected(sites[0], redirect(), {})) is not type(made[0]), "another redirect has another"


class ByAlias:
    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
        return F.scaled_dot_product_attention(*[hidden_states[:, None]] * 3, scale=scale)[:, 0]


class ByPath:
    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*[hidden_states[:, None]] * 3)[:, 0]


# In a module of its own, where the function has no name.
ByPath.__call__ = FunctionType(ByPath.__call__.__code__, {"torch": torch})  # type: ignore[method-assign]


class ByName:
    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return scaled_dot_product_attention(*[hidden_states[:, None]] * 3)[:, 0]


class ByLocalImport:
    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(*[hidden_states[:, :, None]] * 3)[:, :, 0]


class Weighted(nn.Module):
    """A processor with weights, such as those of IP adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.weight + F.scaled_dot_product_attention(*[hidden_states[:, None]] * 3)[:, 0]


class WeightedCall(Weighted):
    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.weight + F.scaled_dot_product_attention(*[hidden_states[:, None]] * 3)[:, 0]


class Inheriting(ByAlias):
    """Has the method of its parent."""

    def shift(self) -> float:
        return 2.0


class Extending(Inheriting):
    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **more: Any) -> Tensor:
        return F.scaled_dot_product_attention(*[hidden_states[:, None]] * 3)[:, 0] + super().shift()


def with_processor(processor: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer with a processor, an input, and what the processor returns for it."""
    layer = Attention(query_dim=8, heads=2, dim_head=4, processor=processor)
    hidden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    return layer, hidden, processor(layer, hidden)


@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        pytest.param(ByAlias, 0, id="by the alias of the module"),
        pytest.param(Inheriting, 0, id="in the method of the parent"),
        pytest.param(Extending, 2, id="beside super"),
        pytest.param(Weighted, 1, id="in the forward of a module"),
        pytest.param(WeightedCall, 1, id="in the call of a module"),
    ],
)
def test_processor_is_redirected_and_the_layer_left_as_it_is(kind: Any, rest: int) -> None:
    """`rest` is what the processor returns where attention gives zeros."""
    layer, hidden, unpatched = with_processor(kind())
    (site,) = find_sites(layer)
    assert site.can_redirect
    made = redirected(site, zeros(), {})
    assert torch.equal(made(layer, hidden), torch.full_like(hidden, rest))
    assert torch.equal(layer.processor(layer, hidden), unpatched)


@pytest.mark.parametrize("kind", [ByPath, ByName, ByLocalImport])
def test_processor_that_names_the_function_otherwise_is_redirected_or_refused(kind: Any) -> None:
    layer, hidden, _ = with_processor(kind())
    (site,) = find_sites(layer)
    assert not site.can_redirect or not bool(redirected(site, zeros(), {})(layer, hidden).any())


def test_processor_that_is_a_module_keeps_its_weights_and_its_place() -> None:
    layer = Attention(query_dim=8, heads=2, dim_head=4, processor=Weighted())
    names, weight = list(layer.state_dict()), layer.processor.weight
    order = list(layer._modules)
    with set_attention_backend(layer, "math"):
        assert list(layer.state_dict()) == names
        assert layer.processor.weight is weight
        assert list(layer._modules) == order
        layer.to(torch.bfloat16)
    assert list(layer.state_dict()) == names
    assert list(layer._modules) == order
    assert layer.processor.weight.dtype == torch.bfloat16


# Modules without processors


def block() -> tuple[nn.Module, Tensor]:
    """An attention block of the VAE of Wan, and its input."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock

    torch.manual_seed(0)
    made = WanAttentionBlock(8)
    nn.init.normal_(made.proj.weight)
    return made.eval(), torch.randn(1, 8, 1, 3, 3)


def test_scopes_are_the_blocks_that_call_the_function() -> None:
    vae = present("wan_v2v").make().vae
    assert {type(each).__name__ for each in find_scopes(vae)} == {"WanAttentionBlock"}
    assert not list(find_sites(vae))
    assert find_scopes(nn.Linear(2, 2)) == []


def test_scopes_are_found_in_classes_that_inherit_the_call() -> None:
    kind = type(block()[0])
    made = type("Own", (kind,), {})(8)
    assert find_scopes(made) == [made]


def test_scope_redirects_the_calls_inside_and_nothing_else() -> None:
    module, hidden = block()
    sides = torch.randn(3, 1, 2, 5, 8).unbind(0)
    with torch.no_grad():
        unpatched, attended = module(hidden), F.scaled_dot_product_attention(*sides)
        with Scope(zeros()):
            assert not torch.allclose(module(hidden), unpatched)
            assert not bool(F.scaled_dot_product_attention(*sides).any())
            assert torch.equal(F.relu(sides[0]), sides[0].clamp(min=0)), "other functions are as they were"
        assert torch.equal(module(hidden), unpatched)
        assert torch.equal(F.scaled_dot_product_attention(*sides), attended)


def test_scope_is_of_one_thread() -> None:
    sides = torch.randn(3, 1, 2, 5, 8).unbind(0)
    found: list[Tensor] = []
    with Scope(zeros()):
        thread = threading.Thread(target=lambda: found.append(F.scaled_dot_product_attention(*sides)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], F.scaled_dot_product_attention(*sides))


def test_module_that_raises_leaves_no_scope_behind() -> None:
    module, hidden = block()
    sides = torch.randn(3, 1, 2, 5, 8).unbind(0)
    expected = F.scaled_dot_product_attention(*sides)
    with set_attention_backend(module, "math") as patch:
        with pytest.raises(RuntimeError):
            module(hidden[:, :3])
        assert torch.equal(F.scaled_dot_product_attention(*sides), expected)
        assert not patch.calls["transformer"]
        module(hidden)
        assert patch.calls == {"transformer": {"math": 1}}


@pytest.mark.skipif(not hasattr(diffusers, "AutoencoderKLHunyuanImage"), reason="this diffusers has no such VAE")
@pytest.mark.parametrize("name", ["sdpa", "math", "efficient", "flex", "auto"])
def test_vae_that_passes_three_dimensions(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanimage import HunyuanImageAttentionBlock

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    module, hidden = HunyuanImageAttentionBlock(32).eval(), torch.randn(2, 32, 4, 5)
    with torch.no_grad():
        expected = module(hidden)
        with set_attention_backend(module, name, on_unsupported="native"):
            torch.testing.assert_close(module(hidden), expected, rtol=0, atol=1e-5)
