"""The front door: what it takes, what it refuses and why, which components and layers it reaches."""

from __future__ import annotations

import logging
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from invariants import Snapshot, assert_same, families
from invariants.families import present
from sgl_diffusion_accel import ConfigError, ConfigTypeError, MissingPackageError, UnsupportedModelError
from sgl_diffusion_accel.attention.backends import registry as backends
from sgl_diffusion_accel.attention.backends.registry import Backend, all_backends, register_attention_backend
from sgl_diffusion_accel.attention.select import attention_backends, set_attention_backend
from zoo import FAMILIES, Family
from zoo.base import build

torch.set_num_threads(1)


def own(query: Tensor, key: Tensor, value: Tensor, *, mask: Any, is_causal: bool, scale: Any, enable_gqa: bool) -> Any:
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", {})


@pytest.fixture(scope="module", autouse=True)
def compiler_has_run() -> None:
    """FlexAttention passes through `torch.compile`, which changes `nn.Module` when it first runs."""
    nothing = {"mask": None, "is_causal": False, "scale": None, "enable_gqa": False}
    all_backends()["flex"].load()(*torch.zeros(3, 1, 1, 2, 4).unbind(0), **nothing)


def wan(**config: Any) -> tuple[Family, Any]:
    family = present("wan")
    return family, family.make(**config)


def total(patch: Any) -> dict[str, int]:
    """Calls that went to a backend, by component."""
    return {component: sum(counted.values()) for component, counted in patch.calls.items()}


# Refusals


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"backend": "mat"}, ConfigError, r"unknown attention backend 'mat'. Did you mean 'math'\?"),
    ({"backend": "sla_attn"}, ConfigError, "'sla_attn' is not offered: it leaves out parts"),
    ({"backend": ""}, ConfigError, "unknown attention backend ''"),
    ({"backend": 5}, ConfigTypeError, "backend is a int; allowed: a name such as 'sdpa', or a dict"),
    ({"backend": None}, ConfigTypeError, "backend is a NoneType"),
    ({"backend": ["math"]}, ConfigTypeError, "backend is a list"),
    ({"backend": {}}, ConfigError, "backend is an empty mapping. Type"),
    ({"backend": {"transformer": 5}}, ConfigTypeError, "named by a string, not by a int"),
    (
        {"backend": {"transformr": "math"}},
        ConfigError,
        r"unknown component 'transformr' .* Did you mean 'transformer'\?",
    ),
    ({"backend": {"transformer": "math"}, "components": "vae"}, ConfigError, "a mapping names its components itself"),
    (
        {"components": "text_encoder"},
        ConfigError,
        "unknown component 'text_encoder' in WanPipeline.* Known: transformer",
    ),
    ({"components": ["transformer", "vae"]}, ConfigError, "unknown component 'vae'"),
    (
        {"layers": "blocks.9.*"},
        ConfigError,
        r"layers='blocks.9.\*' names no attention layer of transformer. There are b",
    ),
    ({"layers": ["blocks.0", "attn1"]}, ConfigError, "layers='attn1' names no attention layer"),
    ({"skip_first_steps": -1}, ConfigError, "skip_first_steps=-1; allowed: a whole number from 0"),
    ({"skip_last_steps": 1.5}, ConfigTypeError, "skip_last_steps=1.5 is a float"),
    ({"skip_first_steps": True}, ConfigTypeError, "skip_first_steps=True is a bool"),
    ({"skip_first_steps": "2"}, ConfigTypeError, "skip_first_steps='2' is a str"),
    ({"on_unsupported": "natve"}, ConfigError, r"unknown value of on_unsupported 'natve'. Did you mean 'native'\?"),
    ({"on_unsupported": None}, ConfigError, "unknown value of on_unsupported 'None'"),
    ({"verify": 1}, ConfigTypeError, "verify=1: allowed are True, False and None"),
    ({"allow_quantised": "yes"}, ConfigTypeError, "allow_quantised='yes'"),
    ({"backend": "sage"}, MissingPackageError, "'sage' cannot be used: the package sageattention is not installed"),
    (
        {"backend": "cudnn"},
        UnsupportedModelError,
        "'cudnn' does not go with transformer .*: it runs on cuda, not on cpu",
    ),
]


@pytest.mark.parametrize(("given", "error", "message"), REFUSALS, ids=[message[:40] for *_, message in REFUSALS])
def test_refused_and_nothing_is_changed(given: dict[str, Any], error: type[Exception], message: str) -> None:
    family, pipe = wan(num_layers=2)
    if error is MissingPackageError and all_backends()[given["backend"]].lacks() is None:
        pytest.skip(f"{given['backend']} is installed")
    family.run(pipe, steps=1)
    before = Snapshot(pipe)
    with pytest.raises(error, match=message):
        set_attention_backend(pipe, **{"backend": "math"} | given)
    assert_same(before, pipe)


@pytest.mark.parametrize(
    "given",
    [
        {"layers": 5},
        {"layers": [5]},
        {"layers": []},
        {"components": 5},
        {"components": ["transformer", 5]},
        {"components": []},
    ],
    ids=str,
)
def test_layers_and_components_are_names_and_at_least_one(given: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, ConfigTypeError), match=next(iter(given))):
        set_attention_backend(wan(num_layers=2)[1], "math", **given)


@pytest.mark.parametrize("thing", [5, None, "pipe", object(), diffusers.WanTransformer3DModel])
def test_what_is_no_pipeline_is_refused(thing: Any) -> None:
    for call in (lambda: set_attention_backend(thing, "math"), lambda: attention_backends(thing)):
        with pytest.raises(
            ConfigTypeError,
            match=r"expected a diffusers pipeline or its transformer.* Hand over pipe, or pipe.transformer",
        ):
            call()


def test_module_without_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"transformer \(Linear\) computes no attention by PyTorch's func"):
        set_attention_backend(nn.Linear(2, 2), "math")


def test_refusal_names_what_is_usable() -> None:
    register_attention_backend("own", own)
    register_attention_backend("other", own, head_sizes=(64,))
    with pytest.raises(UnsupportedModelError, match=r"Usable here: sdpa, math, efficient, flex, own\."):
        set_attention_backend(wan(num_layers=1)[1], "sdpa_flash")
    with pytest.raises(UnsupportedModelError, match=r"heads of size 64, not 16\. Usable here: sdpa, math"):
        set_attention_backend(wan(num_layers=1)[1], "other")


def test_refused_call_leaves_the_patch_in_place() -> None:
    family, pipe = wan(num_layers=2)
    patch = set_attention_backend(pipe, "math")
    family.run(pipe, steps=1)
    before = Snapshot(pipe)
    for given in ({"backend": "cudnn"}, {"backend": "mat"}, {"backend": "sdpa", "layers": "nope"}):
        with pytest.raises(ValueError, match=r"cudnn|mat|nope"):
            set_attention_backend(pipe, **given)
        assert patch.active
        assert_same(before, pipe)


def test_kernel_that_cannot_be_loaded_is_named_and_leaves_the_patch_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setitem(backends._registered, "broken", Backend("broken", load))
    family, pipe = wan(num_layers=2)
    patch = set_attention_backend(pipe, "math")
    family.run(pipe, steps=1)
    before = Snapshot(pipe)
    with pytest.raises(MissingPackageError, match=r"'broken'.*libcudart"):
        set_attention_backend(pipe, "broken")
    assert patch.active
    assert_same(before, pipe)


def test_kernel_that_cannot_be_loaded_leaves_nothing_half_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setitem(backends._registered, "broken", Backend("broken", load))
    family = present("wan22")
    pipe = family.make()
    family.run(pipe, steps=2)
    before = Snapshot(pipe)
    with pytest.raises((OSError, ImportError), match="libcudart"):
        set_attention_backend(pipe, {"transformer": "math", "transformer_2": "broken"})
    assert_same(before, pipe)


def test_device_and_type_are_not_held_against_a_model_that_may_still_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual order is: make the pipeline, set the backend, move it to the GPU."""
    register_attention_backend("own", own, devices=("cuda",), dtypes=(torch.bfloat16,))
    register_attention_backend("large", own, devices=("cuda",), head_sizes=(64,))
    _, pipe = wan(num_layers=1)
    with pytest.raises(UnsupportedModelError, match="it runs on cuda, not on cpu"):
        set_attention_backend(pipe, "own")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_attention_backend(pipe, "own")
    with pytest.raises(UnsupportedModelError, match="it takes heads of size 64, not 16"):
        set_attention_backend(pipe, "large")


def test_model_on_the_meta_device_is_taken() -> None:
    transformer = wan(num_layers=1)[1].transformer.to("meta")
    assert set_attention_backend(transformer, "efficient").active


def test_weights_that_are_stored_in_eight_bits_are_no_reason() -> None:
    family, pipe = wan(num_layers=1)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = family.run(pipe, steps=1)
    set_attention_backend(pipe, "efficient")
    assert torch.equal(family.run(pipe, steps=1), expected)


# Calls that a backend cannot take


MASKED = {"hunyuan": (0, 11), "chroma": (0, 20), "ltx": (6, 6), "wan": (24, 0), "flux": (10, 0)}


@pytest.mark.parametrize(("name", "counts"), MASKED.items())
def test_calls_with_masks_go_to_pytorch_and_are_counted(name: str, counts: tuple[int, int]) -> None:
    """`counts`: calls of the backend, and calls with a mask, of one step."""
    register_attention_backend("own", own, masks=False)
    family = present(name)
    pipe = family.make()
    expected = family.run(pipe, steps=1)
    patch = set_attention_backend(pipe, "own", on_unsupported="native")
    assert torch.equal(family.run(pipe, steps=1), expected)
    assert (total(patch)["transformer"], sum(patch.fallbacks.values())) == counts
    assert {reason for _, reason in patch.fallbacks} <= {"it takes no mask"}
    for layer in {layer.removeprefix("transformer.") for layer, _ in patch.fallbacks}:
        assert hasattr(pipe.transformer.get_submodule(layer), "processor")


@families("hunyuan", "ltx")
def test_call_with_a_mask_is_refused_naming_the_layer(family: Family) -> None:
    register_attention_backend("own", own, masks=False)
    pipe = family.make()
    set_attention_backend(pipe, "own")
    with pytest.raises(UnsupportedModelError) as caught:
        family.run(pipe, steps=1)
    message = str(caught.value)
    assert "'own' cannot take a call of transformer." in message
    assert "it takes no mask. Usable there: sdpa, math, efficient, flex. Or send such calls" in message


def test_run_that_was_refused_leaves_a_pipeline_that_works() -> None:
    register_attention_backend("own", own, masks=False)
    family = present("ltx")
    pipe = family.make()
    expected = family.run(pipe, steps=1)
    patch = set_attention_backend(pipe, "own")
    with pytest.raises(UnsupportedModelError):
        family.run(pipe, steps=1)
    patch.remove()
    assert torch.equal(family.run(pipe, steps=1), expected)
    with set_attention_backend(pipe, "own", layers="*.attn1"):
        assert torch.equal(family.run(pipe, steps=1), expected)


# Components and layers


@pytest.mark.parametrize(
    ("layers", "count"),
    [
        (None, 12),
        ("blocks.0.attn1", 1),
        ("blocks.*.attn1", 6),
        ("*.attn2", 6),
        ("blocks.3", 2),
        (["blocks.0.attn1", "blocks.1"], 3),
        (("*", "blocks.0.attn1"), 12),
        ("blocks.[45].attn?", 4),
    ],
)
def test_layers_by_name_and_pattern(layers: Any, count: int) -> None:
    family, pipe = wan()
    patch = set_attention_backend(pipe, "math", layers=layers)
    family.run(pipe, steps=1)
    assert total(patch) == {"transformer": 2 * count}
    assert f"in {count} places" in str(patch)


def test_transformer_by_itself() -> None:
    family, pipe = wan(num_layers=2)
    patch = set_attention_backend(pipe.transformer, "math")
    family.run(pipe, steps=1)
    assert total(patch) == {"transformer": 8}
    patch.remove()
    family.run(pipe, steps=1)
    assert total(patch) == {"transformer": 8}


@pytest.mark.parametrize(
    ("backend", "components", "expected"),
    [
        ("math", None, {"transformer": "math", "transformer_2": "math"}),
        ("math", "transformer", {"transformer": "math", "transformer_2": "math"}),
        ("math", "transformer_2", {"transformer_2": "math"}),
        ({"transformer": "math"}, None, {"transformer": "math", "transformer_2": "math"}),
        ({"transformer_2": "efficient"}, None, {"transformer_2": "efficient"}),
        (
            {"transformer": "math", "transformer_2": "efficient"},
            None,
            {"transformer": "math", "transformer_2": "efficient"},
        ),
    ],
)
def test_second_expert_follows_the_first_unless_it_is_named(
    backend: Any, components: Any, expected: dict[str, str]
) -> None:
    family = present("wan22")
    pipe = family.make()
    patch = set_attention_backend(pipe, backend, components)
    family.run(pipe)
    assert patch.backends == expected
    assert patch.calls == {component: {name: 72} for component, name in expected.items()}


CONFIG = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2}


def clip(**more: Any) -> Any:
    """Causal, and with a mask where it is given one."""
    config = transformers.CLIPTextConfig(**CONFIG, num_attention_heads=2, max_position_embeddings=24, **more)
    return transformers.CLIPTextModel(config).eval()


def t5() -> Any:
    """Adds a bias to the scores."""
    made = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    ).eval()
    if made.config._attn_implementation != "sdpa":
        pytest.skip(f"the T5 of transformers {transformers.__version__} does not use PyTorch's attention")
    return made


def qwen3() -> Any:
    """Fewer heads of the key than of the query, and a head size that is not width by heads."""
    config = transformers.Qwen3Config(**CONFIG, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return transformers.Qwen3Model(config).eval()


TEXT_ENCODERS = {make.__name__: make for make in (clip, t5, qwen3)}
IDS, PADDING = torch.arange(14).reshape(2, 7), (torch.arange(7) < torch.tensor([[7], [5]])).long()


def encode(encoder: Any) -> Tensor:
    """With padding and without."""
    with torch.no_grad():
        given = ({"attention_mask": PADDING}, {})
        return torch.cat([encoder(IDS, **more).last_hidden_state for more in given])


@pytest.mark.parametrize("make", TEXT_ENCODERS.values(), ids=TEXT_ENCODERS)
def test_text_encoder(make: Any) -> None:
    family, pipe = wan(num_layers=2)
    pipe.register_modules(text_encoder=make())
    expected, video = encode(pipe.text_encoder), family.run(pipe, steps=1)
    before = Snapshot(pipe)
    for name in ("sdpa", "math", "efficient", "flex"):
        patch = set_attention_backend(pipe, {"text_encoder": name, "transformer": "sdpa"}, verify=True)
        torch.testing.assert_close(encode(pipe.text_encoder), expected, rtol=0, atol=1e-5)
        assert torch.equal(family.run(pipe, steps=1), video)
        assert total(patch) == {"text_encoder": 4, "transformer": 8}
        assert not patch.fallbacks
        patch.remove()
        assert_same(before, pipe)
        assert torch.equal(encode(pipe.text_encoder), expected)
        assert total(patch)["text_encoder"] == 4


def test_text_encoder_alone_leaves_the_transformer() -> None:
    register_attention_backend("own", own, masks=False, causal=False)
    family, pipe = wan(num_layers=2)
    pipe.register_modules(text_encoder=clip())
    expected = encode(pipe.text_encoder)
    patch = set_attention_backend(pipe, "own", components="text_encoder", on_unsupported="native")
    assert torch.equal(encode(pipe.text_encoder), expected)
    family.run(pipe, steps=1)
    assert patch.backends == {"text_encoder": "own"}
    assert total(patch) == {"text_encoder": 0}
    assert sum(patch.fallbacks.values()) == 4
    assert {layer for layer, _ in patch.fallbacks} == {"text_encoder"}


def test_text_encoder_that_does_not_use_the_function_is_refused() -> None:
    encoder = clip(attn_implementation="eager")
    _, pipe = wan(num_layers=1)
    pipe.register_modules(text_encoder=encoder)
    with pytest.raises(
        UnsupportedModelError, match=r"text_encoder \(CLIPTextModel\) computes no attention by PyTorch's"
    ):
        set_attention_backend(pipe, {"transformer": "math", "text_encoder": "math"})


@pytest.mark.parametrize("make", [clip, qwen3])
def test_head_size_of_a_text_encoder_is_that_of_its_calls(make: Any) -> None:
    register_attention_backend("own", own, head_sizes=(16,))
    with set_attention_backend(encoder := make(), "own") as patch:
        encode(encoder)
    assert total(patch) == {"transformer": 4}


def kl_vae() -> tuple[Any, Tensor]:
    """With attention layers that have processors."""
    vae = build(
        "AutoencoderKL",
        0,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    )
    return vae, torch.randn(2, 4, 6, 5)


def wan_vae() -> tuple[Any, Tensor]:
    """With attention blocks that call the function themselves."""
    return present("wan_v2v").make().vae, torch.randn(1, 4, 2, 4, 4)


@pytest.mark.parametrize("make", [kl_vae, wan_vae])
def test_vae(make: Any) -> None:
    _, pipe = wan(num_layers=1)
    vae, latents = make()
    pipe.register_modules(vae=vae)

    def decoded() -> Tensor:
        with torch.no_grad():
            return vae.decode(latents, return_dict=False)[0]

    expected = decoded()
    before = Snapshot(pipe)
    for name in ("sdpa", "math", "efficient", "flex"):
        with set_attention_backend(pipe, name, components=["vae"], verify=True) as patch:
            torch.testing.assert_close(decoded(), expected, rtol=0, atol=1e-4)
        assert total(patch)["vae"] > 0
        changed = before.differences(Snapshot(pipe))
        assert not [line for line in changed if "_conv_idx" not in line and "_feat_map" not in line]  # new at each run
    assert torch.equal(decoded(), expected)


@pytest.mark.parametrize("make", [kl_vae, wan_vae])
def test_backend_of_a_vae_is_replaced(make: Any) -> None:
    vae, latents = make()
    expected = vae.decode(latents, return_dict=False)[0]
    register_attention_backend("zeros", lambda query, key, value, **more: torch.zeros_like(query))
    for name in ("zeros", "sdpa"):
        patch = set_attention_backend(vae, name)
        assert torch.equal(vae.decode(latents, return_dict=False)[0], expected) == (name == "sdpa")
    assert [*patch.calls["transformer"]] == ["sdpa"]
    patch.remove()
    assert torch.equal(vae.decode(latents, return_dict=False)[0], expected)


def test_controlnet_is_in_the_loop_as_well() -> None:
    family = present("flux_controlnet")
    pipe = family.make()
    expected = family.run(pipe, steps=3)
    patch = set_attention_backend(pipe, {"transformer": "math", "controlnet": "math"}, skip_first_steps=1)
    torch.testing.assert_close(family.run(pipe, steps=3), expected, rtol=0, atol=1e-5)
    assert total(patch) == {"transformer": 2 * 10, "controlnet": 2 * 5}


def test_components_are_replaced_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    """A call replaces what was set on the components that it is for, and says so where that was set on others too."""
    _, pipe = wan(num_layers=1)
    pipe.register_modules(text_encoder=clip())
    first = set_attention_backend(pipe, "math")
    second = set_attention_backend(pipe, "math", components="text_encoder")
    assert first.active
    assert second.active
    both = set_attention_backend(pipe, {"transformer": "math", "text_encoder": "math"})
    assert not first.active
    assert not second.active
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        third = set_attention_backend(pipe, "efficient")
    assert not both.active
    assert "it is gone there" in caplog.text
    assert "text_encoder" in caplog.text
    third.remove()


# What is shown


def test_patch_is_printed_with_calls_and_reasons() -> None:
    register_attention_backend("own", own, masks=False)
    family = present("ltx")
    pipe = family.make()
    patch = set_attention_backend(pipe, "own", on_unsupported="native")
    assert "calls: none yet" in str(patch)
    family.run(pipe, steps=2)
    lines = str(patch).splitlines()
    assert lines[0] == "attention of transformer: own, in 12 places"
    assert lines[1] == "  calls: 12 by own"
    assert lines[2] == "  12 calls of 6 layers went to PyTorch's own attention: it takes no mask"
    patch.remove()
    assert str(patch).startswith("attention of transformer: own, in 12 places [removed]")
    assert patch._repr_html_().startswith("<pre>attention of transformer")


def test_table_tells_what_is_usable_and_why_not() -> None:
    register_attention_backend("own", own, is_exact=False, masks=False, head_sizes=(64,))
    table = attention_backends(wan(num_layers=1)[1])
    rows = {row.name: row for row in table}
    assert [row.name for row in table] == [*all_backends()]
    for name in ("sdpa", "math", "efficient", "flex"):
        assert (rows[name].is_usable, rows[name].reason, rows[name].is_exact) == (True, "", True)
        assert rows[name].masks
    assert (rows["cudnn"].is_usable, rows["cudnn"].reason) == (False, "it runs on cuda, not on cpu")
    assert (rows["own"].is_usable, rows["own"].reason) == (False, "it takes heads of size 64, not 16")
    assert (rows["own"].is_exact, rows["own"].masks) == (False, False)
    assert rows["sdpa"].aliases == ("torch_sdpa", "native")
    for name, row in rows.items():
        assert row.is_usable != bool(row.reason), name
        assert row.install == all_backends()[name].install
    assert not rows["sage"].is_exact
    lines = str(table).splitlines()
    assert lines[0].split() == ["backend", "usable", "exact", "masks", "why", "not"]
    assert len(lines) == len(table) + 1
    assert next(line for line in lines if line.startswith("own")).split(maxsplit=4) == [
        *("own", "no", "no", "no"),
        "it takes heads of size 64, not 16",
    ]


def test_table_agrees_with_what_can_be_set() -> None:
    _, pipe = wan(num_layers=1)
    for row in attention_backends(pipe):
        if row.is_usable:
            set_attention_backend(pipe, row.name).remove()
        else:
            with pytest.raises((MissingPackageError, UnsupportedModelError)) as caught:
                set_attention_backend(pipe, row.name)
            assert row.reason in str(caught.value)


def test_table_of_another_component() -> None:
    register_attention_backend("own", own, head_sizes=(16,))
    _, pipe = wan(num_layers=1, attention_head_dim=32)
    pipe.register_modules(text_encoder=clip())

    def usable(component: str) -> bool:
        return next(row.is_usable for row in attention_backends(pipe, component) if row.name == "own")

    assert usable("text_encoder")
    assert not usable("transformer")
    with pytest.raises(ConfigError, match=r"unknown component 'text_encodr'.*Did you mean 'text_encoder'\?"):
        attention_backends(pipe, "text_encodr")


def test_table_of_what_can_have_no_backend() -> None:
    """As `set_attention_backend` says it."""
    assert not [row for row in attention_backends(nn.Linear(2, 2)) if row.is_usable]


def test_config_of_a_patch_sets_the_same_again() -> None:
    """And nothing can be given beside it, which would be silently dropped."""
    pipe = FAMILIES["wan"].make()
    patch = set_attention_backend(pipe, "math", skip_first_steps=1, on_unsupported="native")
    again = set_attention_backend(FAMILIES["wan"].make(), patch.config)
    assert again.config == patch.config
    assert again.backends == {"transformer": "math"}
    with pytest.raises(ConfigError, match="give none beside it"):
        set_attention_backend(pipe, patch.config, skip_last_steps=1)
