"""What each cache can do on a pipeline: by what its front door asks, without putting anything on."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_diffusion_accel.auto.checking.cache_memory import CallShape
from sgl_diffusion_accel.auto.checking.findings import Answer, FoundLoop, FoundScheduler, Verdict
from sgl_diffusion_accel.caching.blocks.layout import divide, find_block_lists
from sgl_diffusion_accel.caching.cache_dit.apply_cache_dit import parts_of
from sgl_diffusion_accel.caching.cache_dit.cache_dit_config import CacheDiTConfig
from sgl_diffusion_accel.caching.parts.call_policy import DEPTH
from sgl_diffusion_accel.caching.teacache.apply_teacache import parts_and_title
from sgl_diffusion_accel.caching.teacache.teacache_config import TeaCacheConfig
from sgl_diffusion_accel.caching.teacache.teacache_models import family_of
from sgl_diffusion_accel.caching.teacache.teacache_signals import check_signal
from sgl_diffusion_accel.calibration.calibrate import no_plan
from sgl_diffusion_accel.errors import ConfigError, UnsupportedModelError
from sgl_diffusion_accel.loop.conversions import conversion_of
from sgl_diffusion_accel.targets import Targets

_OUTPUTS = f"{DEPTH} outputs a branch, as large as the latents"


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        targets: The transformers.
        loop: The denoising loop.
        scheduler: The scheduler.
        shape: Of the calls; None where it was not given.
    """

    targets: Targets
    loop: FoundLoop
    scheduler: FoundScheduler
    shape: CallShape | None = None

    def held_outputs(self) -> int | None:
        """Bytes that a cache of whole calls holds; all experts share one memory."""
        return None if self.shape is None else self.shape.outputs(self.targets[0])

    def held_hidden(self, tensors: int) -> int | None:
        """Bytes that a cache of blocks holds: so many tensors for each of a transformer's lists, and a signal."""
        if self.shape is None:
            return None
        try:
            lists = [len(find_block_lists(target.module)) for target in self.targets]
        except UnsupportedModelError:
            return None
        each = [
            self.shape.hidden(target, count * tensors + 1) for target, count in zip(self.targets, lists, strict=True)
        ]
        return None if None in each else sum(size or 0 for size in each)


def adaptive(subject: Subject) -> Verdict:
    """On `apply_adaptive_cache`."""
    call, reason = "apply_adaptive_cache(pipe)", "skips whole calls, whatever the transformer is made of"
    answer: Answer = "yes"
    if subject.scheduler.is_linear is False:
        answer = "in part"
        reason = (
            f"{subject.scheduler.name} lets nothing be corrected: fewer steps are skipped, and fewer steps of the "
            "pipeline may be better. apply_auto leaves the cache out there"
        )
    return Verdict("adaptive", call, answer, reason, _OUTPUTS, subject.held_outputs())


def plan(subject: Subject) -> Verdict:
    """On `apply_cache_plan`."""
    call = "apply_cache_plan(pipe, plan, speedup=2.5)"
    if subject.scheduler.is_linear is False:
        reason = f"no plan can be made for {subject.scheduler.name}. Take a deterministic scheduler"
        return Verdict("plan", call, "no", reason)
    conversion = conversion_of(subject.targets.pipe)
    if conversion is not None:
        return Verdict("plan", call, "no", str(no_plan(None, conversion)))
    return Verdict("plan", call, "yes", "after plan = calibrate(pipe, calls)", _OUTPUTS, subject.held_outputs())


def dbcache(subject: Subject) -> Verdict:
    """On `apply_cache_dit`."""
    for target in subject.targets:
        parts_of(target.module, CacheDiTConfig())
    reason = "skips blocks after the first one; taylorseer_order=1 predicts, where the default reuses"
    memory = "for each branch the signal and a residual of each list, as large as the hidden states"
    return Verdict("dbcache", "apply_cache_dit(pipe)", "yes", reason, memory, subject.held_hidden(1))


def teacache(subject: Subject) -> Verdict:
    """On `apply_teacache`."""
    for target in subject.targets:
        divide(target.module, 0, 0)
        check_signal(target.module, family_of(target.module).signal)
    memory = "for each branch the signal and a residual of each list"
    held = subject.held_hidden(1)
    try:
        words = {parts_and_title(target, TeaCacheConfig())[1] for target in subject.targets}
    except ConfigError as error:
        return Verdict("teacache", "apply_teacache(pipe, '2x', coefficients=…)", "in part", str(error), memory, held)
    return Verdict("teacache", "apply_teacache(pipe)", "yes", f"published: {'; '.join(sorted(words))}", memory, held)


def magcache(subject: Subject) -> Verdict:
    """On `apply_magcache`."""
    for target in subject.targets:
        divide(target.module, 0, 0)
    call, memory = "apply_magcache(pipe, plan.magnitude_ratios)", "for each branch a residual of each list"
    reason = "with the ratios that plan = calibrate(pipe, calls) records, which needs a scheduler that adds no noise"
    return Verdict("magcache", call, "yes", reason, memory, subject.held_hidden(1))
