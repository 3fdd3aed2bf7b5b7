"""Every kernel computes softmax(query @ keyᵀ · scale + mask) @ value, whatever the masks, shapes and strides."""

from __future__ import annotations

import math
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion_accel.attention.backends import kernels
from sgl_diffusion_accel.attention.backends.registry import all_backends, find_backend
from sgl_diffusion_accel.attention.backends.requirements import facts_of

torch.set_num_threads(1)

HERE = ("sdpa", "math", "efficient", "flex")
"""Kernels that run on a CPU."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
B, H, Q, K, D = 2, 4, 7, 11, 16
MORE: dict[str, Any] = {"mask": None, "is_causal": False, "scale": None, "enable_gqa": False}


def oracle(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Any, is_causal: bool, scale: Any, enable_gqa: bool
) -> Tensor:
    """The definition, in float64; a query that may attend to nothing gets zeros."""
    query, key, value = query.double(), key.double(), value.double()
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ value


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sides(dtype: torch.dtype = torch.float32, queries: int = Q, keys: int = K, heads: int = H, size: int = D) -> Any:
    """Query, key and value; `heads` is that of key and value."""
    return (
        random(B, H, queries, size, dtype=dtype, seed=1),
        random(B, heads, keys, size, dtype=dtype, seed=2),
        random(B, heads, keys, size, dtype=dtype, seed=3),
    )


def check(kernel: kernels.Kernel, parts: Any, **given: Any) -> Tensor:
    """Asserts that a kernel is within rounding of the oracle at each element, and writes to none of its inputs."""
    more = MORE | given
    inputs = [part for part in (*parts, more["mask"]) if part is not None]
    before = [(part.clone(), part._version) for part in inputs]
    output = kernel(*parts, **more)
    for part, (copied, version) in zip(inputs, before, strict=True):
        assert part._version == version, "an input was written to"
        assert torch.equal(part, copied)
    expected = oracle(*parts, **more)
    assert output.shape == expected.shape
    assert output.dtype == parts[0].dtype
    # Each output is an average of values: it can be off by a few roundings of the largest of them.
    allowed = 3 * torch.finfo(output.dtype).eps * float(parts[2].abs().max())
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=allowed)
    return output


def load(name: str) -> kernels.Kernel:
    return find_backend(name).load()


# What runs on a CPU


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HERE)
def test_kernel_is_within_rounding_of_the_definition(name: str, dtype: torch.dtype) -> None:
    kernel = load(name)
    check(kernel, sides(dtype))
    check(kernel, sides(dtype), scale=0.7)
    check(kernel, sides(dtype, queries=1, keys=1))


MASKS = {
    "one entry a key": (B, 1, 1, K),
    "whole": (B, H, Q, K),
    "shared by batch and heads": (1, 1, Q, K),
    "two dimensions": (Q, K),
    "by head": (1, H, Q, K),
    "three dimensions": (H, Q, K),
}


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", HERE)
def test_mask_of_every_shape(name: str, shape: tuple[int, ...], kind: str) -> None:
    numbers = random(*shape, seed=4)
    mask = numbers > -0.5 if kind == "bool" else numbers
    assert not torch.allclose(oracle(*sides(), **MORE), oracle(*sides(), **MORE | {"mask": mask}), atol=1e-2)
    check(load(name), sides(), mask=mask)


@pytest.mark.parametrize("name", HERE)
def test_mask_beside_half_precision(name: str) -> None:
    numbers = random(B, 1, 1, K, seed=4)
    for mask in (numbers > -0.5, numbers, numbers.bfloat16()):
        check(load(name), sides(torch.bfloat16), mask=mask)


@pytest.mark.parametrize("name", HERE)
def test_query_that_may_attend_to_nothing_gets_what_sdpa_gives(name: str) -> None:
    row = torch.ones(B, 1, Q, K, dtype=torch.bool)
    row[:, :, 3] = False
    sample = torch.zeros_like(row)
    sample[0] = True
    for mask in (row, sample, torch.zeros(row.shape).masked_fill(~row, -math.inf)):
        output = check(load(name), sides(), mask=mask)
        expected = F.scaled_dot_product_attention(*sides(), mask)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert not bool(output[:, :, 3].any())


@pytest.mark.parametrize("name", HERE)
def test_causal_counts_from_the_first_of_queries_and_keys(name: str) -> None:
    kernel = load(name)
    for queries, keys in ((9, 9), (7, 11), (11, 5)):
        check(kernel, sides(queries=queries, keys=keys), is_causal=True)


def test_flex_takes_a_mask_in_a_causal_call() -> None:
    for mask in (random(B, 1, 1, Q, seed=4) > -0.5, random(Q, Q, seed=4)):
        check(load("flex"), sides(keys=Q), mask=mask, is_causal=True)


@pytest.mark.parametrize("name", HERE)
def test_heads_of_the_key_are_shared(name: str) -> None:
    kernel = load(name)
    for heads in (1, 2):
        check(kernel, sides(heads=heads), enable_gqa=True)
    check(kernel, sides(heads=2), enable_gqa=True, mask=random(B, 1, 1, K, seed=4) > -0.5)
    check(kernel, sides(heads=2, keys=Q), enable_gqa=True, is_causal=True, scale=0.3)


@pytest.mark.parametrize("name", HERE)
def test_head_size_may_be_odd(name: str) -> None:
    for size in (3, 24, 80, 257):
        check(load(name), sides(size=size))


@pytest.mark.parametrize("name", HERE)
def test_strides_as_models_make_them(name: str) -> None:
    kernel = load(name)
    transposed = tuple(part.transpose(1, 2).contiguous().transpose(1, 2) for part in sides())
    fused = random(B, Q, 3 * H * D).unflatten(-1, (3 * H, D)).transpose(1, 2).chunk(3, dim=1)
    one, two, three = sides()
    expanded = (one, two[:1].expand(B, -1, -1, -1), three[:, :1].expand(-1, H, -1, -1))
    for parts in (transposed, fused, expanded):
        assert not all(part.is_contiguous() for part in parts)
        check(kernel, parts)
        check(kernel, parts, mask=random(B, 1, 1, parts[1].shape[2], seed=4) > -0.5)


@pytest.mark.parametrize("name", HERE)
def test_last_dimension_may_have_any_stride(name: str) -> None:
    parts = tuple(part.mT.contiguous().mT for part in sides())
    assert parts[0].stride(-1) != 1
    check(load(name), parts)


@pytest.mark.parametrize("name", HERE)
def test_mask_may_have_any_strides(name: str) -> None:
    mask = random(B, K, Q, H, seed=4).permute(0, 3, 2, 1)
    assert not mask.is_contiguous()
    check(load(name), sides(), mask=mask)
    check(load(name), sides(), mask=mask > -0.5)


@pytest.mark.parametrize("name", HERE)
def test_value_with_another_head_size_is_computed_or_refused(name: str) -> None:
    query, key, _ = sides()
    value = random(B, H, K, 24, seed=3)
    if find_backend(name).requirements.refuses(facts_of(query, key, None, 0.0, False, False)) is None:
        check(load(name), (query, key, value))


# What needs a GPU: the adapter alone, around a function that does what the package documents


def put_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Lets `import name` find a module with these members, and a package for each part of its name."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        made = ModuleType(path)
        made.__spec__, made.__path__ = ModuleSpec(path, None), []
        monkeypatch.setitem(__import__("sys").modules, path, made)
    vars(made).update(members)


def flash_like(seen: list[Any], with_sums: bool = False) -> Any:
    """FlashAttention as it is documented: `[B, S, H, D]`, grouped heads, causal counted from the last of both."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False
    ) -> Any:
        seen.append({"shapes": (q.shape, k.shape, v.shape), "dropout_p": dropout_p, "causal": causal})
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1]) if causal else None
        parts = (part.transpose(1, 2) for part in (q, k, v))
        output = F.scaled_dot_product_attention(*parts, mask, scale=softmax_scale, enable_gqa=True).transpose(1, 2)
        return (output, None) if with_sums else output

    return flash_attn_func


FLASH = {
    "flash": "flash_attn",
    "flash3": "flash_attn_interface",
    "flash4": "flash_attn.cute",
    "aiter": "aiter",
}


@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize(("name", "module"), FLASH.items())
def test_flash_packages_get_tokens_before_heads(
    name: str, module: str, with_sums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    put_module(monkeypatch, module, flash_attn_func=flash_like(seen, with_sums))
    kernel = load(name)
    check(kernel, sides())
    check(kernel, sides(), scale=0.3)
    check(kernel, sides(heads=2), enable_gqa=True)
    check(kernel, sides(keys=Q), is_causal=True)
    check(kernel, tuple(part.transpose(1, 2).contiguous().transpose(1, 2) for part in sides()))
    assert seen[0]["shapes"] == ((B, Q, H, D), (B, K, H, D), (B, K, H, D))
    assert seen[2]["shapes"][1] == (B, K, 2, D), "grouped heads go as they are"
    assert [call["causal"] for call in seen] == [False, False, False, True, False]
    assert {call["dropout_p"] for call in seen} == {0.0}


@pytest.mark.parametrize(("name", "module"), FLASH.items())
def test_flash_package_with_other_parameters_is_refused(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        raise AssertionError

    put_module(monkeypatch, module, flash_attn_func=flash_attn_func)
    with pytest.raises(ImportError, match=r"flash_attn_func has other parameters: q, k, v, scaling"):
        load(name)


def sage_like(seen: list[Any], version: int) -> Any:
    """SageAttention: 1.0.6 can be asked not to write its centred key over the given one; 2 has a key of its own."""

    def attend(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool, sm_scale: Any) -> Tensor:
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Last dim of qkv must be contiguous."
        seen.append({"tensor_layout": tensor_layout, "mean": float(k.mean(dim=2).abs().max())})
        parts = (q, k, v) if tensor_layout == "HND" else [part.transpose(1, 2) for part in (q, k, v)]
        return F.scaled_dot_product_attention(*parts, is_causal=is_causal, scale=sm_scale, enable_gqa=True)

    def first(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: Any = None,
        smooth_k: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        assert not kwargs
        if smooth_k:
            k -= k.mean(dim=2, keepdim=True)
        return attend(q, k, v, tensor_layout, is_causal, sm_scale)

    def second(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: Any = None,
        return_lse: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        assert not kwargs, "they are passed over in silence there"
        assert not return_lse
        return attend(q, k, v, tensor_layout, is_causal, sm_scale)

    return first if version == 1 else second


@pytest.mark.parametrize("version", [1, 2])
def test_sage_gets_heads_before_tokens_and_writes_over_nothing(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    put_module(monkeypatch, "sageattention", sageattn=sage_like(seen, version))
    kernel = load("sage")
    for parts, given in (
        (sides(), {}),
        (sides(), {"scale": 0.3}),
        (sides(heads=2), {"enable_gqa": True}),
        (sides(keys=Q), {"is_causal": True}),
        (tuple(part.transpose(1, 2).contiguous().transpose(1, 2) for part in sides()), {}),
        (tuple(part.mT.contiguous().mT for part in sides()), {}),
    ):
        check(kernel, parts, **given)
    assert {call["tensor_layout"] for call in seen} == {"HND"}
    if version == 1:
        assert max(call["mean"] for call in seen) < 1e-6, "8 bits are too few for a key that is not centred"


def sage3_like(seen: list[Any], centres_in_place: bool) -> Any:
    """SageAttention 3: no scale of its own; the released code centres the key in place."""

    def sageattn3_blackwell(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, per_block_mean: bool = True
    ) -> Tensor:
        seen.append({"shape": q.shape, "mask": attn_mask})
        if centres_in_place:
            k -= k.mean(dim=-2, keepdim=True)
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return sageattn3_blackwell


@pytest.mark.parametrize("centres_in_place", [False, True])
def test_sage3_gets_the_scale_in_the_query(centres_in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    put_module(monkeypatch, "sageattn3", sageattn3_blackwell=sage3_like(seen, centres_in_place))
    kernel = load("sage3")
    check(kernel, sides())
    check(kernel, sides(), scale=0.3)
    check(kernel, sides(keys=Q), is_causal=True)
    assert {call["shape"] for call in seen} == {(B, H, Q, D)}
    assert {call["mask"] for call in seen} == {None}


class LowerTriangularMask:
    """Causal, counted from the first query and key."""


def xformers_like(seen: list[Any]) -> Any:
    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None
    ) -> Tensor:
        assert query.shape[2] == key.shape[2] == value.shape[2], "grouped heads have a fifth dimension here"
        seen.append({"shape": query.shape, "bias": attn_bias, "p": p})
        parts = [part.transpose(1, 2) for part in (query, key, value)]
        causal = isinstance(attn_bias, LowerTriangularMask)
        if isinstance(attn_bias, Tensor):
            assert attn_bias.shape == (*parts[0].shape[:3], key.shape[1])
            assert attn_bias.dtype == query.dtype
            assert attn_bias.stride(-1) == 1
            assert attn_bias.stride(-2) % 8 == 0, "rows start at multiples of eight"
        mask = None if causal else attn_bias
        return F.scaled_dot_product_attention(*parts, mask, is_causal=causal, scale=scale).transpose(1, 2)

    return memory_efficient_attention


def test_xformers_gets_tokens_before_heads_and_an_aligned_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    put_module(
        monkeypatch,
        "xformers.ops",
        LowerTriangularMask=LowerTriangularMask,
        memory_efficient_attention=xformers_like(seen),
    )
    kernel = load("xformers")
    check(kernel, sides())
    check(kernel, sides(heads=2), enable_gqa=True, scale=0.3)
    check(kernel, sides(), is_causal=True)
    assert [call["shape"] for call in seen] == [(B, Q, H, D)] * 3
    assert {call["p"] for call in seen} == {0.0}
    for length in (K, 16):
        for shape in ((B, 1, 1, length), (B, H, Q, length), (Q, length)):
            numbers = random(*shape, seed=4)
            for mask in (numbers, numbers > -0.5):
                check(kernel, sides(keys=length), mask=mask)
    check(kernel, sides(torch.bfloat16), mask=random(B, 1, 1, K, seed=4))


# What runs on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, backend in all_backends().items() if backend.requirements.devices])
def test_kernel_on_a_gpu(name: str) -> None:
    """Against the same computed in float32, with what the table says that the backend can take."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda is not available")
    backend = find_backend(name)
    # An xformers that was made for another PyTorch has no operators, and is skipped here with that reason; a kernel of
    # a hub is tried where somebody has fetched it.
    missing = backend.lacks() or backend.would_fetch()
    if missing:
        pytest.skip(f"{name}: {missing}")
    dtype, size = torch.bfloat16, 64
    kernel, taken = backend.load(), 0
    mask = (random(2, 1, 1, 300, seed=4) > -0.5).cuda()
    for queries, heads, given in (
        (300, 4, {}),
        (77, 4, {"scale": 0.05}),
        (300, 4, {"is_causal": True}),
        (77, 2, {"enable_gqa": True}),
        (77, 4, {"mask": mask}),
        (77, 4, {"mask": torch.zeros(2, 1, 77, 300, device="cuda", dtype=dtype).masked_fill(~mask, -math.inf)}),
    ):
        more = MORE | given
        parts = [
            random(2, h, n, size, dtype=dtype, seed=n + h).cuda() for h, n in ((4, queries), (heads, 300), (heads, 300))
        ]
        facts = facts_of(parts[0], parts[1], more["mask"], 0.0, more["is_causal"], more["enable_gqa"])
        if backend.requirements.refuses(facts):
            continue
        taken += 1
        copies = [part.clone() for part in parts]
        wide = None if more["mask"] is None or more["mask"].dtype == torch.bool else more["mask"].float()
        expected = F.scaled_dot_product_attention(
            *(part.float() for part in parts),
            more["mask"] if wide is None else wide,
            is_causal=more["is_causal"],
            scale=more["scale"],
            enable_gqa=more["enable_gqa"],
        )
        output = kernel(*parts, **more)
        assert all(torch.equal(*pair) for pair in zip(parts, copies, strict=True)), "an input was written to"
        error = float((output.float() - expected).norm() / expected.norm())
        assert error < (0.01 if backend.is_exact else 0.1), (given, error)
    if not taken:
        pytest.skip(f"{name} does not run on {torch.cuda.get_device_name()}")
