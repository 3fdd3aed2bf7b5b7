"""Pictures by other transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from classes.base import TEXT
from pipelines.base import Case, left_half, model, photo, picture, pipeline, values, words
from pipelines.vaes import wan_vae
from zoo.base import flow_euler, tiny_vae

PICTURE, MASK = picture(), left_half()
PHOTO = photo()


def case(
    name: str,
    kind: str,
    call: dict[str, Any],
    label: str = "",
    scheduler: Callable[[], Any] = flow_euler,
    prepare: Callable[[Any], Any] = lambda pipe: pipe,
    parts: Callable[[], dict[str, Any]] = dict,
    needs: tuple[str, ...] = (),
    near: float = 0.5,
    **changes: Any,
) -> Case:
    """A class that runs the transformer of a class.

    Args:
        name: Of the pipeline.
        kind: Of the transformer.
        call: Arguments of a run.
        label: What sets it apart.
        scheduler: Makes the scheduler.
        prepare: What is done to the pipeline.
        parts: Makes further components.
        needs: Their classes.
        near: How far off its output may be when calls are skipped.
        **changes: Of the transformer's configuration.
    """

    def make() -> Any:
        given = {"transformer": model(kind, **changes), "scheduler": scheduler(), **parts()}
        return prepare(pipeline(name, **given))

    return Case(name, make, lambda: call, label, (kind, *needs), near=near)


def multistep() -> Any:
    return diffusers.DPMSolverMultistepScheduler()


def ddim() -> Any:
    return diffusers.DDIMScheduler(prediction_type="v_prediction")


def encodes(*outputs: Any, name: str = "encode_prompt") -> Callable[[Any], Any]:
    """Has a pipeline's text encoder answered for: these pipelines take no embeddings, or not all of them."""

    def prepare(pipe: Any) -> Any:
        setattr(pipe, name, lambda *_, **__: outputs[0] if len(outputs) == 1 else outputs)
        return pipe

    return prepare


def pair(width: int, count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return values(1, count, width, key="prompt"), values(1, count, width, key="negative")


MASKED = words(TEXT, mask="prompt_attention_mask")
NARROW = words(12, mask="prompt_attention_mask")
MASK_OF = "prompt_embeds_mask"
ONES = torch.ones(1, 7, dtype=torch.long)
PIXART = {**NARROW, "negative_prompt": None, "use_resolution_binning": False}
DIT = {
    **words(8, mask="prompt_attention_mask", count=4),
    **{f"{each}prompt_embeds_2": values(1, 4, 8, key=f"{each}2") for each in ("", "negative_")},
    **{f"{each}prompt_attention_mask_2": torch.ones(1, 4, dtype=torch.long) for each in ("", "negative_")},
    "use_resolution_binning": False,
    "target_size": (64, 64),
}


def ddpm() -> Any:
    return diffusers.DDPMScheduler()


def vae() -> dict[str, Any]:
    return {"vae": tiny_vae(4, 0)}


def _fibo() -> Any:
    prompt, negative = pair(TEXT)
    layers = [[torch.full((1, 7, 12), sign * (i + 1)) for i in range(4)] for sign in (0.1, -0.1)]
    return encodes(prompt, negative, torch.zeros(1, 7, 3), ONES, ONES, *layers)


def having(**attributes: Any) -> Callable[[Any], Any]:
    """Has a pipeline count in smaller pictures."""

    def prepare(pipe: Any) -> Any:
        vars(pipe).update(attributes)
        return pipe

    return prepare


def _joy(pipe: Any) -> Any:
    pipe.vae_image_processor.get_default_height_width = lambda *_: (64, 64)
    return pipe


class _Processor:
    """Answers what pipelines ask their processor when they are made."""

    tokenizer = None
    image_token = "<image>"

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return [0]


def _qwen21(pipe: Any) -> Any:
    def encode(prompt: Any = None, **_: Any) -> Any:
        return values(1, 7, TEXT, key=str(prompt)), None, torch.zeros(1, 7, dtype=torch.bool)

    pipe.encode_prompt = encode
    return pipe


HIDREAM = {
    f"{prefix}{name}": values(*shape, key=f"{prefix}{name}")
    for prefix in ("", "negative_")
    for name, shape in {
        "prompt_embeds_t5": (1, 7, 8),
        "prompt_embeds_llama3": (2, 1, 7, 4),
        "pooled_prompt_embeds": (1, 8),
    }.items()
}

CASES = (
    case("AuraFlowPipeline", "AuraFlowTransformer2DModel", MASKED),
    case(
        "CogView3PlusPipeline",
        "CogView3PlusTransformer2DModel",
        {**words(TEXT), "original_size": (64, 64)},
        scheduler=lambda: diffusers.CogVideoXDDIMScheduler(),
    ),
    case("CogView4Pipeline", "CogView4Transformer2DModel", words(TEXT), scheduler=lambda: flow_euler(True)),
    case(
        "CogView4ControlPipeline",
        "CogView4Transformer2DModel",
        {**words(TEXT), "control_image": PICTURE},
        scheduler=lambda: flow_euler(True),
        parts=vae,
        in_channels=8,
    ),
    case("DiTPipeline", "DiTTransformer2DModel", {"class_labels": [7], "output_type": "np"}, scheduler=ddim, parts=vae),
    case("PixArtAlphaPipeline", "PixArtTransformer2DModel", PIXART, scheduler=multistep),
    case("PixArtSigmaPipeline", "PixArtTransformer2DModel", PIXART, scheduler=multistep),
    case(
        "PixArtSigmaPAGPipeline",
        "PixArtTransformer2DModel",
        PIXART,
        scheduler=multistep,
        parts=lambda: {"pag_applied_layers": ["blocks.1"]},
    ),
    case("HunyuanDiTPipeline", "HunyuanDiT2DModel", DIT, scheduler=ddpm),
    case(
        "HunyuanDiTPAGPipeline",
        "HunyuanDiT2DModel",
        {**DIT, "guidance_scale": 1.5, "pag_scale": 0.5},
        scheduler=ddpm,
        parts=lambda: {"pag_applied_layers": ["blocks.1"]},
    ),
    case("LuminaPipeline", "LuminaNextDiT2DModel", NARROW, learn_sigma=True),
    case("PRXPipeline", "PRXTransformer2DModel", {**NARROW, "use_resolution_binning": False}, parts=vae),
    case("BriaPipeline", "BriaTransformer2DModel", words(TEXT), scheduler=ddim, parts=vae),
    case("BriaFiboPipeline", "BriaFiboTransformer2DModel", {"prompt": "a cat"}, prepare=_fibo()),
    case(
        "BriaFibo2Pipeline",
        "BriaFibo2Transformer2DModel",
        {
            **{f"{each}prompt_embeds": values(1, 2, 12, 12, key=each) for each in ("", "negative_")},
            **{f"{each}prompt_embeds_mask": torch.ones(1, 12, dtype=torch.bool) for each in ("", "negative_")},
        },
    ),
    case(
        "BriaFiboEditPipeline",
        "BriaFiboTransformer2DModel",
        {"prompt": '{"edit_instruction": "bluer"}', "image": PHOTO, "_auto_resize": False},
        prepare=_fibo(),
        parts=lambda: {"vae": wan_vae(4)},
    ),
    case("HiDreamImagePipeline", "HiDreamImageTransformer2DModel", HIDREAM, prepare=having(default_sample_size=8)),
    case(
        "ErnieImagePipeline",
        "ErnieImageTransformer2DModel",
        {f"{each}prompt_embeds": [values(7, 12, key=each)] for each in ("", "negative_")},
    ),
    case(
        "Krea2Pipeline",
        "Krea2Transformer2DModel",
        {
            **{f"{each}prompt_embeds": values(1, 7, 3, 16, key=each) for each in ("", "negative_")},
            **{f"{each}prompt_embeds_mask": ONES.bool() for each in ("", "negative_")},
            "guidance_scale": 1.5,
        },
        scheduler=lambda: flow_euler(True),
        near=1.0,
    ),
    case(
        "NucleusMoEImagePipeline",
        "NucleusMoEImageTransformer2DModel",
        words(16, mask=MASK_OF),
        scheduler=lambda: flow_euler(True),
        parts=lambda: {"processor": _Processor()},
    ),
    case("JoyImageEditPipeline", "JoyImageEditTransformer3DModel", words(TEXT, mask=MASK_OF), prepare=_joy),
    case(
        "GlmImagePipeline",
        "GlmImageTransformer2DModel",
        {**words(TEXT), "prior_token_ids": torch.arange(16)[None]},
        parts=vae,
    ),
    case(
        "QwenImage21Pipeline",
        "QwenImage21Transformer2DModel",
        {"prompt": "a cat", "negative_prompt": "a dog", "true_cfg_scale": 4.0},
        scheduler=lambda: flow_euler(True),
        parts=lambda: {"processor": _Processor()},
        prepare=_qwen21,
    ),
    case(
        "QwenImage21Pipeline",
        "QwenImage21Transformer2DModel",
        {"prompt": "a cat", "negative_prompt": "a dog", "true_cfg_scale": 4.0, "use_kv_cache": False},
        "without a store of keys and values",
        scheduler=lambda: flow_euler(True),
        parts=lambda: {"processor": _Processor()},
        prepare=_qwen21,
    ),
    case(
        "PRXPixelPipeline",
        "PRXTransformer2DModel",
        {**NARROW, "use_resolution_binning": False, "height": 16, "width": 16, "output_type": "pt"},
        in_channels=3,
    ),
)
