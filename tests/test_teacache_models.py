"""TeaCache's table of models: the published numbers, the choice among them, and each model's own signal."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from invariants import families
from invariants.families import present
from sgl_diffusion_accel.caching.parts.signals import ModulatedInput, TimeEmbedding, relative_l1
from sgl_diffusion_accel.caching.teacache.teacache_models import FAMILIES, VARIANTS, family_of, nearest_size
from zoo import Family

# Key: variant and whether with retention steps. Then coefficients, highest degree first, and threshold → speed-up.
PUBLISHED = {
    "wan2.1-t2v-1.3b r": (
        "-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2",
        ".05 → 1.6x, .10 → 2.4x",
    ),
    "wan2.1-t2v-1.3b": (
        "2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1",
        ".05/.07/.08 → 1.5/1.6/2.0x",
    ),
    "wan2.1-t2v-14b r": (
        "-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1",
        ".10/.20 → 2.0/3.2x",
    ),
    "wan2.1-t2v-14b": (
        "-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404",
        ".14/.15/.20 → 1.4/1.8/2.0x",
    ),
    "wan2.1-i2v-480p r": (
        "2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1",
        ".20/.30 → 1.8/2.3x",
    ),
    "wan2.1-i2v-480p": (
        "-3.02331670e2, 2.23948934e2, -5.25463970e1, 5.87348440, -2.01973289e-1",
        ".13/.19/.26 → 1.6/2.0/2.4x",
    ),
    "wan2.1-i2v-720p r": (
        "8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2",
        ".20/.30 → 2.1/2.7x",
    ),
    "wan2.1-i2v-720p": (
        "-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683",
        ".18/.2/.3 → 1.7/1.9/2.4x",
    ),
    "hunyuanvideo": (
        "7.33226126e2, -4.01131952e2, 6.75869174e1, -3.14987800, 9.61237896e-2",
        ".10 → 1.6x, .15 → 2.1x",
    ),
    "flux.1-dev": (
        "4.98651651e2, -2.83781631e2, 5.58554382e1, -3.82021401, 2.64230861e-1",
        ".25/.4/.6/.8 → 1.5/1.8/2.0/2.25x",
    ),
    "cogvideox-2b": ("-3.10658903e1, 2.54732368e1, -5.92380459, 1.75769064, -3.61568434e-3", ""),
    "cogvideox-5b": (
        "-1.53880483e3, 8.43202495e2, -1.34363087e2, 7.97131516, -5.23162339e-2",
        ".1/.15/.2 → 1.6/2.1/2.5x",
    ),
    "cogvideox1.5-5b": (
        "2.50210439e2, -1.65061612e2, 3.57804877e1, -7.81551492e-1, 3.58559703e-2",
        ".1/.2/.3 → 1.3/1.8/2.1x",
    ),
    "cogvideox1.5-5b-i2v": ("1.22842302e2, -1.04088754e2, 2.62981677e1, -3.06009921e-1, 3.71213220e-2", ""),
    "ltx-video": (
        "2.14700694e1, -1.28016453e1, 2.31279151, 7.92487521e-1, 9.69274326e-3",
        ".03/.05 → 1.6/2.1x",
    ),
    "mochi-1": (
        "-3.51241319e3, 8.11675948e2, -6.09400215e1, 2.42429681, 3.05291719e-3",
        ".06/.09 → 1.5/2.1x",
    ),
    "lumina2": (
        "393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344",
        ".2/.3/.4/.5 → 1.5/1.9/2.4/2.8x",
    ),
    "hidream-i1": (
        "-3.13605009e4, -7.12425503e2, 4.91363285e1, 8.26515490, 1.08053901e-1",
        ".17/.25/.3/.45 → 1.5/1.7/2.0/2.6x",
    ),
    "cosmos": (
        "2.71156237e2, -9.19775607e1, 2.24437250, 2.08355751, 1.41776330e-1",
        ".3/.4 → 1.4/2.0x",
    ),
}
UNPUBLISHED_THRESHOLDS = {"cogvideox-2b": "cogvideox-5b", "cogvideox1.5-5b-i2v": "cogvideox1.5-5b"}
"""Variants whose thresholds are those of another one, since only coefficients are published."""

FITS = {
    name + suffix: fit
    for name, variant in VARIANTS.items()
    for suffix, fit in (("", variant.fit), (" r", variant.retained))
    if fit is not None
}


def by_speedup(published: str) -> dict[float, float]:
    """Thresholds by speed-up, from `.05/.07 → 1.5/1.6x, .10 → 2.4x`."""
    pairs = {}
    for part in filter(None, published.split(", ")):
        thresholds, speedups = (side.split("/") for side in part.removesuffix("x").split(" → "))
        pairs |= {float(s): float(t) for s, t in zip(speedups, thresholds, strict=True)}
    return pairs


# The numbers


def test_table_has_what_is_published_and_nothing_else():
    assert set(FITS) == set(PUBLISHED)


@pytest.mark.parametrize("key", PUBLISHED)
def test_coefficients_are_the_published_ones(key):
    coefficients, _ = PUBLISHED[key]
    assert FITS[key].coefficients == tuple(map(float, coefficients.split(", ")))


@pytest.mark.parametrize("key", PUBLISHED)
def test_thresholds_are_the_published_ones(key):
    _, published = PUBLISHED[UNPUBLISHED_THRESHOLDS.get(key, key)]
    assert FITS[key].thresholds == by_speedup(published)
    assert FITS[key].thresholds


def test_sizes_are_told_apart_where_two_were_published():
    sizes = {name: variant.pixels for name, variant in VARIANTS.items() if variant.pixels}
    assert sizes == {"wan2.1-i2v-480p": 480 * 832, "wan2.1-i2v-720p": 720 * 1280}


# The choice


@pytest.mark.parametrize("name", FAMILIES)
def test_class_exists(name):
    assert issubclass(getattr(diffusers, name), nn.Module)


def test_every_variant_goes_with_a_class_and_every_class_with_known_variants():
    named = set(itertools.chain.from_iterable(family.variants for family in FAMILIES.values()))
    assert named == set(VARIANTS)


def test_retention_steps_are_a_choice_where_they_were_published():
    for name, family in FAMILIES.items():
        published = [variant for variant in family.variants if VARIANTS[variant].retained is not None]
        assert (family.retained is not None) == bool(published), name


def wan(heads, inputs=16, outputs=16, image_dim=None):
    return SimpleNamespace(
        num_attention_heads=heads,
        attention_head_dim=128,
        in_channels=inputs,
        out_channels=outputs,
        image_dim=image_dim,
    )


IMAGE_TO_VIDEO = ("wan2.1-i2v-480p", "wan2.1-i2v-720p")


@pytest.mark.parametrize(
    ("config", "variants"),
    [
        (wan(12), ("wan2.1-t2v-1.3b",)),
        (wan(40), ("wan2.1-t2v-14b",)),
        (wan(40, 36, 16, 1280), IMAGE_TO_VIDEO),
        (wan(40, 36, 16), IMAGE_TO_VIDEO),
        (wan(24, 48, 48), ()),
    ],
    ids=["2.1 T2V 1.3B", "2.1 T2V 14B, 2.2 T2V A14B", "2.1 I2V 14B", "2.2 I2V A14B", "2.2 TI2V 5B"],
)
def test_wan_is_chosen_by_its_config(config, variants):
    assert FAMILIES["WanTransformer3DModel"].variants_for(config) == variants


def cogvideox(rotary=True, patch_size_t=None, inputs=16, ofs=None):
    return SimpleNamespace(
        use_rotary_positional_embeddings=rotary,
        patch_size_t=patch_size_t,
        in_channels=inputs,
        out_channels=16,
        ofs_embed_dim=ofs,
    )


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        (cogvideox(rotary=False), "cogvideox-2b"),
        (cogvideox(), "cogvideox-5b"),
        (cogvideox(inputs=32), "cogvideox-5b"),
        (cogvideox(patch_size_t=2), "cogvideox1.5-5b"),
        (cogvideox(patch_size_t=2, inputs=32, ofs=512), "cogvideox1.5-5b-i2v"),
    ],
    ids=["2b", "5b", "5b-I2V", "1.5-5B", "1.5-5B-I2V"],
)
def test_cogvideox_is_chosen_by_its_config(config, variant):
    assert FAMILIES["CogVideoXTransformer3DModel"].variants_for(config) == (variant,)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("ConsisIDTransformer3DModel", "cogvideox-5b"),
        ("HiDreamImageTransformer2DModel", "hidream-i1"),
        ("FluxTransformer2DModel", "flux.1-dev"),
        ("HunyuanVideoTransformer3DModel", "hunyuanvideo"),
        ("LTXVideoTransformer3DModel", "ltx-video"),
        ("MochiTransformer3DModel", "mochi-1"),
        ("Lumina2Transformer2DModel", "lumina2"),
        ("LuminaNextDiT2DModel", "lumina2"),
        ("CosmosTransformer3DModel", "cosmos"),
    ],
)
def test_class_of_one_variant_needs_no_config(name, variant):
    assert FAMILIES[name].variants_for(None) == (variant,)


def test_control_of_wan_has_no_variant_of_its_own_and_may_be_given_one():
    family = FAMILIES["WanVACETransformer3DModel"]
    assert family.variants_for(wan(40)) == ()
    assert "wan2.1-t2v-14b" in family.variants


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("wan", ("wan2.1-t2v-1.3b",)),
        ("wan22", ("wan2.1-t2v-1.3b",)),
        ("cogvideox", ("cogvideox-5b",)),
        ("flux", ("flux.1-dev",)),
        ("qwen", ()),
        ("zimage", ()),
    ],
)
def test_real_models_are_found_by_their_class_and_config(name, variants):
    transformer = present(name).make().transformer
    assert family_of(transformer).variants_for(transformer.config) == variants


BY_TIME = ("wan", "wan22", "wan_v2v", "cogvideox")


@families()
def test_signal_is_the_time_embedding_for_some_and_the_modulated_input_for_all_others(family: Family) -> None:
    kind = TimeEmbedding if family.name in BY_TIME else ModulatedInput
    assert isinstance(family_of(family.make().transformer).signal, kind)


@pytest.mark.parametrize("name", ["ConsisIDTransformer3DModel", "HiDreamImageTransformer2DModel"])
def test_signal_of_what_the_zoo_lacks_is_the_time_embedding(name):
    assert isinstance(FAMILIES[name].signal, TimeEmbedding)


def test_unknown_class_has_the_modulated_input_and_no_variants():
    family = family_of(nn.Linear(1, 1))
    assert (family.signal, family.retained, family.variants) == (ModulatedInput(), None, ())
    assert family.variants_for(None) == ()


WAN_SIZES = [480 * 832, 720 * 1280]


@pytest.mark.parametrize(
    ("height", "width", "index"),
    [
        (60, 104, 0),
        (104, 60, 0),
        (78, 78, 0),
        (32, 32, 0),
        (90, 160, 1),
        (160, 90, 1),
        (120, 120, 1),
        (136, 240, 1),
        (88, 106, 0),  # 0.598 of a million pixels; the middle of the two, by ratio, is 0.607
        (88, 108, 1),
    ],
)
def test_nearest_size_is_by_the_ratio_of_pixels(height, width, index):
    assert nearest_size(WAN_SIZES, torch.Size((1, 16, 21, height, width))) == index
    assert nearest_size(WAN_SIZES, torch.Size((2, 16, height, width))) == index
    assert nearest_size(WAN_SIZES[::-1], torch.Size((1, 16, 21, height, width))) == 1 - index


def test_single_variant_is_nearest_whatever_its_size():
    assert nearest_size([None], torch.Size((1, 4, 3))) == 0


# The signals


def recorded(family: Family, pipe: Any, embedding: str, steps: int) -> list[Any]:
    """What the embedding of an unpatched run returned, at the first call of each step."""
    seen: list[Any] = []
    hook = pipe.transformer.get_submodule(embedding).register_forward_hook(lambda _, args, output: seen.append(output))
    given, dtype = family.call(pipe, steps=steps), pipe.transformer.dtype
    floats = {k: v.to(dtype) for k, v in given.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    family.run(pipe, steps=steps, **floats)
    hook.remove()
    return seen[:: len(family.branches)]


def check_embedding(
    signal: TimeEmbedding, transformer: nn.Module, timesteps: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype
) -> None:
    """Several rows at once may be summed in another order, which float32 shows in its last bits."""
    embedded = signal.embed(transformer, timesteps, dtype)
    assert embedded.dtype == rows.dtype == dtype
    torch.testing.assert_close(embedded, rows, rtol=1e-5, atol=1e-6)
    expected = [relative_l1(now, before) for before, now in itertools.pairwise(rows)]
    assert min(expected) > 0
    changes = signal.changes(transformer, timesteps, dtype).tolist()
    assert changes[0] == float("inf")
    assert changes[1:] == pytest.approx(expected, rel=1e-4)


@families("wan", "wan_v2v")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("retains", [False, True])
def test_signal_of_wan_is_its_time_embedding_or_the_projection_of_it(
    family: Family, dtype: torch.dtype, retains: bool
) -> None:
    pipe = family.make()
    pipe.to(dtype)
    seen = recorded(family, pipe, "condition_embedder", 8)
    rows = torch.stack([each[1 if retains else 0][0] for each in seen])
    known = family_of(pipe.transformer)
    signal = known.retained if retains else known.signal
    check_embedding(signal, pipe.transformer, pipe.scheduler.timesteps, rows, dtype)
    assert rows.shape[1] == (6 if retains else 1) * 32


@families("cogvideox")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signal_of_cogvideox_is_its_time_embedding(family: Family, dtype: torch.dtype) -> None:
    pipe = family.make()
    pipe.to(dtype)
    rows = torch.stack([each[0] for each in recorded(family, pipe, "time_embedding", 8)])
    check_embedding(family_of(pipe.transformer).signal, pipe.transformer, pipe.scheduler.timesteps, rows, dtype)


@families("cogvideox")
def test_signal_of_cogvideox_1_5_has_the_offset_in_it(family: Family) -> None:
    """What its blocks take is the sum of two embeddings."""
    pipe = family.make(patch_size_t=1, ofs_embed_dim=16)
    transformer, arguments = pipe.transformer, family.bare()
    seen: list[torch.Tensor] = []
    transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: seen.append((*args, *kwargs.values())[2][:1]), with_kwargs=True
    )
    timesteps = torch.tensor([999, 800, 650, 300, 10])
    for timestep in timesteps:
        arguments |= {"timestep": timestep.expand(2), "ofs": torch.full((1,), 2.0)}
        with torch.no_grad():
            transformer(**arguments)
    check_embedding(family_of(transformer).signal, transformer, timesteps, torch.cat(seen), torch.float32)
    with torch.no_grad():
        assert not torch.equal(seen[0], transformer.time_embedding(transformer.time_proj(timesteps[:1])))


class Seen(Exception):
    """Ends a forward once its time embedding was seen."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signal_of_hidream_is_its_time_embedding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[8, 8],
        text_emb_dim=8,
        axes_dims_rope=(4, 4),
        max_resolution=(8, 8),
    ).to(dtype)
    seen: list[torch.Tensor] = []

    def stop(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen.append(output.detach())
        raise Seen

    timesteps = torch.tensor([999.0, 750.0, 400.0, 30.0])
    hook = transformer.t_embedder.register_forward_hook(stop)
    for timestep in timesteps:
        with pytest.raises(Seen):
            transformer(torch.zeros(1, 4, 8, 8, dtype=dtype), timestep[None])
    hook.remove()
    check_embedding(family_of(transformer).signal, transformer, timesteps, torch.cat(seen), dtype)
