"""The parts of the measurement; each builds its model, reports row by row, and gives the memory back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import attention
from sgl_diffusion_accel import set_attention_backend

from . import caches, compiling
from .models import MODELS, Built, Place, build, release
from .padding import padding
from .rows import Row, never_skipping, peer, skipping, unpatched
from .store import PartLog
from .timing import DeviceTimes, relative_difference, run

_BACKENDS = ("sdpa", "cudnn", "sdpa_flash", "flash4", "sage", "xformers", "auto")
_TINY_SHAPE = (1, 2, 64, 32)


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        about: What it measures, for the help.
        seconds: What it takes on an H100, roughly; it is not begun with less time left.
        measure: Measures it at a place.
    """

    about: str
    seconds: float
    measure: Callable[[PartLog, Place], None]


@contextmanager
def held(log: PartLog, name: str, place: Place, **config: Any) -> Iterator[Built]:
    """A model, warmed up with one short run, whose memory is given back at the end."""
    built = build(MODELS[name], place, **config)
    try:
        log.about(**built.about)
        run(built, place, 2, DeviceTimes(place.device))
        yield built
    finally:
        release(built)


def step_times(name: str, log: PartLog, place: Place) -> None:
    """Computed and skipped steps of one model with every cache, beside the unpatched model and cache-dit."""
    with held(log, name, place) as built:
        reference = run(built, place, caches.NEVER_STEPS, DeviceTimes(place.device)).output
        log.row("unpatched", lambda: unpatched(built, place, reference))
        for title, apply in caches.NEVER.items():
            log.row(f"never skipping: {title}", partial(never_skipping, built, place, apply, reference))
        for title, apply in caches.SKIPPING.items():
            log.row(title, partial(skipping, built, place, apply))
        if name in _PLANNED:
            log.row("plan at 2x", lambda: skipping(built, place, caches.plan(built)))
        log.row("unpatched again", lambda: unpatched(built, place, reference, host=False))
        for title, enable in caches.peers().items():
            log.row(title, partial(peer, built, place, enable))


def attention_kernels(log: PartLog, place: Place) -> None:
    """Every attention backend at the shapes of real models, beside a matrix product."""
    peak = attention.matmul_peak(place.device, place.dtype, 256 if place.tiny else 8192)
    log.about(title="attention kernels", peak_tflops=peak, dtype=str(place.dtype).removeprefix("torch."))
    shapes = {"tiny": _TINY_SHAPE} if place.tiny else attention.SHAPES
    for name, shape in shapes.items():
        log.row(name, partial(_kernels, shape, peak, place))


def _kernels(shape: tuple[int, int, int, int], peak: float, place: Place) -> Row:
    return {"shape": list(shape), "backends": attention.kernels(shape, peak, place.device, place.dtype)}


def attention_in_model(name: str, log: PartLog, place: Place) -> None:
    """Steps of a whole model under each attention backend."""
    with held(log, name, place) as built:
        reference = run(built, place, caches.NEVER_STEPS, DeviceTimes(place.device)).output
        log.row("unpatched", lambda: unpatched(built, place, reference, host=False))
        for backend in _BACKENDS:
            log.row(backend, partial(_with_backend, built, place, backend, reference))


def _with_backend(built: Built, place: Place, backend: str, reference: torch.Tensor) -> Row:
    with set_attention_backend(built.pipe, backend):
        run(built, place, 2, DeviceTimes(place.device))  # what is compiled or timed at the first call
        row = unpatched(built, place, reference, host=False)
        output = run(built, place, caches.NEVER_STEPS, DeviceTimes(place.device)).output
    return row | {"relative_difference": relative_difference(output, reference)}


def regional_compile(log: PartLog, place: Place) -> None:
    """Blocks compiled one by one, `compile_repeated_blocks`, with and without caches."""
    with held(log, "flux", place) as built:
        compiling.regional(log, built, place)


def regional_graphs(log: PartLog, place: Place) -> None:
    """The same with CUDA graphs, `mode="reduce-overhead"`, and caches of blocks."""
    with held(log, "flux", place) as built:
        compiling.regional(log, built, place, mode="reduce-overhead")


def whole_graphs(log: PartLog, place: Place) -> None:
    """The whole transformer as CUDA graphs, `mode="reduce-overhead"`, and the adaptive cache; FLUX cut to 4 + 8."""
    shallow = {} if place.tiny else {"num_layers": 4, "num_single_layers": 8}
    with held(log, "flux", place, **shallow) as built:
        compiling.whole(log, built, place, mode="reduce-overhead")


_PLANNED = ("flux", "qwen")
"""Models whose calls are short enough for calibration."""

PARTS = {
    "flux": Part("FLUX.1-dev, 1024²: every cache", 35, partial(step_times, "flux")),
    "qwen": Part("Qwen-Image, 1024², true CFG: every cache", 60, partial(step_times, "qwen")),
    "wan": Part("Wan2.1 1.3B, 480p, 81 frames, CFG: every cache", 150, partial(step_times, "wan")),
    "attention": Part("attention kernels at real shapes", 60, attention_kernels),
    "attention_flux": Part("FLUX.1-dev under each attention backend", 30, partial(attention_in_model, "flux")),
    "padding": Part("a few blocks of five models with padded prompts: apply_lossless", 60, padding),
    "compile": Part("FLUX.1-dev, compile_repeated_blocks", 60, regional_compile),
    "graphs": Part("FLUX.1-dev, compile_repeated_blocks with CUDA graphs", 60, regional_graphs),
    "graphs_whole": Part("FLUX.1-dev cut to 12 blocks, CUDA graphs of the whole", 60, whole_graphs),
    "hunyuanvideo": Part("HunyuanVideo, 6 of 60 blocks: every cache", 50, partial(step_times, "hunyuanvideo")),
    "wan_14b": Part("Wan2.1 14B, 3 of 40 blocks: every cache", 60, partial(step_times, "wan_14b")),
}
"""By name, in the order in which they run: what matters most comes first."""
