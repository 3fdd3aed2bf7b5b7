"""`check_pipeline`: what each patch can do on a pipeline, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from sgl_diffusion_accel.auto.checking.cache_memory import CallShape
from sgl_diffusion_accel.auto.checking.cache_verdicts import Subject
from sgl_diffusion_accel.auto.checking.configured import configured
from sgl_diffusion_accel.auto.checking.found_denoisers import denoiser_of
from sgl_diffusion_accel.auto.checking.found_loop import loop_of
from sgl_diffusion_accel.auto.checking.found_scheduler import scheduler_of
from sgl_diffusion_accel.auto.checking.pipeline_report import PipelineReport
from sgl_diffusion_accel.auto.checking.verdicts import verdicts
from sgl_diffusion_accel.slots import original_class
from sgl_diffusion_accel.targets import Pipe, find_targets
from sgl_diffusion_accel.validate import names_checked


@names_checked
def check_pipeline(pipe: Pipe, latents: Sequence[int] | None = None) -> PipelineReport:
    """Tells what each patch of this library can do on a pipeline, and why not more.

    Nothing is run, and nothing is changed: models are looked at, the pipeline's source is read, and a copy of its
    scheduler is tried on numbers. What only a call tells (masks, blocks that are called out of order) is checked when
    it comes.

    Args:
        pipe: A diffusers pipeline with a diffusion transformer, or the transformer itself.
        latents: Shape of what the transformer is called with, `[B, C, (F,) H, W]` or `[B, T, C]`, to tell what caches
            will hold while a run lasts, text tokens left out.

    Returns:
        The report: `print(report)` shows it, `report.to_json()` has all of it.

    Raises:
        ConfigError: `latents` is no such shape.
        ConfigTypeError: `pipe` is no pipeline, or `latents` no list of whole numbers.
        UnsupportedModelError: It has no diffusion transformer.

    Example:
        >>> report = check_pipeline(pipe)
        >>> report.verdict("adaptive").answer
        'yes'
    """
    targets = find_targets(pipe)
    loop, scheduler = loop_of(targets), scheduler_of(pipe)
    shape = None if latents is None else CallShape(latents, max(len(loop.branches), 1 + loop.is_batched))
    return PipelineReport(
        pipeline=original_class(pipe).__name__,
        denoisers=tuple(denoiser_of(pipe, target) for target in targets),
        loop=loop,
        scheduler=scheduler,
        patches=verdicts(Subject(targets, loop, scheduler, shape)),
    )


def check(model: str, json: bool = False) -> str:
    """What `python -m sgl_diffusion_accel check` shows.

    Args:
        model: A folder, the name of a class of diffusers, or of a model in the local cache of the Hugging Face Hub.
        json: Whether it is to be JSON.
    """
    report = check_pipeline(configured(model))
    return report.to_json().rstrip() if json else str(report)
