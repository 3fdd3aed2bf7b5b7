"""The stages of a pipeline call, found from its components, and how SGLang-Diffusion names them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from sgl_diffusion_accel.slots import CALL
from sgl_diffusion_accel.targets import find_targets

TEXT, IMAGE, ENCODE, PREPARE = "text encoding", "image encoding", "VAE encoding", "preprocessing"
DENOISING, DECODE, FINISH = "denoising", "decoding", "postprocessing"
CONTROL = "controlnet"

SGLANG_STAGES = {
    PREPARE: "InputValidationStage",
    TEXT: "TextEncodingStage",
    IMAGE: "ImageEncodingStage",
    ENCODE: "ImageVAEEncodingStage",
    DENOISING: "DenoisingStage",
    DECODE: "DecodingStage",
    FINISH: "PostprocessingStage",
}
"""Stage to the name of the stage of SGLang-Diffusion that does the same."""

_PIPELINE_METHODS = {
    "encode_prompt": TEXT,
    "encode_image": IMAGE,
    "encode_video": IMAGE,
}
_PROCESSOR_METHODS = {
    "preprocess": PREPARE,
    "preprocess_video": PREPARE,
    "postprocess": FINISH,
    "postprocess_video": FINISH,
}
_PROCESSORS = ("image_processor", "video_processor", "mask_processor", "control_image_processor", "vae_image_processor")
_PREFIXES = {"text_encoder": TEXT, "image_encoder": IMAGE, "controlnet": CONTROL}


@dataclass(frozen=True)
class Place:
    """Something that a pipeline calls, and the stage that the call belongs to.

    Attributes:
        owner: Whose method is called.
        method: The method.
        stage: The stage, or `CONTROL` for what runs within a denoising step, before the transformer.
        label: What is called, for traces.
    """

    owner: Any
    method: str
    stage: str
    label: str


def find_places(pipe: Any) -> Iterator[Place]:
    """Yields what marks the stages of a pipeline: its own methods, its encoders, its VAE, its processors.

    Raises:
        UnsupportedModelError: The pipeline has no diffusion transformer.
    """
    for method, stage in _PIPELINE_METHODS.items():
        if callable(getattr(type(pipe), method, None)):
            yield Place(pipe, method, stage, method)
    for name in _PROCESSORS:
        processor = getattr(pipe, name, None)
        for method, stage in _PROCESSOR_METHODS.items():
            if not isinstance(processor, nn.Module) and callable(getattr(type(processor), method, None)):
                yield Place(processor, method, stage, f"{name}.{method}")
    transformers = find_targets(pipe).names
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in transformers:
            yield from _places_of(name, part)


def _places_of(name: str, module: nn.Module) -> Iterator[Place]:
    """A VAE's two methods; any other module as a whole, in a stage of its own name if it is of no known kind."""
    if callable(getattr(module, "encode", None)) and callable(getattr(module, "decode", None)):
        yield Place(module, "encode", ENCODE, f"{name}.encode")
        yield Place(module, "decode", DECODE, f"{name}.decode")
        return
    known = (stage for prefix, stage in _PREFIXES.items() if name.startswith(prefix))
    yield Place(module, CALL, next(known, name.replace("_", " ")), name)


def sglang_name(stage: str) -> str:
    """The name of a stage in SGLang-Diffusion's files.

    Example:
        >>> sglang_name("denoising"), sglang_name("prompt enhancer")
        ('DenoisingStage', 'PromptEnhancerStage')
    """
    own = "".join(f"{word[:1].upper()}{word[1:]}" for word in stage.split())
    return SGLANG_STAGES.get(stage, f"{own}Stage")
