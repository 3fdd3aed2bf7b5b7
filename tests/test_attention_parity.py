"""Every exact backend gives the output of the unpatched pipeline, within the rounding of its type."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from invariants import families
from invariants.families import present
from sgl_diffusion_accel import UnsupportedModelError
from sgl_diffusion_accel.attention.backends import registry as backends
from sgl_diffusion_accel.attention.backends.registry import register_attention_backend
from sgl_diffusion_accel.attention.select import set_attention_backend
from zoo import FAMILIES, Family

torch.set_num_threads(1)


def own(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Any, is_causal: bool, scale: Any, enable_gqa: bool
) -> Tensor:
    """A registered kernel that shares nothing with PyTorch's: one head at a time, in plain steps."""
    assert not is_causal
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa or groups == 1
    output = torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for head in range(query.shape[1]):
        scores = torch.einsum("bqd,bkd->bqk", query[:, head], key[:, head // groups])
        scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if mask is not None:
            part = mask.expand(*query.shape[:3], key.shape[2])[:, head]
            scores = scores.masked_fill(~part, -math.inf) if part.dtype == torch.bool else scores + part
        weights = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=-1e30))
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        output[:, head] = torch.einsum("bqk,bkd->bqd", weights, value[:, head // groups])
    return output


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", {})
    register_attention_backend("own", own, causal=False)


def layers(family: Family) -> str | None:
    """The layers that can have a backend: all but those of linear attention."""
    return "*.attn2" if family.name == "sana" else None


def distance(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected.double()).norm() / expected.double().norm())


def calls(patch: Any) -> int:
    return sum(count for by_name in patch.calls.values() for count in by_name.values())


@families()
def test_output_is_that_of_the_unpatched_pipeline(family: Family) -> None:
    """Bit by bit for PyTorch's own; the others add up in another order."""
    check_output(family, "sdpa", "own")


@families("wan", "flux", "sd3", "cogvideox", matrix=FAMILIES)
def test_output_under_every_backend(family: Family) -> None:
    check_output(family, "sdpa", "math", "efficient", "flex")


def check_output(family: Family, *names: str) -> None:
    pipe = family.make()
    expected = family.run(pipe, steps=2)
    counts = set()
    for name in names:
        with set_attention_backend(pipe, name, layers=layers(family), verify=True) as patch:
            output = family.run(pipe, steps=2)
        assert distance(output, expected) <= (0.0 if name == "sdpa" else 1e-5), name
        assert not patch.fallbacks
        assert set(patch.backends) == set(family.transformers)
        assert {by for counted in patch.calls.values() for by in counted} == {name}
        counts.add(calls(patch))
    assert len(counts) == 1
    assert torch.equal(family.run(pipe, steps=2), expected)


@families("wan", "flux", "hunyuan", "cogvideox", matrix=["sd3", "lumina2", "chroma"])
def test_batches_other_sizes_and_guidance(family: Family) -> None:
    """Masks for each sample, odd numbers of tokens, other branches."""
    pipe = family.make()
    runs: list[dict[str, Any]] = [{"batch": 3}, {"size": family.other_size}]
    runs += [{"guidance": family.other_guidance[0]}] if family.other_guidance else []
    for given in runs:
        expected = family.run(pipe, steps=1, **given)
        for name in ("math", "efficient", "own"):
            with set_attention_backend(pipe, name, verify=True):
                assert distance(family.run(pipe, steps=1, **given), expected) <= 1e-5, (name, given)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("wan", torch.bfloat16), ("wan", torch.float16), ("flux", torch.bfloat16), ("cogvideox", torch.bfloat16)],
)
def test_half_precision_is_as_near_to_float64_as_unpatched(name: str, dtype: torch.dtype) -> None:
    family = present(name)

    def output(as_type: torch.dtype, name: str | None = None) -> Tensor:
        pipe = family.make().to(dtype).to(as_type)
        given = family.call(pipe, steps=1)
        floats = {
            k: v.to(dtype).to(as_type) for k, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()
        }
        if name is not None:
            set_attention_backend(pipe, name, verify=True)
        return family.run(pipe, steps=1, **floats)

    oracle = output(torch.float64)
    unpatched = distance(output(dtype), oracle)
    assert unpatched > 1e-4
    for backend in ("math", "efficient", "flex"):
        assert distance(output(dtype, backend), oracle) < 1.5 * unpatched, backend


def test_linear_attention_is_refused_with_the_reason_and_the_layers_that_remain() -> None:
    family = present("sana")
    pipe = family.make()
    with pytest.raises(UnsupportedModelError) as caught:
        set_attention_backend(pipe, "math")
    message = str(caught.value)
    assert "6 of 12 attention layers of transformer (SanaTransformer2DModel)" in message
    assert "SanaLinearAttnProcessor2_0 is linear attention, which has no softmax" in message
    assert "layers=[...], of transformer_blocks.0.attn2, " in message
    with pytest.raises(UnsupportedModelError, match=r"3 of 3 .* No attention backend applies to it\."):
        set_attention_backend(family.make(num_layers=3), "math", layers="*.attn1")
    with set_attention_backend(pipe, "math", layers="*.attn2") as patch:
        family.run(pipe, steps=1)
    assert patch.calls == {"transformer": {"math": 6}}


@pytest.mark.gpu
@families("wan", "flux", "sd3", "cogvideox", "hunyuan")
def test_output_on_a_gpu(family: Family) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda is not available")
    pipe = family.make().to("cuda", torch.bfloat16)

    def on_gpu(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to("cuda", torch.bfloat16 if floats else None) if isinstance(value, Tensor) else value

    given = {key: on_gpu(value) for key, value in family.call(pipe, steps=2).items()}
    expected = family.run(pipe, steps=2, **given)
    for name in ("sdpa", "math", "efficient", "cudnn", "sdpa_flash", "flex"):
        with set_attention_backend(pipe, name, on_unsupported="native", verify=True):
            assert distance(family.run(pipe, steps=2, **given), expected) < 0.05, name
