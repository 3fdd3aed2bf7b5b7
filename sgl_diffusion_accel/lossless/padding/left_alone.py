"""Models of which nothing is cut, and why."""

from __future__ import annotations

import inspect
import re
from typing import Any

_ATTENDED = "takes no mask: whatever it is given is attended, its padding as well, as in its training"
_UNKNOWN = "it has a mask, and nothing is known of what that hides. Its padding is computed"

_MARK = re.compile(r"mask|_lens$|^segment_ids$|^indicator$")
"""Parameters that may tell padding."""

LEFT_ALONE: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "its mask makes attention causal, and hides no padding",
    "ChromaTransformer2DModel": "its mask is of ones and zeros and is added to the scores, so that padding is attended",
    "CogView4Transformer2DModel": "its pipelines pass no mask: padding is attended",
    "CosmosTransformer3DModel": "its pipelines pass no mask of the text: padding is attended",
    "GlmImageTransformer2DModel": "its pipelines pass no mask: padding is attended",
    "HiDreamImageTransformer2DModel": "its mask is of pictures of several sizes; padding of the text is attended",
    "HunyuanDiT2DModel": "padding is attended, as a learned embedding",
    "LatteTransformer3DModel": "its pipeline passes no mask: padding is attended, or cut already",
    "LongCatAudioDiTTransformer": "a norm over all tokens of the text counts the padding as well",
    "OmniGenTransformer2DModel": "its mask is causal in the text and made for each pair of tokens",
    "PriorTransformer": "its mask is added to a causal one, and hides no padding of pictures",
    "QwenImage21Transformer2DModel": "its attention is causal in blocks of text and pictures, and its mask is of keys",
    "RFD4ProteinaTransformer": "its mask is of atoms: it denoises no pictures",
    "StableAudio3DiTModel": "padding is attended, as a learned embedding",
    "StableAudioDiTModel": "its pipeline passes no mask: padding is attended, as zeros",
    "T5FilmDecoder": "its masks are of music that was played before",
    "ZImageTransformer2DModel": "it cuts padding itself, to classes of 32 tokens that it attends",
}
"""Class with a parameter that may tell padding to why nothing is cut."""


def marks_of(cls: Any) -> list[str]:
    """The parameters of a class's `forward` that may tell which tokens are padding."""
    return [name for name in inspect.signature(cls.forward).parameters if _MARK.search(name)]


def why_left_alone(cls: Any) -> str:
    """Why nothing is cut of a class that has no row."""
    if cls.__name__ in LEFT_ALONE:
        return LEFT_ALONE[cls.__name__]
    return _UNKNOWN if marks_of(cls) else _ATTENDED
