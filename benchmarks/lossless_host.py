"""Measures what `apply_lossless` costs the host in a call: on models whose blocks do next to nothing.

Tiny tensors, as many blocks as the released model has, and both sides in turn on one model: the difference is what the
patch does. Where it also finds the place of a call in its run, a whole pipeline runs. Part of `benchmarks.padding`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from sgl_diffusion_accel import apply_lossless, branch, denoising_steps
from sgl_diffusion_accel.lossless.constants.constant_table import ONCE_A_RUN

from .constants import ROWS
from .gpu.models import MODELS, Place, build
from .gpu.padded import PADDED, build_padded
from .turns import StepClock, Times, quartiles, take_turns

CALLS = 300
"""Of a transformer in a round; pipelines have fewer."""

STEPS = 100
_PLACE = Place(torch.device("cpu"), torch.float32, tiny=True)
_PROMPT, _LONGEST = 9, 24


@dataclass(frozen=True)
class Case:
    """Something to be called.

    Attributes:
        target: A pipeline or a transformer.
        calls: How many calls of a transformer are timed.
        run: Makes them, and gives their wall and CPU seconds.
    """

    target: Any
    calls: int
    run: Callable[[], Times]


def measure_all(rounds: int) -> dict[str, dict[str, Any]]:
    """Microseconds that a call takes longer under the patch, by the case.

    Args:
        rounds: Of both sides; the first is warm-up.
    """
    return {name: measure(make(), rounds) for name, make in CASES.items()}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One case: the difference of CPU time for each call, and how many calls of each side were timed."""
    sides = {"plain": partial(_seconds, case, nullcontext), "patched": partial(_seconds, case, apply_lossless)}
    taken = take_turns(sides, rounds)
    both = list(zip(taken["plain"], taken["patched"], strict=True))
    return {
        "us": quartiles((patched - plain) / case.calls * 1e6 for (_, plain), (_, patched) in both),
        "plain_us": quartiles(plain / case.calls * 1e6 for (_, plain), _ in both),
    }


def _seconds(case: Case, apply: Callable[[Any], Any]) -> Times:
    with apply(case.target):
        return case.run()


def make_idle(transformer: Any, lists: Iterable[str], parts: Iterable[str] = ()) -> None:
    """Leaves of a transformer the calls of its blocks, and of parts that it is told, which hand on what they get.

    Args:
        transformer: The model.
        lists: Names of its lists of blocks.
        parts: Names of other parts that are called.
    """
    blocks: list[Any] = [block for path in lists for block in transformer.get_submodule(path)]
    others: list[Any] = [transformer.get_submodule(part) for part in parts]
    for each in (*blocks, *others):
        each.forward = _hand_on

    def forward(hidden_states: Tensor, *_: Any, **given: Any) -> tuple[Tensor]:
        for other in others:
            other(given["encoder_hidden_states"])
        mask = given.get("encoder_attention_mask")
        for block in blocks:
            block(hidden_states, mask, mask, mask)  # where blocks of any kind are handed it
        return (hidden_states,)

    transformer.forward = forward


def _hand_on(hidden_states: Tensor, *_: Any) -> Tensor:
    return hidden_states


def _calls(transformer: Any, given: Mapping[str, Any]) -> Case:
    """Calls of a transformer outside of a loop."""

    def run() -> Times:
        with torch.no_grad():
            transformer(**given)  # reads the masks
            wall, cpu = time.perf_counter(), time.thread_time()
            for _ in range(CALLS):
                transformer(**given)
            return time.perf_counter() - wall, time.thread_time() - cpu

    return Case(transformer, CALLS, run)


def _steps(pipe: Any, given: Mapping[str, Any], calls: int) -> Case:
    """Steps of a pipeline, each with so many calls."""
    pipe.set_progress_bar_config(disable=True)

    def run() -> Times:
        clock = StepClock()
        pipe(**{**given, "num_inference_steps": STEPS, "output_type": "latent", "callback_on_step_end": clock})
        return clock.step_seconds()

    return Case(pipe, calls, run)


def _without_mask(name: str, **depth: int) -> Case:
    """A model that is given no mask."""
    transformer = build(MODELS[name], _PLACE, **depth).pipe.transformer
    make_idle(
        transformer,
        [name for name in ("transformer_blocks", "single_transformer_blocks") if hasattr(transformer, name)],
    )
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    return _calls(transformer, {name: _PLACE.draw(1, 8, 16) for name in names})


def _padded(name: str, is_full: bool = False) -> Case:
    """A model as deep as the released one: its padding is cut, or it has none and loses its mask."""
    model = PADDED[name]
    built = build_padded(model, _PLACE, depth=lambda each: each.released)
    make_idle(built.transformer, [each.path for each in model.lists if each.sees_picture])
    if is_full:
        built.given["encoder_attention_mask"].fill_(1)
    return _calls(built.transformer, built.given)


def _ideogram() -> Case:
    """Its pipeline: both branches are placed in the run, and the projection of the prompt is kept."""
    model = PADDED["ideogram4"]
    both: list[Any] = [build_padded(model, _PLACE, depth=lambda _: 1).transformer for _ in range(2)]
    for transformer in both:
        make_idle(transformer, ["layers"], ["llm_cond_proj"])
    pipe: Any = diffusers.Ideogram4Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=both[0], unconditional_transformer=both[1],
    )  # fmt: skip
    layout, width = pipe._prepare_ids, both[0].config.llm_features_dim

    def encode_prompt(prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> Any:
        """In the place of the text encoder, which the pipeline has no argument to go without."""
        del prompt
        ids = layout([_PROMPT], grid_h, grid_w, max_sequence_length, device)
        return _PLACE.draw(1, ids[1].shape[1], width), *ids

    pipe.encode_prompt = encode_prompt
    given = {
        "prompt": "", "height": 64, "width": 64, "max_sequence_length": _LONGEST, "guidance_scale": 4.0,
        "guidance_schedule": None,
    }  # fmt: skip
    return _steps(pipe, given, calls=2)


def _wan22() -> Case:
    """Wan2.2's second expert, with a guidance that leaves nothing out: its calls are placed in the run."""
    built = [build(MODELS["wan"], _PLACE, num_layers=1) for _ in range(2)]
    for each in built:
        make_idle(each.pipe.transformer, ["blocks"])
    pipe = diffusers.WanPipeline(
        transformer=built[0].pipe.transformer, transformer_2=built[1].pipe.transformer, boundary_ratio=0.999,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
    )  # fmt: skip
    given = {name: value for name, value in built[0].call.items() if name != "guidance_scale"}
    return _steps(pipe, given | {"guidance_scale": 4.0, "guidance_scale_2": 3.0}, calls=2)


def _kept(name: str) -> Case:
    """Calls of a loop whose blocks do no more than make keys and values of a tiny text, which the patch keeps.

    What the host spares by layers that it does not call is in the difference, and outweighs what the patch takes.
    """
    model = ROWS[name].model
    built = build_padded(model, _PLACE, depth=lambda each: each.released)
    transformer: Any = built.transformer
    parts = ONCE_A_RUN[model.transformer].parts
    blocks: Any = transformer.get_submodule(ONCE_A_RUN[model.transformer].blocks)
    layers = {part.part: [block.get_submodule(layer) for block in blocks for layer in part.layers] for part in parts}
    given = {
        name: value[:, :2] if name in {part.of[0] for part in parts} else value
        for name, value in built.given.items()
        if name != "timestep" and not name.endswith("mask")
    }

    def forward(hidden_states: Tensor, **given: Any) -> tuple[Tensor]:
        texts = dict(given)
        for part in parts:
            text = texts[part.of[0]] = transformer.get_submodule(part.part)(texts[part.of[0]])
            for layer in layers[part.part]:
                layer(text)
        return (hidden_states,)

    transformer.forward = forward

    def run() -> Times:
        clock = StepClock()
        with torch.no_grad():
            for timestep in denoising_steps(torch.linspace(999, 1, STEPS)):
                with branch("cond"):
                    transformer(**given, timestep=timestep[None])
                clock(None, 0, None, {})
        return clock.step_seconds()

    return Case(transformer, 1, run)


CASES: dict[str, Callable[[], Case]] = {
    "FLUX.1, a class without a row": partial(_without_mask, "flux", num_layers=19, num_single_layers=38),
    "Qwen-Image, no mask given": partial(_without_mask, "qwen", num_layers=60),
    "HunyuanVideo, no padding, 60 masks taken away": partial(_padded, "hunyuanvideo", is_full=True),
    **{f"{model.title}, cut": partial(_padded, name) for name, model in PADDED.items()},
    "Ideogram 4, a pipeline": _ideogram,
    "Wan2.2, second expert, a pipeline": _wan22,
    "LTX-2.0, 192 layers of the text not called": partial(_kept, "ltx2"),
    "Sana, 40 layers of the text not called": partial(_kept, "sana"),
}
"""What is measured, by how it is called in tables."""
