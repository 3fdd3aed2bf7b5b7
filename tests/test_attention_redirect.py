"""One attention call: to the backend where it can take it, else to PyTorch's own, counted, or refused with a reason."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from sgl_diffusion_accel import UnsupportedModelError
from sgl_diffusion_accel.attention.backends import registry as backends
from sgl_diffusion_accel.attention.backends.backend_table import Backend
from sgl_diffusion_accel.attention.backends.registry import find_backend, register_attention_backend
from sgl_diffusion_accel.attention.measured_choice import MeasuredChoice
from sgl_diffusion_accel.attention.redirect import Redirect
from sgl_diffusion_accel.attention.verify import check_output

torch.set_num_threads(1)

HERE = ("sdpa", "math", "efficient", "flex")
B, S, H, D = 2, 11, 4, 16


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", {})


def tokens(queries: int = S, heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as diffusers' dispatcher takes them, `[B, S, H, D]`."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, n, h, D, generator=generator) for n, h in ((queries, H), (S, heads), (S, heads)))  # type: ignore[return-value]


def swapped(*parts: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.transpose(1, 2) for part in parts)


def padding(kind: str) -> Tensor:
    """A mask with one entry a key, `[B, K]`."""
    numbers = torch.randn(B, S, generator=torch.Generator().manual_seed(1))
    return numbers > -0.5 if kind == "bool" else numbers


def redirect(name: str, on_unsupported: Any = "error", **more: Any) -> Redirect:
    return Redirect("transformer", find_backend(name), on_unsupported, **more)


def tricky(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Any, is_causal: bool, scale: Any, enable_gqa: bool
) -> Any:
    """Right, but for what it does not look at."""
    return F.scaled_dot_product_attention(query, key, value)


# Calls of the dispatcher


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("queries", [S, 7])
@pytest.mark.parametrize("name", HERE)
def test_mask_of_one_entry_a_key_means_what_sdpa_means(name: str, queries: int, kind: str) -> None:
    sides, mask = tokens(queries), padding(kind)
    (expected,) = swapped(F.scaled_dot_product_attention(*swapped(*sides), mask[:, None, None, :]))
    output = redirect(name).dispatch(*sides, mask)
    assert output.shape == (B, queries, H, D)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_flex_of_diffusers_is_wrong_there(kind: str) -> None:
    """The reason why its kernel is not used; a release that has mended it makes this test say so."""
    sides, mask = tokens(), padding(kind)
    (expected,) = swapped(F.scaled_dot_product_attention(*swapped(*sides), mask[:, None, None, :]))
    theirs = dispatch_attention_fn(*sides, mask, backend="flex")  # type: ignore[arg-type]
    if torch.allclose(theirs, expected, atol=1e-5):
        pytest.skip(f"diffusers {diffusers.__version__} computes it rightly")
    assert float((theirs - expected).abs().max()) > 0.1
    torch.testing.assert_close(redirect("flex").dispatch(*sides, mask), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", HERE)
def test_arguments_of_the_dispatcher_are_not_dropped(name: str) -> None:
    """diffusers' own flex drops `is_causal`, and all but its native ones drop `enable_gqa`."""
    sides = tokens()
    for given in (
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": padding("bool")[:1, None, None].expand(B, H, S, S)},
    ):
        (expected,) = swapped(F.scaled_dot_product_attention(*swapped(*sides), **given))
        assert not torch.allclose(expected, swapped(tricky(*swapped(*sides), **_NOTHING))[0], atol=1e-2)
        torch.testing.assert_close(redirect(name).dispatch(*sides, **given), expected, rtol=0, atol=1e-6)
    sides = tokens(heads=2)
    (expected,) = swapped(F.scaled_dot_product_attention(*swapped(*sides), enable_gqa=True))
    torch.testing.assert_close(redirect(name).dispatch(*sides, enable_gqa=True), expected, rtol=0, atol=1e-6)


_NOTHING = {"mask": None, "is_causal": False, "scale": None, "enable_gqa": False}


def test_positional_arguments_mean_the_same() -> None:
    """As `dispatch_attention_fn` and PyTorch's function take them."""
    sides, mask = tokens(heads=2), padding("bool")[:, None, None]
    expected = F.scaled_dot_product_attention(*swapped(*sides), mask, 0.0, False, scale=0.3, enable_gqa=True)
    assert torch.equal(redirect("sdpa").sdpa(*swapped(*sides), mask, 0.0, False, 0.3, True), expected)
    assert torch.equal(redirect("sdpa").dispatch(*sides, mask, 0.0, False, 0.3, True), *swapped(expected))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"attention_kwargs": {"window": 3}}, "the model passes window to its own backend"),
        ({"parallel_config": object()}, "the tokens are divided over several devices (context parallelism)"),
    ],
)
def test_call_that_is_meant_for_diffusers_own_backends(
    given: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        redirect("math").dispatch(*tokens(), **given)
    assert reason in str(caught.value)
    seen = []
    monkeypatch.setattr(
        diffusers.models.attention_dispatch,
        "dispatch_attention_fn",
        lambda *args, **kwargs: seen.append((args, kwargs)),
    )
    passing = redirect("math", "native")
    passing.dispatch(*tokens(), None, 0.0, False, 0.3, **given, backend="native")
    assert passing.fallbacks == {("transformer", reason): 1}
    ((args, kwargs),) = seen
    assert args[3:8] == (None, 0.0, False, 0.3, False)
    assert kwargs["backend"] == "native"
    assert (args[8], kwargs.get("parallel_config")) == (given.get("attention_kwargs"), given.get("parallel_config"))


# Calls that a backend cannot take


def test_refused_call_names_layer_reason_alternatives_and_ways_out() -> None:
    register_attention_backend("mine", tricky, masks=False)
    with pytest.raises(UnsupportedModelError) as caught:
        redirect("mine").sdpa(*swapped(*tokens()), padding("bool")[:, None, None])
    message = str(caught.value)
    assert message.startswith("the attention backend 'mine' cannot take a call of transformer: it takes no mask.")
    assert "Usable there: sdpa, math, efficient, flex." in message
    assert "on_unsupported='native'" in message
    assert "layers=" in message


CALLS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"masks": False}, {"attn_mask": padding("float")[:, None, None]}, "it takes no mask"),
    ({"causal": False}, {"is_causal": True}, "it cannot be causal"),
    ({}, {"is_causal": True, "attn_mask": padding("bool")[:, None, None]}, "it takes no mask in a causal call"),
    ({}, {"attn_mask": "a block mask"}, "the mask is not a tensor"),
]


@pytest.mark.parametrize(("requirements", "given", "reason"), CALLS, ids=[reason for *_, reason in CALLS])
def test_call_that_cannot_be_taken_goes_to_pytorch_and_is_counted(
    requirements: dict[str, Any], given: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_attention_backend("mine", tricky, **requirements)
    with pytest.raises(UnsupportedModelError, match=reason):
        redirect("mine").sdpa(*swapped(*tokens()), **given)
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: seen.append((args, kwargs)))
    passing = redirect("mine", "native")
    for _ in range(2):
        passing.sdpa(*swapped(*tokens()), **given)
    assert passing.fallbacks == {("transformer", reason): 2}
    assert not passing.calls
    args, _ = seen[0]
    assert args[3] is given.get("attn_mask")
    assert args[5] == given.get("is_causal", False)


def test_causal_call_that_is_not_square_and_shared_heads_are_refused() -> None:
    register_attention_backend("mine", tricky, causal_square=True, gqa=False)
    one = redirect("mine")
    one.sdpa(*swapped(*tokens()), is_causal=True)
    with pytest.raises(UnsupportedModelError, match="for as many queries as keys alone"):
        one.sdpa(*swapped(*tokens(7)), is_causal=True)
    with pytest.raises(UnsupportedModelError, match="as many heads of the key as of the query"):
        one.sdpa(*swapped(*tokens(heads=2)), enable_gqa=True)
    one.sdpa(*swapped(*tokens()), enable_gqa=True)
    assert one.calls == {"mine": 2}


def test_what_is_turned_off_computes_as_before() -> None:
    register_attention_backend("mine", lambda query, key, value, **more: query * 0)
    one = redirect("mine")
    one.is_on = False
    sides = swapped(*tokens())
    torch.testing.assert_close(one.sdpa(*sides), F.scaled_dot_product_attention(*sides), rtol=0, atol=1e-6)
    assert not one.calls
    assert not one.fallbacks
    one.is_on = True
    assert not bool(one.sdpa(*sides).any())


def test_dropout_is_refused_or_counted() -> None:
    sides = swapped(*tokens())
    with pytest.raises(UnsupportedModelError, match="it has no dropout"):
        redirect("math").sdpa(*sides, dropout_p=0.5)
    passing = redirect("math", "native")
    passing.sdpa(*sides, dropout_p=0.5)
    assert passing.fallbacks == {("transformer", "it has no dropout"): 1}


def test_auto_leaves_what_no_backend_takes_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the block masks that Kandinsky 5 passes through the dispatcher."""
    one = Redirect("transformer", None, "native", choice=MeasuredChoice(False, None))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: args[3])
    assert one.sdpa(*swapped(*tokens()), attn_mask="a block mask") == "a block mask"


@pytest.mark.parametrize("name", HERE)
def test_tensors_of_three_dimensions(name: str) -> None:
    """The VAE of HunyuanImage calls PyTorch's function with `[B, S, D]`."""
    sides = [part[:, :, 0] for part in tokens()]
    expected = F.scaled_dot_product_attention(*sides)
    torch.testing.assert_close(redirect(name, "native").sdpa(*sides), expected, rtol=0, atol=1e-6)


def test_tensors_of_three_dimensions_are_verified() -> None:
    sides = [part[:, :, 0] for part in tokens()]
    one = redirect("sdpa", verify=check_output)
    torch.testing.assert_close(one.sdpa(*sides), F.scaled_dot_product_attention(*sides), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "sdpa",
        "math",
        "efficient",
        "flex",
    ],
)
def test_sides_that_are_shared_by_the_batch(name: str) -> None:
    """PyTorch's function broadcasts over batch and heads; what a kernel cannot broadcast it must not be given."""
    query, key, value = swapped(*tokens())
    for sides in ((query, key[:1], value[:1]), (query[:1], key, value), (query, key[:, :1], value[:, :1])):
        expected = F.scaled_dot_product_attention(*sides)
        torch.testing.assert_close(redirect(name, "native").sdpa(*sides), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", HERE)
def test_autocast_brings_the_sides_to_one_type(name: str) -> None:
    """Under it layer norms return float32 and linear layers bfloat16; PyTorch's function casts them all to bfloat16."""
    query, key, value = swapped(*tokens())
    value = value.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(query, key, value)
        output = redirect(name, verify=check_output).sdpa(query, key, value)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0, atol=0.03)


def test_autocast_leaves_float64_as_it_is() -> None:
    sides = tuple(part.double() for part in swapped(*tokens()))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*sides).dtype == torch.float64
        assert redirect("math").sdpa(*sides).dtype == torch.float64


# Verifying


def test_each_layer_is_verified_once_for_each_shape_and_mask() -> None:
    checked: list[Any] = []
    one = redirect(
        "sdpa", verify=lambda layer, backend, output, sides, more: checked.append((layer, sides[0].shape[2]))
    )
    whole, half = tokens(), tokens(7)
    masks = [padding("bool")[:, None, None], padding("float")[:, None, None]]
    for _ in range(3):
        one.sdpa(*swapped(*whole))
        one.sdpa(*swapped(*half))
        for mask in masks:
            one.sdpa(*swapped(*whole), mask)
    assert checked == [("transformer", S), ("transformer", 7), ("transformer", S), ("transformer", S)]


def test_mask_in_the_memory_of_one_that_is_gone_is_another() -> None:
    """Pipelines make a mask for each call: that of the empty prompt may lie where that of the prompt has lain."""
    checked: list[Tensor] = []
    one = redirect("sdpa", verify=lambda layer, backend, output, sides, more: checked.append(more["mask"].clone()))
    memory = torch.ones(B, S, dtype=torch.bool)
    for _ in range(2):
        one.sdpa(*swapped(*tokens()), memory[:, None, None])
        memory.copy_(padding("bool"))
    assert len(checked) == 2
    assert not torch.equal(*checked)


def test_no_more_than_eight_calls_of_a_layer_are_verified() -> None:
    checked: list[Any] = []
    one = redirect("sdpa", verify=lambda *call: checked.append(call[0]))
    for length in range(1, 12):
        one.sdpa(*swapped(*tokens(length)))
    assert checked == ["transformer"] * 8


def test_kernel_is_loaded_once() -> None:
    loaded = []

    def load() -> Any:
        loaded.append(1)
        return find_backend("sdpa").load()

    one = Redirect("transformer", Backend("counted", load), "error")
    for _ in range(3):
        one.sdpa(*swapped(*tokens()))
    assert loaded == [1]
