"""What cannot be learned from a model: block lists beside the denoising stack, and odd wirings."""

from __future__ import annotations

from dataclasses import dataclass

AUXILIARY_LISTS = frozenset(
    {
        "context_refiner",
        "noise_refiner",
        "siglip_refiner",
        "refiner_blocks",
        "text_transformer_blocks",
        "video_text_transformer_blocks",
        "audio_text_transformer_blocks",
        "txt_mode_blocks",
        "vace_blocks",
        "face_adapter",
        "perceiver_cross_attention",
        "caption_projection",
    }
)
"""Lists beside the stack: short refiners, text encoders, adapters. They run at every step."""

HIDDEN_NAMES = ("hidden_states", "hidden", "x", "visual_embed", "gen_seq", "img")
"""Parameter names under which blocks take the stream that becomes the picture."""

STREAM_NAMES = (*HIDDEN_NAMES, "encoder_hidden_states", "context", "und_seq", "audio_hidden_states", "txt")
"""Parameter names of streams that blocks carry on, for blocks whose wiring cannot be seen from the calls."""


@dataclass(frozen=True)
class OddModel:
    """A model that needs a word of its own.

    Attributes:
        refuse: Why it cannot be cached, or None.
        only_with: Setting of the model's config without which it can be cached after all.
        max_bn: Largest number of last blocks that may be computed on their own, or None.
    """

    refuse: str | None = None
    only_with: str | None = None
    max_bn: int | None = None


ODD_MODELS = {
    "LatteTransformer3DModel": OddModel(
        refuse="its spatial and temporal block lists are interleaved and reshaped in between"
    ),
    "MotifVideoTransformer3DModel": OddModel(
        refuse="the last blocks of its second list work on other streams than the first ones",
        only_with="num_decoder_layers",
    ),
    "HunyuanDiT2DModel": OddModel(max_bn=0),  # its last blocks take skip connections from its first ones
}
