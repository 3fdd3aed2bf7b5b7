"""Which components of a pipeline denoise: known by name, checked against all pipelines of the installed diffusers."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import nn

from sgl_diffusion_accel import apply_adaptive_cache
from sgl_diffusion_accel.targets import TRANSFORMERS, expert_of, find_targets

OTHER_DENOISERS = {
    "unet": "a UNet",
    "image_unet": "a UNet",
    "text_unet": "a UNet",
    "super_res_first": "a UNet, of UnCLIP",
    "super_res_last": "a UNet, of UnCLIP",
    "value_function": "a UNet, which guides another one",
    "prior": "denoises an embedding, of Kandinsky, ShapE, UnCLIP and the cascades",
    "prior_prior": "the same, in a combined pipeline",
    "decoder": "a UNet, of UnCLIP and the cascades",
    "diffusion_decoder": "denoises while decoding, by a method that is no loop of the pipeline's (LTX-2)",
    "rvq_depth_decoder": "writes codes one after the other",
    "model": "a language model that denoises text",
}
"""Denoisers that are no diffusion transformers called in the loop of the pipeline, and are left alone."""

NOT_DENOISERS = {
    "adapter": "adds to a UNet",
    "motion_adapter": "adds to a UNet",
    "controlnet": "runs beside the denoiser; what it gives goes into it",
    "audio_token_detokenizer": "audio codes",
    "audio_tokenizer": "audio codes",
    "sound_tokenizer": "audio codes",
    "vae": "decodes",
    "audio_vae": "decodes",
    "movq": "decodes",
    "vqgan": "decodes",
    "vqvae": "decodes",
    "vocoder": "decodes",
    "melgan": "decodes",
    "shap_e_renderer": "decodes",
    "latent_upsampler": "one call after the loop",
    "temporal_latent_upsampler": "one call after the loop",
    "latent_upscaler": "one call before the loop",
    "condition_encoder": "once a run",
    "continuous_encoder": "once a run",
    "notes_encoder": "once a run",
    "connectors": "once a run",
    "duration_embedder": "once a run",
    "duration_head": "once a run",
    "projection_model": "once a run",
    "image_project": "once a run",
    "image_normalizer": "once a run",
    "text_conditioner": "once a run",
    "text_proj": "once a run",
    "learned_classifier_free_sampling_embeddings": "once a run",
    "bert": "a text model",
    "language_model": "a text model",
    "caption_generator": "a text model",
    "pe": "a text model",
    "prompt_enhancer": "a text model",
    "prompt_enhancer_head": "a text model",
    "prompt_upsampler": "a text model",
    "text_decoder": "a text model",
    "qformer": "a text model",
    "vision_language_encoder": "a text model",
    "siglip": "sees pictures",
    "image_embedder": "sees pictures",
    "depth_estimator": "sees pictures",
    "safety_checker": "sees pictures",
    "watermarker": "writes into pictures",
}

ENCODERS = re.compile(r"(^|_)(text|image)_encoder(_\d)?$")
LOOKS_LIKE_A_DENOISER = re.compile(r"(transformer|denoiser|unet|dit|prior|decoder|model)(_\w{1,3})?$")


def import_all_pipelines() -> None:
    for module in pkgutil.walk_packages(diffusers.__path__, "diffusers."):
        if module.name.startswith(("diffusers.pipelines", "diffusers.modular_pipelines")):
            try:
                importlib.import_module(module.name)
            except Exception:  # needs a package that is not installed
                continue


def below(cls: type) -> Iterator[type]:
    for each in cls.__subclasses__():
        yield each
        yield from below(each)


def classes(hint: Any) -> Iterator[type]:
    """The classes in an annotation."""
    if inspect.isclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from classes(part)


def annotated(cls: type) -> Iterator[tuple[str, Any]]:
    """The components of a pipeline class, with their annotations."""
    try:
        hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except Exception:  # names a class of a package that is not installed
        hints = {}
    for parameter in list(inspect.signature(cls).parameters.values()):
        yield parameter.name, hints.get(parameter.name, parameter.annotation)


def expected(cls: type) -> Iterator[tuple[str, Any]]:
    """The components that a block of a modular pipeline expects."""
    try:
        found = [(each.name, each.type_hint) for each in cls().expected_components]
    except Exception:  # an abstract one, or one that needs arguments
        found = []
    yield from found


def components() -> dict[str, dict[str, Any]]:
    """Pipeline or block to its components: name to annotation."""
    import_all_pipelines()
    bases = [(diffusers.DiffusionPipeline, annotated)]
    if hasattr(diffusers, "ModularPipeline"):
        bases.append((diffusers.ModularPipelineBlocks, expected))
    return {
        cls.__name__: dict(listed(cls))
        for base, listed in bases
        for cls in set(below(base))
        if cls.__module__.startswith("diffusers.")
    }


def may_denoise(name: str, hint: Any) -> bool:
    """Whether a component is a module, or could be one by its name where its annotation does not tell."""
    if hint is Any or hint is inspect.Parameter.empty or isinstance(hint, str):
        return LOOKS_LIKE_A_DENOISER.search(name) is not None
    return any(issubclass(each, nn.Module) for each in classes(hint))


def test_each_component_of_diffusers_that_may_denoise_is_known_by_name() -> None:
    found = components()
    assert len(found) > 100
    known = {*TRANSFORMERS, *OTHER_DENOISERS, *NOT_DENOISERS}
    unknown = {
        f"{name} of {pipeline}"
        for pipeline, parts in found.items()
        for name, hint in parts.items()
        if name not in known and not ENCODERS.search(name) and may_denoise(name, hint)
    }
    assert not unknown, f"say in targets.py, or here, what these are: {', '.join(sorted(unknown))}"


def test_pipelines_with_a_transformer_and_another_denoiser_are_known() -> None:
    """Nothing of the other one would be patched."""
    both = {
        pipeline
        for pipeline, parts in components().items()
        if set(parts) & set(TRANSFORMERS) and set(parts) & set(OTHER_DENOISERS)
        if not pipeline.startswith(("LTX25", "MiniMaxMusic3"))
    }
    assert both == set()


class Model(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class Other(nn.Module):
    pass


def pipe(**parts: Any) -> Any:
    return SimpleNamespace(components=parts, **parts)


def test_all_denoisers_are_found_by_name() -> None:
    parts = {name: type(name, (Model,), {})() for name in reversed(TRANSFORMERS)}
    found = find_targets(pipe(vae=Other(), **parts))
    assert [(each.name, each.wrapper) for each in found] == [(name, parts[name]) for name in TRANSFORMERS]


def test_component_of_a_denoiser_s_class_is_one_under_any_name() -> None:
    parts = {"refiner": Model(), "transformer": Model(), "vae": Other()}
    assert find_targets(pipe(**parts)).names == ["transformer", "refiner"]
    with apply_adaptive_cache(parts["transformer"]):
        assert find_targets(pipe(**parts)).names == ["transformer", "refiner"]
    with apply_adaptive_cache(parts["refiner"]):
        assert find_targets(pipe(**parts)).names == ["transformer", "refiner"]


def test_module_under_two_names_is_found_once() -> None:
    model = Model()
    assert find_targets(pipe(transformer=model, transformer_2=model, another=model)).names == ["transformer"]


def test_component_that_was_left_out_is_none() -> None:
    assert find_targets(pipe(transformer=None, transformer_2=Model())).names == ["transformer_2"]


def test_experts_take_over_and_others_run_beside() -> None:
    assert [expert_of(name) for name in TRANSFORMERS] == [
        "transformer",
        "transformer_2",
        "transformer",
        "transformer_ref",
    ]
