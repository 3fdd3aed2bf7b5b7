"""A backend that serves nothing says so; processors that hand attention to helpers of theirs are served."""

from __future__ import annotations

import copy
import logging
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import MochiAttentionPool
from torch import Tensor, nn

from invariants import Snapshot, assert_same
from invariants.families import present
from sgl_diffusion_accel import apply_adaptive_cache, apply_cache_dit
from sgl_diffusion_accel.attention.backends import registry as backends
from sgl_diffusion_accel.attention.backends.registry import register_attention_backend
from sgl_diffusion_accel.attention.select import set_attention_backend
from sgl_diffusion_accel.attention.sites import find_others, find_sites

torch.set_num_threads(1)
UNSEEN = "ended without any attention call"


def half(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Something else than attention, so that where it ran is seen."""
    return value.mean(-2, keepdim=True).expand(*query.shape[:-1], -1) * 0.5


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", {})
    register_attention_backend("half", half, mask_and_causal=True)


# Helpers of processors


def klein(**config: Any) -> Any:
    """FLUX.2 Klein with a key and value cache, tiny."""
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
        **config,
    ).eval()
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    pipe = diffusers.Flux2KleinKVPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe: Any, steps: int = 4) -> Tensor:
    from PIL import Image

    call = {"prompt_embeds": torch.linspace(-1, 1, 112).reshape(1, 7, 16), "height": 8, "width": 8}
    image = Image.new("RGB", (64, 64))
    generator = torch.Generator().manual_seed(0)
    output: Tensor = pipe(
        **call, image=image, num_inference_steps=steps, output_type="latent", generator=generator
    ).images
    return output


needs_klein = pytest.mark.skipif(
    not hasattr(diffusers, "Flux2KleinKVPipeline"), reason="this diffusers has no Flux2KleinKVPipeline"
)


@needs_klein
def test_klein_with_a_reference_image_is_served() -> None:
    """Its processors hand their work to a function of their module: twice in a layer at the first step, then once."""
    pipe = klein()
    expected, before = edit(pipe), Snapshot(pipe)
    for name, is_near in (("math", True), ("half", False)):
        patch = set_attention_backend(pipe, name, verify=is_near)
        output = edit(pipe)
        assert torch.allclose(output, expected, rtol=0, atol=1e-5) == is_near
        assert patch.calls == {"transformer": {name: 4 * 2 + 3 * 4}}
        assert not patch.fallbacks
        assert not patch.unseen
        patch.remove()
        assert_same(before, pipe)
    assert torch.equal(edit(pipe), expected)


@needs_klein
def test_klein_with_compiled_blocks_has_no_break() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    set_attention_backend(eager := klein(), "half")
    expected = edit(eager)
    patch = set_attention_backend(pipe := klein(), "half")
    pipe.transformer.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(edit(pipe), expected, rtol=0, atol=1e-5)
    assert not [reason for reason in torch._dynamo.utils.counters["graph_break"] if "attention" in reason.lower()]
    assert not patch.unseen, "calls in compiled code are not counted, and not missed"
    torch._dynamo.reset()


def _outer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _inner(query, key, value, 1)


def _inner(query: Tensor, key: Tensor, value: Tensor, again: int) -> Tensor:
    """Calls itself, and is called by the one that it could call."""
    if again:
        return _inner(query, key, value, again - 1)
    if again < 0:
        return _outer(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


class WithHelper:
    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = (
            each(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for each in (attn.to_q, attn.to_k, attn.to_v)
        )
        return attn.to_out[0](self.attend(query, key, value).transpose(1, 2).flatten(2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _outer(query, key, value)


class WithMethod(WithHelper):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        def inside() -> Tensor:
            return F.scaled_dot_product_attention(query, key, value)

        return inside()


class One(nn.Module):
    """A transformer of one layer."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(query_dim=8, heads=2, dim_head=4, processor=processor)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.attn(hidden_states)
        return output


@pytest.mark.parametrize("processor", [WithHelper(), WithMethod()], ids=["function", "method"])
def test_attention_in_a_helper_of_the_processor_is_redirected(processor: Any) -> None:
    model = One(processor).eval()
    tokens = torch.randn(1, 5, 8)
    with torch.no_grad():
        expected = model(tokens)
        with set_attention_backend(model, "half") as patch:
            assert not torch.equal(model(tokens), expected)
            assert patch.calls == {"transformer": {"half": 1}}
            assert vars(type(copy.deepcopy(model).attn.processor)) == vars(type(processor))
        assert torch.equal(model(tokens), expected)
    assert _outer.__globals__["F"] is F


# A backend that serves nothing


def swap(pipe: Any) -> None:
    for site in list(find_sites(pipe.transformer)):
        site.layer.set_processor(type(site.processor).__mro__[1]())


def test_processors_that_were_replaced_are_told_once_and_in_the_summary(caplog: pytest.LogCaptureFixture) -> None:
    family = present("wan")
    pipe = family.make()
    patch = set_attention_backend(pipe, "half")
    swap(pipe)
    with caplog.at_level(logging.WARNING):
        family.run(pipe, steps=2)
    told = [record.message for record in caplog.records if UNSEEN in record.message]
    assert len(told) == 1
    assert "'half' serves nothing in a call of transformer (WanTransformer3DModel)" in told[0]
    assert "Set the backend again after that" in told[0]
    assert patch.unseen == {"transformer": 4}
    assert f"4 calls of transformer {UNSEEN}" in str(patch)


def test_processors_that_are_replaced_after_a_run_are_told() -> None:
    family = present("wan")
    pipe = family.make()
    patch = set_attention_backend(pipe, "half")
    family.run(pipe, steps=2)
    assert not patch.unseen
    swap(pipe)
    family.run(pipe, steps=2)
    assert patch.unseen == {"transformer": 4}


@pytest.mark.parametrize("order", ["cache first", "attention first"])
@pytest.mark.parametrize("cache", [apply_adaptive_cache, apply_cache_dit])
def test_calls_that_a_cache_answers_are_not_missed(cache: Any, order: str) -> None:
    """Neither those that it answers in the transformer's place nor those whose blocks it skips."""
    family = present("wan")
    pipe = family.make()
    settings: dict[str, Any] = (
        {"tolerance": 1.0}
        if cache is apply_adaptive_cache
        else {"fn_compute_blocks": 0, "steps_mask": [1, 0, 1] + 9 * [0], "steps_policy": "static"}
    )
    if order == "cache first":
        cache(pipe, **settings)
    patch = set_attention_backend(pipe, "math")
    if order == "attention first":
        cache(pipe, **settings)
    family.run(pipe, steps=12)
    assert patch.calls["transformer"]["math"] < 12 * 24, "it has skipped"
    assert not patch.unseen
    swap(pipe)
    family.run(pipe, steps=12)
    assert patch.unseen["transformer"] > 0


def test_calls_with_steps_left_out_are_not_missed() -> None:
    family = present("wan")
    pipe = family.make()
    patch = set_attention_backend(pipe, "half", skip_first_steps=9)
    family.run(pipe, steps=2)
    assert not patch.calls["transformer"]
    assert not patch.unseen


def test_modules_without_a_processor_are_named_in_the_summary() -> None:
    model = One(WithHelper())
    model.pool = MochiAttentionPool(num_attention_heads=2, embed_dim=8)
    assert find_others(model) == ["pool"]
    assert "keep PyTorch's own, having no processor: pool" in str(set_attention_backend(model, "math"))
