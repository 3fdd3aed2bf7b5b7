"""What the examples share: their options, what a model and its call are, how the result is saved."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils import export_to_video
from PIL import Image

from miniatures import call_kwargs, load_miniature, to_frames
from sgl_diffusion_accel import apply_auto, compare


class Job(NamedTuple):
    """A pipeline and how it is called.

    Attributes:
        pipe: The pipeline.
        call: Keyword arguments of `pipe(...)`.
        decode: For the small models, which have no VAE: turns the output into pixels `[B, F, H, W, 3]` in [0, 1].
    """

    pipe: Any
    call: dict[str, Any]
    decode: Callable[[Any], Any] | None = None


def parser(description: str | None, *, small: str, output: str) -> argparse.ArgumentParser:
    """The options that all examples have.

    Args:
        description: The example's docstring; its first line is shown by `--help`.
        small: Name of the option that takes a small model instead, "miniature" or "tiny".
        output: File to write, in the folder `out`.
    """
    options = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    options.add_argument("--prompt", help="what to show")
    options.add_argument("--steps", type=int, help="denoising steps; the model's usual number if left out")
    options.add_argument("--quality", default="balanced", choices=["lossless", "high", "balanced", "fast"])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=Path("out") / output)
    options.add_argument("--compare", action="store_true", help="also measure it against unpatched runs (several runs)")
    what = {"miniature": "a small trained model of the same class", "tiny": "a tiny model with random weights"}[small]
    options.add_argument(f"--{small}", dest="small", action="store_true", help=f"take {what}: on a CPU, in seconds")
    return options


def miniature(name: str, given: argparse.Namespace, *, caption: str, steps: int) -> Job:
    """A small trained model (see `miniatures/README.md`), called as its large ones are but for the prompt.

    Args:
        name: "wan", "qwen", "emoji" or "flux".
        given: The options.
        caption: What to show if no prompt is given: it knows some words alone.
        steps: The model's usual number of steps.
    """
    torch.set_num_threads(1)  # models as small as this lose time to a second thread
    call = call_kwargs(name, given.prompt or caption, seed=given.seed, steps=given.steps or steps)
    return Job(load_miniature(name), call, partial(to_frames, name))


def show_comparison(
    given: argparse.Namespace, pipe: Any, call: dict[str, Any], decode: Callable[[Any], Any] | None = None
) -> None:
    """Runs a call unpatched, patched, and unpatched with as few steps as the patch computes; prints and saves it.

    Args:
        given: The options.
        pipe: The pipeline, unpatched.
        call: Keyword arguments of `pipe(...)`.
        decode: That of the `Job`.
    """
    variants = {"apply_auto": lambda pipe: apply_auto(pipe, quality=given.quality)}
    report = compare(pipe, variants, [call | {"seed": given.seed}], decode=decode)
    print(report)
    report.save(given.output.with_suffix(".json"))


def save(output: Any, path: Path, decode: Callable[[Any], Any] | None = None, fps: int = 16) -> None:
    """Writes a picture, or a clip as MP4. Of the small models: an enlarged picture, or a clip as GIF.

    Args:
        output: What the pipeline returned.
        path: File to write; its folder is made.
        decode: That of the `Job`.
        fps: Frames in a second of a clip.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if decode is not None:
        path = _save_pixels(decode(output)[0], path)
    elif hasattr(output, "images"):
        output.images[0].save(path)
    else:
        export_to_video(output.frames[0], str(path), fps=fps)
    print(f"saved {path}")


def _save_pixels(frames: Sequence[Any], path: Path, side: int = 256) -> Path:
    pictures = [Image.fromarray((frame * 255).round().astype("uint8")) for frame in frames]
    wide, high = pictures[0].size
    scale = max(1, side // wide)
    pictures = [picture.resize((wide * scale, high * scale), Image.Resampling.NEAREST) for picture in pictures]
    if len(pictures) == 1:
        pictures[0].save(path)
        return path
    path = path.with_suffix(".gif")
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=300, loop=0)
    return path
