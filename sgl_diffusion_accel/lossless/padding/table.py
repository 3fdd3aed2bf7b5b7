"""Which inputs of which model are padding that cannot matter, and how its mask is left out: one row for each class.

A row says what the model's own mask says: a token that is hidden from every attention, and whose own output nobody
reads, may as well not be there. What is no row is left alone, with the reason. `tests/test_lossless_table.py` runs
every row, and finds classes of diffusers with a mask that are in neither table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sgl_diffusion_accel.lossless.padding.marks import ByLengths, ByMask, BySegments, ByZeros, Mark

_BY_MASK = ByMask()


@dataclass(frozen=True)
class Stream:
    """A sequence with padding.

    Attributes:
        mark: Parameter of the transformer's `forward` that tells which tokens count.
        tokens: Parameters that hold the tokens, `[B, L, …]`, and go with them.
        by: How the mark is to be read.
        pads: Where padding may be cut: at the end, at the start, or anywhere, for models to whose text positions mean
            nothing, or are passed along.
        axis: Dimension of the tokens in `tokens`.
        beside: Parameters `[L + M, …]` whose first `L` rows belong to these tokens, the others to the picture.
        may_vanish: Whether the stream may be cut to no token at all.
        is_raw: Whether the model hands its mask to attention as it is: one that is not of `torch.bool` is added to the
            scores there, 1 and 0 alike, and hides nothing.
        least: How many tokens the model needs, of those that are cut at the end.
    """

    mark: str
    tokens: tuple[str, ...]
    by: Mark = _BY_MASK
    pads: Literal["end", "start", "anywhere"] = "end"
    axis: int = 1
    beside: tuple[str, ...] = ()
    may_vanish: bool = False
    is_raw: bool = False
    least: int = 1

    @property
    def cut_names(self) -> tuple[str, ...]:
        """Parameters that lose the tokens."""
        return (*self.tokens, self.mark) if self.by.is_cut else self.tokens


@dataclass(frozen=True)
class InBlocks:
    """Blocks that are handed a mask, whatever the transformer is given.

    Attributes:
        lists: Names of the block lists.
        position: Where the mask is among the block's positional arguments.
        name: Its name among the keyword arguments.
        own: Class of the processors, in the model's module, that make a mask of whatever they are given: they get a
            stand-in for it (`no_mask.py`). Empty where None will do.
        asks_for_places: Whether those ask the device which tokens count: they are told (`known_places.py`), also where
            some are hidden.
    """

    lists: tuple[str, ...]
    position: int
    name: str = "attention_mask"
    own: str = ""
    asks_for_places: bool = False


@dataclass(frozen=True)
class Row:
    """What may be cut of a model's inputs.

    Attributes:
        streams: Its sequences with padding.
        takes_none: Whether a mark may be None where all tokens of its stream count: no mask is made then.
        blocks: The blocks to be given no mask, where the transformer makes one whatever it is given.
        keeps_mask: Whether the mask stays, whatever it hides, since the model's processors need one.
        only_alone: Whether the mask says more than which text tokens count in batches: it may go at batch 1 alone.
        restores: Whether the output has the tokens of the first stream, and gets back those that were cut, as zeros.
        unless: Parameters with which a call is left alone.
        older: Parameters of older versions of the class, in which padding is attended.
        rounds: Whether parts of the model compute in half precision, whatever its type is.
    """

    streams: tuple[Stream, ...]
    takes_none: bool = True
    blocks: InBlocks | None = None
    keeps_mask: bool = False
    only_alone: bool = False
    restores: bool = False
    unless: tuple[str, ...] = ()
    older: tuple[str, ...] = ()
    rounds: bool = False

    @property
    def parameters(self) -> set[str]:
        """The parameters of `forward` that the row names."""
        return {name for each in self.streams for name in (each.mark, *each.tokens, *each.beside)}


_TEXT = Stream("encoder_attention_mask", ("encoder_hidden_states",))
_QWEN_TEXT = Stream("encoder_hidden_states_mask", ("encoder_hidden_states",))
_GLYPHS = Stream("encoder_attention_mask_2", ("encoder_hidden_states_2",), may_vanish=True)
_IMAGE = Stream("image_embeds", ("image_embeds",), ByZeros(), may_vanish=True)
_AUDIO_TEXT = Stream("audio_encoder_attention_mask", ("audio_encoder_hidden_states",))
_BOTH_LISTS = ("transformer_blocks", "single_transformer_blocks")

ROWS: dict[str, Row] = {
    # Text and picture in one attention.
    "HunyuanVideoTransformer3DModel": Row((_TEXT,), takes_none=False, blocks=InBlocks(_BOTH_LISTS, 3)),
    "HunyuanVideoFramepackTransformer3DModel": Row((_TEXT,), takes_none=False, blocks=InBlocks(_BOTH_LISTS, 3)),
    "HunyuanVideo15Transformer3DModel": Row(
        (_TEXT, _GLYPHS, _IMAGE),
        takes_none=False,
        blocks=InBlocks(("transformer_blocks",), 3, own="HunyuanVideo15AttnProcessor2_0"),
    ),
    "HunyuanImageTransformer2DModel": Row((_TEXT, _GLYPHS), takes_none=False, blocks=InBlocks(_BOTH_LISTS, 3)),
    "Ideogram4Transformer2DModel": Row(
        (
            Stream(
                "segment_ids",
                ("hidden_states", "encoder_hidden_states", "position_ids", "indicator"),
                BySegments(),
                pads="start",
            ),
        ),
        takes_none=False,
        blocks=InBlocks(("layers",), 1),
        restores=True,
    ),
    "Krea2Transformer2DModel": Row(
        (
            Stream(
                "encoder_attention_mask",
                ("encoder_hidden_states",),
                pads="anywhere",
                beside=("position_ids",),
                is_raw=True,
            ),
        )
    ),
    "MotifVideoTransformer3DModel": Row((_TEXT,)),
    "PRXTransformer2DModel": Row((Stream("attention_mask", ("encoder_hidden_states",)),)),
    "ErnieImageTransformer2DModel": Row(
        (Stream("text_lens", ("text_bth",), ByLengths()),), takes_none=False, blocks=InBlocks(("layers",), 3)
    ),
    "QwenImageTransformer2DModel": Row((_QWEN_TEXT,), older=("txt_seq_lens",)),
    "NucleusMoEImageTransformer2DModel": Row((_QWEN_TEXT,)),
    "JoyImageEditPlusTransformer3DModel": Row((_QWEN_TEXT,), only_alone=True),
    "Lumina2Transformer2DModel": Row((_TEXT,), takes_none=False),
    "MochiTransformer3DModel": Row(
        (_TEXT,),
        takes_none=False,
        blocks=InBlocks(
            ("transformer_blocks",), 3, "encoder_attention_mask", own="MochiAttnProcessor2_0", asks_for_places=True
        ),
    ),
    "BriaFibo2Transformer2DModel": Row(
        (Stream("encoder_attention_mask", ("encoder_hidden_states",), axis=2, is_raw=True),)
    ),
    # The picture looks at the text.
    "LTXVideoTransformer3DModel": Row((_TEXT,)),
    "LTX2VideoTransformer3DModel": Row((_TEXT, _AUDIO_TEXT)),
    "SanaTransformer2DModel": Row((_TEXT,)),
    "SanaVideoTransformer3DModel": Row((_TEXT,)),
    "SanaWMTransformer3DModel": Row(
        # It squeezes its mask, so that one token alone is an error: the empty prompt has no more than its start.
        (Stream("encoder_attention_mask", ("encoder_hidden_states",), axis=2, least=2),),
        takes_none=False,
        blocks=InBlocks(("blocks",), 3, "mask"),
        unless=("mask",),
        rounds=True,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Row((_TEXT,)),
    "PixArtTransformer2DModel": Row((_TEXT,)),
    "AllegroTransformer3DModel": Row((_TEXT,)),
    "DreamLiteTransformer2DModel": Row((_TEXT,)),
    "Transformer2DModel": Row((_TEXT,)),
    "LuminaNextDiT2DModel": Row(
        (Stream("encoder_mask", ("encoder_hidden_states",)),), takes_none=False, keeps_mask=True
    ),
    "Kandinsky6Transformer3DModel": Row((replace(_TEXT, is_raw=True),)),
}
"""Class of the transformer to its row."""
