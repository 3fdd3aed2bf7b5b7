"""`calibrate`: learns from a few uncached runs what the best plan for a pipeline is."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sgl_diffusion_accel.caching.cache_patch import refuse_cached
from sgl_diffusion_accel.caching.magcache.magnitudes import MagnitudeRatios
from sgl_diffusion_accel.caching.teacache.coefficients import TeaCacheCoefficients
from sgl_diffusion_accel.calibration.block_record import BlockRecording
from sgl_diffusion_accel.calibration.call_record import Recording, Watch, recording
from sgl_diffusion_accel.calibration.designs.answers import answers_between
from sgl_diffusion_accel.calibration.growth import disturbance_for, growth_between, same_start
from sgl_diffusion_accel.calibration.plan import CachePlan
from sgl_diffusion_accel.calibration.plan_checks import ENOUGH, held_out_ratio
from sgl_diffusion_accel.calibration.teacache_fit import fit_recording
from sgl_diffusion_accel.calls import Call, read_calls
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.loop.conversions import Conversion, conversion_of
from sgl_diffusion_accel.loop.pipeline_frames import guidance_of
from sgl_diffusion_accel.loop.scheduler_response import adds_noise, response_of
from sgl_diffusion_accel.targets import Pipeline, Target, find_targets
from sgl_diffusion_accel.validate import names_checked

logger = logging.getLogger(__name__)

_NOISY = 1.0  # spread of the magnitude ratios, relative to their distance from 1, above which the user is warned
_GUIDANCE = ("true_cfg_scale", "guidance_scale")


@names_checked
def calibrate(
    pipe: Pipeline,
    calls: Iterable[Mapping[str, Any]],
    path: str | Path | None = None,
    *,
    teacache: bool = True,
    magnitudes: bool = True,
    growth: bool = True,
    progress: bool = True,
) -> CachePlan:
    """Learns from a few uncached runs how a pipeline moves, for plans at every speed-up.

    Each call is run as it is, two of them once more with one output disturbed. What the scheduler is given at
    each step, guidance and all, is kept as a sketch (at most 1.25 MiB a step on the host, one run at a time; twice that
    while a call runs disturbed, to be held against the run before it). On the device nothing is kept, but for TeaCache
    and MagCache: the last residual of each branch, for TeaCache the last signal and output too; and three outputs in a
    disturbed run. Only the products between steps, the growth of the disturbance and what the model answered to it
    remain: a plan has some tens of kilobytes whatever the model.

    Args:
        pipe: A diffusers pipeline with a diffusion transformer (two for Wan2.2, planned together), with no cache on it.
        calls: Keyword arguments of `pipe(...)`, one dict for each run, all with the same steps, guidance and size. Two
            to six different prompts do.
        path: Where to save the plan after each call; calls that are in the file already are not run again, so that an
            interrupted calibration goes on where it was.
        teacache: Also fit the coefficients of TeaCache on the same runs, where the model has a signal for them. Where a
            calibration goes on, they are from its larger part.
        magnitudes: Also record the magnitude ratios of MagCache in the same runs, where the model has blocks to watch.
        growth: Also measure how the model answers to latents that are off, and how errors of the start grow until the
            end, by making two of the calls once more, callbacks and all. Without it plans expect what is usual.
        progress: Log each call as it is done.

    Returns:
        The plan, for `apply_cache_plan`.

    Raises:
        ConfigError: No calls, calls that differ in their steps, timesteps that rise, or a cache is on the pipeline.
        ConfigTypeError: `pipe` cannot be called, or a call is no dict.
        UnsupportedModelError: The scheduler adds noise of its own, or the pipeline has no diffusion transformer.

    Example:
        >>> plan = calibrate(pipe, calls=[call])
        >>> patch = apply_cache_plan(pipe, plan, speedup=2.0)
        >>> patch.remove()
    """
    read = read_calls(pipe, calls, "calibrate(pipe, calls=…)")
    targets = find_targets(pipe)
    refuse_cached(targets, "calibration")
    if adds_noise(pipe.scheduler):
        raise no_plan(pipe.scheduler)
    known = CachePlan.load(path) if path is not None and Path(path).exists() else None
    done = 0 if known is None else known.calls
    if known is not None:
        _check_setting(known, pipe, targets, [call.arguments for call in read], path)
        if done >= len(read):
            return known
    if done:
        logger.info("%s holds %d calls: going on with the others", path, done)
    blocks = _blocks(pipe, targets, teacache, magnitudes)
    plans = [known] if known is not None else []
    with blocks or nullcontext(), recording(pipe) as watch:
        for number, call in enumerate(read[done:], done + 1):
            watch.runs.clear()
            arguments = call.fresh()
            if blocks is None:
                pipe(**arguments)
            else:
                blocks.run(arguments)
            found = _plan(pipe, targets, arguments, watch.runs)
            plans.append(found if blocks is None else replace(found, teacache=_fit(blocks), magnitudes=_last(blocks)))
            _save(plans, done, path)
            if growth:
                plans[-1] = _disturbed(pipe, call, _measured(plans), watch, plans[-1], blocks)
                _save(plans, done, path)
            logger.log(logging.INFO if progress else logging.DEBUG, "calibrated: call %d of %d", number, len(read))
    plan = _held_out(plans, _joined(plans, done))
    if path is not None:
        plan.save(path)
    _warn_of_noise(plan)
    return plan


def _blocks(pipe: Any, targets: Sequence[Target], teacache: bool, magnitudes: bool) -> BlockRecording | None:
    """What watches the blocks; None where nothing is wanted of them, or they cannot be watched."""
    signals = teacache and BlockRecording.has_signals(targets)
    magnitudes = magnitudes and BlockRecording.has_blocks(targets)
    return BlockRecording(pipe, signals=signals, magnitudes=magnitudes) if signals or magnitudes else None


def _last(blocks: BlockRecording) -> MagnitudeRatios | None:
    """The magnitude ratios of the last run."""
    return blocks.magnitudes[-1] if blocks.magnitudes else None


def _warn_of_noise(plan: CachePlan) -> None:
    if plan.magnitudes is not None and plan.magnitudes.noise > _NOISY:
        logger.warning(
            "the magnitude ratios differ from call to call by %.0f %% of their mean distance from 1: MagCache will "
            "choose its steps little better than at random.",
            plan.magnitudes.noise * 100,
        )


def _save(plans: list[CachePlan], done: int, path: str | Path | None) -> None:
    if path is not None:
        _joined(plans, done).save(path)


def _held_out(plans: list[CachePlan], plan: CachePlan) -> CachePlan:
    """The plan of all calls, with what it has learned from the last of them."""
    if len(plans) < 2:
        return plan
    before = plans[0].merge(*plans[1:-1])
    ratio = held_out_ratio(before.moments, plan.moments, plans[-1].moments)
    if ratio is not None and ratio > ENOUGH:
        logger.info(
            "the last call would have been %.1f times as far off, had it not been calibrated on: more calls help.",
            ratio,
        )
    return replace(plan, held_out=ratio)


def _measured(plans: list[CachePlan]) -> int:
    """How often a call has been disturbed, but for files of before, which kept nothing but the growth."""
    return sum(len(each.answers) for each in plans)


def _disturbed(
    pipe: Any, call: Call, measured: int, watch: Watch, plan: CachePlan, blocks: BlockRecording | None
) -> CachePlan:
    """Makes a call once more, disturbed, and compares the two; a line in the log where that cannot tell.

    Args:
        pipe: The pipeline.
        call: The call.
        measured: How often the growth has been measured.
        watch: With the recording of the call as it is.
        plan: From that recording.
        blocks: What watches the blocks meanwhile, and must not keep this run.

    Returns:
        The plan with what was found.
    """
    response = plan.moments.response
    made = disturbance_for(measured, response)
    if made is None:
        return plan
    plain = watch.runs[0]
    watch.runs.clear()
    watch.disturbance = made
    try:
        pipe(**call.fresh())
    except Exception as error:  # the call itself is recorded: this must not lose it
        logger.warning("how errors go on was not measured: the call failed when it was made once more (%s).", error)
        return plan
    finally:
        watch.disturbance = None
        if blocks is not None:
            blocks.forget()
    run = watch.runs[0]
    if len(watch.runs) != 1 or not same_start(plain.first, run.first):
        logger.info("how errors go on was not measured: the call draws other noise each time it is made.")
        return plan
    if plain.final is None or run.final is None or plain.final.shape != run.final.shape:
        return plan
    growth = growth_between(made, response, plain.final, run.final)
    one, other = plain.seen(), run.seen()
    if growth is None or one is None or other is None or plain.timesteps != run.timesteps:
        return plan
    answers = answers_between(response, one, other, made.step)
    return replace(plan, growth=(growth,), answers=(answers,) if answers else ())


def _joined(plans: list[CachePlan], done: int) -> CachePlan:
    """All plans as one; of the coefficients those that more calls went into, the file's or the last ones here."""
    plan = plans[0].merge(*plans[1:])
    earlier, newest = plans[0].teacache, plans[-1].teacache
    return replace(plan, teacache=newest if earlier is None or plan.calls - done >= done else earlier)


def _check_setting(
    known: CachePlan,
    pipe: Any,
    targets: Sequence[Target],
    calls: list[Mapping[str, Any]],
    path: str | Path | None,
) -> None:
    """Refuses to go on with a file of another setting, as far as that shows before anything runs."""
    given: dict[str, tuple[Any, Any]] = {
        "pipeline": (known.pipeline, type(pipe).__name__),
        "model's config": (known.config, digest(targets)),
        "scheduler": (known.scheduler, type(pipe.scheduler).__name__),
    }
    for call in calls:
        steps, scale = call.get("num_inference_steps"), next((call[key] for key in _GUIDANCE if key in call), None)
        if type(steps) is int and type(pipe.scheduler).order == 1 and not call.get("strength"):
            given["number of steps"] = (known.steps, steps)
        if known.guidance is not None and isinstance(scale, (int, float)):
            given["guidance"] = (known.guidance, float(scale))
        for name, (theirs, ours) in given.items():
            if theirs != ours:
                raise ConfigError(
                    f"{path} is of another setting: its {name} is {theirs}, and that of the call {ours}. Give another "
                    "path."
                )


def _fit(blocks: BlockRecording) -> TeaCacheCoefficients | None:
    if not blocks.retained:  # no signals were recorded
        return None
    try:
        return fit_recording(blocks)
    except ConfigError as error:  # too few steps, for example: the plan does not need it
        logger.info("no TeaCache coefficients: %s", error)
        return None


def _plan(pipe: Any, targets: Sequence[Target], call: Mapping[str, Any], runs: list[Recording]) -> CachePlan:
    if not runs or not runs[0].timesteps:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} ran without a step of its own scheduler; it may step copies of it, one for each "
            "frame or part. Nothing was recorded, and there can be no plan. Use apply_adaptive_cache(pipe), which "
            "needs no calibration."
        )
    if len(runs) > 1:
        raise ConfigError(f"one call made {len(runs)} denoising runs; give calls that make one each.")
    run = runs[0]
    steps = len(run.timesteps)
    gram = run.gram()
    if not gram.any():
        raise ConfigError("the pipeline gave its scheduler nothing but zeros: nothing can be learned from this call.")
    response, conversion = response_of(pipe.scheduler, steps), conversion_of(pipe)
    if response is None or conversion is not None:
        raise no_plan(pipe.scheduler, conversion)
    return CachePlan(
        pipeline=type(pipe).__name__,
        transformers=tuple(target.model for target in targets),
        config=digest(targets),
        scheduler=type(pipe.scheduler).__name__,
        timesteps=tuple(run.timesteps),
        guidance=guidance_of(pipe, call),
        latents=run.shape,
        calls=1,
        gram=tuple(map(float, gram[np.triu_indices(steps)])),
        response=tuple(map(float, response[1:][np.tril_indices(steps)])),
    )


def no_plan(scheduler: Any, conversion: Conversion | None = None) -> UnsupportedModelError:
    """The error for a scheduler that no plan can be made for, or a pipeline that converts what it is given."""
    if conversion is not None:
        return UnsupportedModelError(
            "a plan goes by what the scheduler is given, and this pipeline makes that of the transformer's output and "
            "of the latents: there can be no plan for it. Use apply_adaptive_cache(pipe)."
        )
    if scheduler is None:
        return UnsupportedModelError(
            "a plan goes by the scheduler, and this loop names none. Type: for t in denoising_steps("
            "scheduler.timesteps, scheduler=scheduler):"
        )
    return UnsupportedModelError(
        f"{type(scheduler).__name__} adds noise of its own, or is not linear in what it is given: there can be no plan "
        "for it. Use a deterministic scheduler, or apply_adaptive_cache(pipe)."
    )


def digest(targets: Sequence[Target]) -> str:
    """A short digest of the transformers' configs, but for names and versions that change from file to file."""
    configs = []
    for target in targets:
        config = getattr(target.module, "config", None) or {}
        configs.append({key: value for key, value in dict(config).items() if not key.startswith("_")})
    return hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode()).hexdigest()[:16]
