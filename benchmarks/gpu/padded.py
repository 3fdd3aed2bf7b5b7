"""Models whose prompts are padded: true widths, heads and text lengths, random weights, a few blocks of each.

What is cut is the number of blocks and, for a CPU, the picture. Text is as the pipelines feed it: this many tokens, of
which those of a caption of fifty words count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from sgl_diffusion_accel import Trimmed

from .models import Place, make_transformer

Grid = tuple[int, ...]
"""Frames if any, rows and columns of the latents."""

Text = tuple[int, int]
"""Tokens that are fed, and those of them that count."""

_TINY_TEXT = 24


@dataclass(frozen=True)
class Blocks:
    """A list of blocks of a transformer.

    Attributes:
        path: Its name in the transformer.
        key: Of its depth in the config.
        released: Its depth in the released model.
        measured: Its depth in the model that is measured on a GPU.
        sees_picture: Whether it computes the picture; refiners see text alone.
    """

    path: str
    key: str
    released: int
    measured: int
    sees_picture: bool = True


@dataclass(frozen=True)
class Padded:
    """A model whose text is padded.

    Attributes:
        title: What it is called in tables.
        transformer: Class of diffusers.
        lists: Its lists of blocks.
        texts: Its text streams.
        grid: Of the latents at the size that `size` names.
        size: Of the picture.
        small: Grid of a picture that a CPU computes in seconds.
        call: Makes the arguments of a call from the place, the transformer's config, a grid and the text streams.
        tiny: What differs in the tiny configuration, but for depths.
        config: What differs from the defaults of the transformer's class, which are those of the released model.
        patch: Rows and columns of latents that make one token.
        has_text_in_output: Whether the output has the places of the text in front, which nobody reads.
    """

    title: str
    transformer: str
    lists: tuple[Blocks, ...]
    texts: tuple[Text, ...]
    grid: Grid
    size: str
    small: Grid
    call: Callable[[Place, Any, Grid, Sequence[Text]], dict[str, Any]]
    tiny: Mapping[str, Any]
    config: Mapping[str, Any]
    patch: int = 1
    has_text_in_output: bool = False

    def pixels(self, grid: Grid) -> int:
        """Tokens of the picture."""
        frames = grid[0] if len(grid) > 2 else 1
        return frames * (grid[-2] // self.patch) * (grid[-1] // self.patch)

    def read(self, output: Tensor, texts: Sequence[Text]) -> Tensor:
        """What is read of an output."""
        return output[:, texts[0][0] :] if self.has_text_in_output else output


@dataclass(frozen=True)
class BuiltPadded:
    """A transformer, and the arguments to call it with.

    Attributes:
        model: What it is.
        transformer: The transformer.
        given: The arguments.
        depths: Of its lists of blocks.
        texts: Its text streams.
        pixels: Tokens of the picture.
    """

    model: Padded
    transformer: nn.Module
    given: dict[str, Any]
    depths: dict[str, int]
    texts: tuple[Text, ...]
    pixels: int

    @torch.no_grad()
    def run(self) -> Tensor:
        """One call: what is read of its output."""
        output: Tensor = self.transformer(**self.given, return_dict=False)[0]
        return self.model.read(output, self.texts)


def build_padded(
    model: Padded, place: Place, grid: Grid | None = None, depth: Callable[[Blocks], int] = lambda each: each.measured
) -> BuiltPadded:
    """A transformer and its call.

    Args:
        model: Which one.
        place: Where and how large.
        grid: Of the latents; None for the true one.
        depth: How many blocks each list has.
    """
    depths: dict[str, int] = {each.path: depth(each) for each in model.lists}
    config = {**model.config, **(model.tiny if place.tiny else {})} | {
        each.key: depths[each.path] for each in model.lists
    }
    transformer = make_transformer(getattr(diffusers, model.transformer), config, place)
    grid, texts = grid or model.grid, model.texts
    if place.tiny:
        grid, texts = (2, 4, 4)[-len(grid) :], tuple((_TINY_TEXT, min(valid, 9)) for _, valid in texts)
    given = model.call(place, transformer.config, grid, texts)
    return BuiltPadded(model, transformer, given, depths, texts, model.pixels(grid))


def text_tokens(built: BuiltPadded, told: Mapping[Trimmed, int]) -> list[int]:
    """Text tokens before and after the cut of a model's calls.

    Args:
        built: The model.
        told: What was cut of its calls, which are all alike.
    """
    (trimmed,) = told
    picture = built.pixels if built.model.has_text_in_output else 0  # one stream holds both
    return [
        sum(before for _, before, _ in trimmed.tokens) - picture,
        sum(after for *_, after in trimmed.tokens) - picture,
    ]


def _first(place: Place, text: Text) -> Tensor:
    """A mask of the tokens that count: the first ones."""
    return (torch.arange(text[0], device=place.device) < text[1]).long()[None]


def _timestep(place: Place, time: float) -> Tensor:
    return torch.tensor([time], device=place.device)


def _hunyuan_video_15(place: Place, config: Any, grid: Grid, texts: Sequence[Text]) -> dict[str, Any]:
    """Text to video: no picture is given, and no text is to be written in it."""
    text, glyphs, image = texts
    return {
        "hidden_states": place.draw(1, config.in_channels, *grid),
        "timestep": _timestep(place, 500.0),
        "encoder_hidden_states": place.draw(1, text[0], config.text_embed_dim),
        "encoder_attention_mask": _first(place, text),
        "encoder_hidden_states_2": place.draw(1, glyphs[0], config.text_embed_2_dim),
        "encoder_attention_mask_2": _first(place, glyphs),
        "image_embeds": torch.zeros_like(place.draw(1, image[0], config.image_embed_dim)),
    }


def _hunyuan_video(place: Place, config: Any, grid: Grid, texts: Sequence[Text]) -> dict[str, Any]:
    (text,) = texts
    return {
        "hidden_states": place.draw(1, config.in_channels, *grid),
        "timestep": _timestep(place, 500.0),
        "encoder_hidden_states": place.draw(1, text[0], config.text_embed_dim),
        "encoder_attention_mask": _first(place, text),
        "pooled_projections": place.draw(1, config.pooled_projection_dim),
        "guidance": _timestep(place, 6000.0).to(place.dtype),
    }


def _hunyuan_image(place: Place, config: Any, grid: Grid, texts: Sequence[Text]) -> dict[str, Any]:
    text, glyphs = texts
    return {
        "hidden_states": place.draw(1, config.in_channels, *grid),
        "timestep": _timestep(place, 500.0),
        "encoder_hidden_states": place.draw(1, text[0], config.text_embed_dim),
        "encoder_attention_mask": _first(place, text),
        "encoder_hidden_states_2": place.draw(1, glyphs[0], config.text_embed_2_dim),
        "encoder_attention_mask_2": _first(place, glyphs),
    }


def _ideogram(place: Place, config: Any, grid: Grid, texts: Sequence[Text]) -> dict[str, Any]:
    """The branch with the prompt, laid out by its pipeline: padding, text, picture. The other one has no text."""
    ((fed, valid),) = texts
    layout: Any = diffusers.Ideogram4Pipeline._prepare_ids
    positions, segments, indicator = layout([valid], *grid, fed, place.device)
    total = segments.shape[1]
    return {
        "hidden_states": place.draw(1, total, config.in_channels),
        "timestep": _timestep(place, 0.5).to(place.dtype),
        "encoder_hidden_states": place.draw(1, total, config.llm_features_dim),
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": indicator,
    }


_TEMPLATE_END = 5
"""Tokens with which Krea 2's prompts end, behind the padding."""


def _krea(place: Place, config: Any, grid: Grid, texts: Sequence[Text]) -> dict[str, Any]:
    ((fed, valid),) = texts
    counts = _first(place, (fed, valid - _TEMPLATE_END)).bool()
    counts[:, -_TEMPLATE_END:] = True
    layout: Any = diffusers.Krea2Pipeline.prepare_position_ids
    return {
        "hidden_states": place.draw(1, grid[0] * grid[1], config.in_channels),
        "encoder_hidden_states": place.draw(1, fed, config.num_text_layers, config.text_hidden_dim),
        "timestep": _timestep(place, 0.5).to(place.dtype),
        "position_ids": layout(fed, *grid, place.device),
        "encoder_attention_mask": counts,
    }


_REFINER = Blocks(
    "context_embedder.token_refiner.refiner_blocks", "num_refiner_layers", released=2, measured=2, sees_picture=False
)
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
_TINY_HUNYUAN = {**_HEADS, "text_embed_dim": 32}
_DOUBLE = Blocks("transformer_blocks", "num_layers", 20, 2)
_SINGLE = Blocks("single_transformer_blocks", "num_single_layers", 40, 4)

PADDED = {
    "hunyuanvideo15": Padded(
        title="HunyuanVideo 1.5",
        transformer="HunyuanVideo15Transformer3DModel",
        lists=(Blocks("transformer_blocks", "num_layers", 54, 3), _REFINER),
        texts=((1000, 60), (256, 0), (729, 0)),
        grid=(31, 30, 53),
        size="480p, 121 frames",
        small=(1, 30, 53),
        call=_hunyuan_video_15,
        tiny={**_TINY_HUNYUAN, "text_embed_2_dim": 16, "image_embed_dim": 16, "rope_axes_dim": (8, 12, 12)},
        config={},
    ),
    "hunyuanvideo": Padded(
        title="HunyuanVideo",
        transformer="HunyuanVideoTransformer3DModel",
        lists=(_DOUBLE, _SINGLE, _REFINER),
        texts=((256, 60),),
        grid=(16, 68, 120),
        size="544×960, 61 frames",
        small=(1, 48, 80),
        call=_hunyuan_video,
        tiny={**_TINY_HUNYUAN, "pooled_projection_dim": 16, "rope_axes_dim": (8, 12, 12)},
        config={},
        patch=2,
    ),
    "hunyuanimage": Padded(
        title="HunyuanImage 2.1",
        transformer="HunyuanImageTransformer2DModel",
        lists=(_DOUBLE, _SINGLE, _REFINER),
        texts=((1000, 60), (128, 0)),
        grid=(64, 64),
        size="2048²",
        small=(24, 24),
        call=_hunyuan_image,
        tiny={**_TINY_HUNYUAN, "text_embed_2_dim": 16, "rope_axes_dim": (16, 16)},
        config={"text_embed_2_dim": 1472},
    ),
    "ideogram4": Padded(
        title="Ideogram 4, with the prompt",
        transformer="Ideogram4Transformer2DModel",
        lists=(Blocks("layers", "num_layers", 34, 3),),
        texts=((2048, 100),),
        grid=(64, 64),
        size="1024²",
        small=(24, 24),
        call=_ideogram,
        tiny={
            **_HEADS,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": 48,
            "in_channels": 16,
            "mrope_section": (8, 4, 4),
        },
        config={},
        has_text_in_output=True,
    ),
    "krea2": Padded(
        title="Krea 2",
        transformer="Krea2Transformer2DModel",
        lists=(
            Blocks("transformer_blocks", "num_layers", 28, 3),
            Blocks("text_fusion.layerwise_blocks", "num_layerwise_text_blocks", 2, 2, sees_picture=False),
            Blocks("text_fusion.refiner_blocks", "num_refiner_text_blocks", 2, 2, sees_picture=False),
        ),
        texts=((512, 72),),
        grid=(64, 64),
        size="1024²",
        small=(24, 24),
        call=_krea,
        tiny={
            **_HEADS,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "text_hidden_dim": 32,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 48,
            "axes_dims_rope": (8, 12, 12),
        },
        config={},
    ),
}
"""By name; another model is another row."""
