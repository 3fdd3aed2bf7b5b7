"""Block lists are found on every transformer of diffusers, and divided into head, span and tail."""

from __future__ import annotations

import inspect
import re
import warnings

import diffusers
import pytest
import torch
from torch import nn

from sgl_diffusion_accel.caching.blocks.layout import divide, find_block_lists
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError

SMALL = re.compile(r"(num\w*_layers|^n_layers|n_refiner_layers|mmdit_layers|^depth|num_\w*blocks)$")
"""Constructor arguments that count layers."""

NEEDED = {
    "DreamLiteTransformer2DModel": {"in_channels": 4},
    "EasyAnimateTransformer3DModel": {"in_channels": 4, "out_channels": 4, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 4,
        "caption_channels": [8, 8],
        "text_emb_dim": 8,
    },
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "sample_size": 8, "activation_fn": "gelu-approximate"},
    "MotifVideoTransformer3DModel": {"num_decoder_layers": 0},
    "LatteTransformer3DModel": {"in_channels": 4, "sample_size": 8, "patch_size": 2, "caption_channels": 8},
    "LuminaNextDiT2DModel": {"in_channels": 4, "num_kv_heads": 8},
    "WanVACETransformer3DModel": {"vace_layers": [0, 1]},
}
"""What some constructors do not have a default for."""

EXPECTED = {
    "AllegroTransformer3DModel": ["transformer_blocks"],
    "AuraFlowTransformer2DModel": ["joint_transformer_blocks", "single_transformer_blocks"],
    "BriaFiboTransformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    "BriaTransformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    "ChromaTransformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    "ChronoEditTransformer3DModel": ["blocks"],
    "CogVideoXTransformer3DModel": ["transformer_blocks"],
    "CogView3PlusTransformer2DModel": ["transformer_blocks"],
    "CogView4Transformer2DModel": ["transformer_blocks"],
    "ConsisIDTransformer3DModel": ["transformer_blocks"],
    "CosmosTransformer3DModel": ["transformer_blocks"],
    "DiTTransformer2DModel": ["transformer_blocks"],
    "EasyAnimateTransformer3DModel": ["transformer_blocks"],
    "ErnieImageTransformer2DModel": ["layers"],
    "Flux2Transformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    "FluxTransformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    "GlmImageTransformer2DModel": ["transformer_blocks"],
    "HeliosTransformer3DModel": ["blocks"],
    "HiDreamImageTransformer2DModel": ["double_stream_blocks", "single_stream_blocks"],
    "HunyuanDiT2DModel": ["blocks"],
    "HunyuanImageTransformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    "HunyuanVideo15Transformer3DModel": ["transformer_blocks"],
    "HunyuanVideoFramepackTransformer3DModel": ["transformer_blocks", "single_transformer_blocks"],
    "HunyuanVideoTransformer3DModel": ["transformer_blocks", "single_transformer_blocks"],
    "Kandinsky5Transformer3DModel": ["visual_transformer_blocks"],
    "Kandinsky6Transformer3DModel": ["visual_transformer_blocks"],
    "LTX2VideoTransformer3DModel": ["transformer_blocks"],
    "LTXVideoTransformer3DModel": ["transformer_blocks"],
    "LongCatImageTransformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    "Lumina2Transformer2DModel": ["layers"],
    "LuminaNextDiT2DModel": ["layers"],
    "MochiTransformer3DModel": ["transformer_blocks"],
    "MotifVideoTransformer3DModel": ["transformer_blocks", "single_transformer_blocks"],
    "OvisImageTransformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    "PRXTransformer2DModel": ["blocks"],
    "PixArtTransformer2DModel": ["transformer_blocks"],
    "QwenImageTransformer2DModel": ["transformer_blocks"],
    "SD3Transformer2DModel": ["transformer_blocks"],
    "SanaTransformer2DModel": ["transformer_blocks"],
    "SanaVideoTransformer3DModel": ["transformer_blocks"],
    "SkyReelsV2Transformer3DModel": ["blocks"],
    "StableAudioDiTModel": ["transformer_blocks"],
    "WanAnimateTransformer3DModel": ["blocks"],
    "WanTransformer3DModel": ["blocks"],
    "WanVACETransformer3DModel": ["blocks"],
    "ZImageTransformer2DModel": ["layers"],
}
"""The lists of the denoising stack, in the order in which `forward` runs them, read from diffusers' sources."""


def build(name, **overrides):
    """The class with few layers and no memory; skips where the installed diffusers has no such class."""
    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    parameters = inspect.signature(cls.__init__).parameters
    counts = {key: 2 for key, value in parameters.items() if SMALL.search(key) and type(value.default) is int}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return cls(**{**counts, **NEEDED.get(name, {}), **overrides})


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Identity()


class Toy(nn.Module):
    """A transformer of lists of the given lengths."""

    def __init__(self, **lists):
        super().__init__()
        self.proj = nn.Identity()
        for name, length in lists.items():
            setattr(self, name, nn.ModuleList(Block() for _ in range(length)))


@pytest.mark.parametrize("name", EXPECTED)
def test_lists_of_the_denoising_stack_are_found_in_their_order(name):
    transformer = build(name)
    found = find_block_lists(transformer)
    assert list(found) == EXPECTED[name]
    for attribute, blocks in found.items():
        assert list(blocks) == list(getattr(transformer, attribute))


def test_every_other_transformer_has_its_lists_or_a_refusal():
    """Of classes that are not in the table: what is found is what `forward` loops over, in the same order."""
    checked = []
    for name in dir(diffusers):
        if not re.search(r"Transformer\dDModel$|DiTModel$", name) or name in EXPECTED:
            continue
        try:
            transformer = build(name)
        except (TypeError, ValueError):
            continue  # needs arguments that are not known here
        try:
            found = list(find_block_lists(transformer))
        except UnsupportedModelError:
            continue
        source = inspect.getsource(type(transformer).forward)
        loops = list(dict.fromkeys(re.findall(r"in (?:enumerate\(|zip\()?\s*self\.(\w+)", source)))
        if any(blocks in loops for blocks in found):
            assert found == [blocks for blocks in loops if blocks in found], name
        checked.append(name)
    assert checked or diffusers.__version__ < "0.42"


def test_interleaved_lists_are_refused_with_the_reason():
    with pytest.raises(UnsupportedModelError, match=r"LatteTransformer3DModel.*interleaved"):
        find_block_lists(build("LatteTransformer3DModel"))


@pytest.mark.skipif(not hasattr(diffusers, "MotifVideoTransformer3DModel"), reason="not in this diffusers")
def test_motif_is_refused_with_decoder_layers_alone():
    assert find_block_lists(build("MotifVideoTransformer3DModel"))
    with pytest.raises(UnsupportedModelError, match=r"MotifVideoTransformer3DModel.*other streams"):
        find_block_lists(build("MotifVideoTransformer3DModel", num_decoder_layers=1))


def test_last_blocks_with_skip_connections_cannot_be_computed_alone():
    transformer = build("HunyuanDiT2DModel", num_layers=6)
    assert divide(transformer, 1, 0).skippable == 5
    with pytest.raises(ConfigError, match=r"bn_compute_blocks=1 .*Allowed: 0 to 0"):
        divide(transformer, 1, 1)


def test_module_without_a_list_of_blocks_is_refused_with_what_was_seen():
    with pytest.raises(UnsupportedModelError, match=r"Sequential has no list .*\(0, 1\)"):
        find_block_lists(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(UnsupportedModelError, match="none"):
        find_block_lists(nn.ReLU())


def test_lists_without_attention_are_not_blocks():
    toy = Toy(blocks=3)
    toy.heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    toy.empty = nn.ModuleList()
    toy.mixed = nn.ModuleList([Block(), nn.Linear(2, 2)])
    assert list(find_block_lists(toy)) == ["blocks"]


def test_refiners_and_adapters_are_not_part_of_the_stack():
    toy = Toy(noise_refiner=2, layers=4, vace_blocks=2)
    assert list(find_block_lists(toy)) == ["layers"]


def spans(layout):
    return [(blocks.start, blocks.end) for blocks in layout.lists]


@pytest.mark.parametrize(
    ("fn", "bn", "expected"),
    [(1, 0, [(1, 12)]), (0, 0, [(0, 12)]), (4, 3, [(4, 9)]), (11, 0, [(11, 12)]), (0, 11, [(0, 1)]), (6, 5, [(6, 7)])],
)
def test_one_list_is_divided_into_head_span_and_tail(fn, bn, expected):
    layout = divide(Toy(blocks=12), fn, bn)
    assert spans(layout) == expected
    assert (layout.fn, layout.bn, layout.total, layout.skippable) == (fn, bn, 12, 12 - fn - bn)


@pytest.mark.parametrize(
    ("fn", "bn", "expected"),
    [
        (1, 0, [(1, 3), (0, 4)]),
        (3, 0, [(3, 3), (0, 4)]),
        (0, 4, [(0, 3), (0, 0)]),
        (2, 1, [(2, 3), (0, 3)]),
    ],
)
def test_head_lies_in_the_first_list_and_tail_in_the_last(fn, bn, expected):
    layout = divide(Toy(first=3, second=4), fn, bn)
    assert spans(layout) == expected
    assert layout.total == 7
    assert layout.skippable == 7 - fn - bn


def test_middle_list_of_three_is_all_span():
    assert spans(divide(Toy(a=2, b=3, c=4), 1, 1)) == [(1, 2), (0, 3), (0, 3)]


@pytest.mark.parametrize(("fn", "bn"), [(12, 0), (0, 12), (6, 6), (8, 8), (100, 0)])
def test_nothing_left_to_skip_is_refused_with_the_numbers(fn, bn):
    with pytest.raises(ConfigError) as error:
        divide(Toy(blocks=12), fn, bn)
    message = str(error.value)
    assert f"fn_compute_blocks={fn}" in message
    assert f"bn_compute_blocks={bn}" in message
    assert "12 blocks of Toy" in message
    assert "<= 11" in message


def test_head_beyond_the_first_list_is_refused():
    with pytest.raises(ConfigError, match=r"fn_compute_blocks=4 .*first: 3, second: 4.*Allowed: 0 to 3"):
        divide(Toy(first=3, second=4), 4, 0)


def test_tail_beyond_the_last_list_is_refused():
    with pytest.raises(ConfigError, match=r"bn_compute_blocks=5 .*first: 3, second: 4.*Allowed: 0 to 4"):
        divide(Toy(first=3, second=4), 1, 5)


def test_dividing_leaves_the_transformer_as_it_was():
    toy = Toy(blocks=4)
    before = list(toy.blocks), dict(toy.__dict__)
    divide(toy, 1, 1)
    assert (list(toy.blocks), dict(toy.__dict__)) == before
