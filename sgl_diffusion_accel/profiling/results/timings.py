"""What a profile measured, as plain data: pipeline calls, their stages, their denoising steps, memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.profiling.recording.memory import MemoryCheckpoint


@dataclass(frozen=True)
class BranchTiming:
    """One transformer call.

    Attributes:
        name: The branch: `"cond"`, `"uncond"`, ….
        component: Which transformer, such as `"transformer_2"`.
        begin_ms: From the beginning of the pipeline call.
        duration_ms: How long it took.
        computed: Whether the cache's span was computed; None without a cache.
        reason: Why.
        change: Relative change of the cache's signal, where it was measured.
    """

    name: str
    component: str
    begin_ms: float
    duration_ms: float
    computed: bool | None = None
    reason: str | None = None
    change: float | None = None


@dataclass(frozen=True)
class StepTiming:
    """One denoising step, from its first model call to that of the next step; the last ends with its scheduler.

    Attributes:
        index: Index of the step.
        timestep: The scheduler's timestep.
        begin_ms: From the beginning of the pipeline call.
        duration_ms: How long it took.
        branches: The transformer calls, in order.
        scheduler_ms: The scheduler's part.
        control_ms: That of ControlNets.
        traced: Whether a profiler was recording, which slows a step down.
    """

    index: int
    timestep: float
    begin_ms: float
    duration_ms: float
    branches: tuple[BranchTiming, ...] = ()
    scheduler_ms: float = 0.0
    control_ms: float = 0.0
    traced: bool = False

    @property
    def transformer_ms(self) -> float:
        """The transformers' part, all branches together."""
        return sum(branch.duration_ms for branch in self.branches)

    @property
    def other_ms(self) -> float:
        """The rest: what the pipeline does between these, step callbacks, guidance."""
        return self.duration_ms - self.transformer_ms - self.scheduler_ms - self.control_ms

    @property
    def computed(self) -> bool | None:
        """Whether a cache computed it on any branch; None without a cache."""
        known = [branch.computed for branch in self.branches if branch.computed is not None]
        return any(known) if known else None


@dataclass(frozen=True)
class StageTiming:
    """One stage of a pipeline call.

    Attributes:
        name: `"text encoding"`, `"denoising"`, `"decoding"`, ….
        duration_ms: How long it took, all its parts together.
        spans: Beginning and end of each part, from the beginning of the pipeline call.
    """

    name: str
    duration_ms: float
    spans: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class CallReport:
    """One pipeline call. Everything is in milliseconds.

    Attributes:
        pipeline: The pipeline's class; the transformer's where another pipeline used it.
        device: Where it ran.
        clock: What took the times: the device's own events, or the host's clock.
        total_ms: From beginning to end, without `profiler_ms`.
        stages: In the order in which they began.
        steps: The denoising steps.
        profiler_ms: What starting and stopping a profiler took meanwhile, outside of all stages and steps.
        memory: At checkpoints.
        is_whole: Whether the pipeline call itself was seen; otherwise its denoising loop alone.
        is_complete: Whether it came to its end.
        error: What ended it, if anything was raised.
        remarks: What the user should know.
    """

    pipeline: str
    device: str
    clock: str
    total_ms: float
    stages: tuple[StageTiming, ...] = ()
    steps: tuple[StepTiming, ...] = ()
    profiler_ms: float = 0.0
    memory: tuple[MemoryCheckpoint, ...] = ()
    is_whole: bool = True
    is_complete: bool = True
    error: str | None = None
    remarks: tuple[str, ...] = ()

    @property
    def denoise_steps_ms(self) -> tuple[float, ...]:
        """Duration of every denoising step."""
        return tuple(step.duration_ms for step in self.steps)

    @property
    def other_ms(self) -> float:
        """What belongs to no stage: checks of inputs, noise, what lies between the stages."""
        return self.total_ms - sum(stage.duration_ms for stage in self.stages)

    @property
    def traced_steps(self) -> tuple[int, ...]:
        """Indices of the steps that a profiler recorded."""
        return tuple(step.index for step in self.steps if step.traced)

    @property
    def step_ms(self) -> float:
        """Median of the steps that no profiler recorded; of all, if there are no others. 0 without steps."""
        plain = [step.duration_ms for step in self.steps if not step.traced]
        return statistics.median(plain or self.denoise_steps_ms or [0.0])

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches, in the order in which they appeared."""
        return tuple(dict.fromkeys(branch.name for step in self.steps for branch in step.branches))

    @property
    def skipped_steps(self) -> tuple[int, ...]:
        """Indices of the steps that a cache skipped on every branch."""
        return tuple(step.index for step in self.steps if step.computed is False)


@dataclass(frozen=True)
class ProfileData:
    """The timings of a profile.

    Attributes:
        calls: The pipeline calls, in order.
        versions: Package to version.
        traces: Chrome traces that were written.
        remarks: What the user should know.
    """

    calls: tuple[CallReport, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    traces: tuple[Path, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def last(self) -> CallReport:
        """The last pipeline call.

        Raises:
            ConfigError: There has been none.
        """
        if not self.calls:
            raise ConfigError(
                "nothing has been measured: no pipeline call ended inside the block. "
                "Type: with profile(pipe) as prof: pipe(...)"
            )
        return self.calls[-1]

    @property
    def total_ms(self) -> float:
        """Of the last call, from beginning to end."""
        return self.last.total_ms

    @property
    def stages(self) -> tuple[StageTiming, ...]:
        """The stages of the last call."""
        return self.last.stages

    @property
    def steps(self) -> tuple[StepTiming, ...]:
        """The denoising steps of the last call."""
        return self.last.steps

    @property
    def denoise_steps_ms(self) -> tuple[float, ...]:
        """Duration of every denoising step of the last call."""
        return self.last.denoise_steps_ms

    def call(self, index: int) -> CallReport:
        """One of the calls.

        Raises:
            ConfigError: Nothing was measured, or there is no such call.
        """
        self.last  # noqa: B018  # raises if there is none
        if not -len(self.calls) <= index < len(self.calls):
            raise ConfigError(f"call={index}; measured: {len(self.calls)} calls, 0 to {len(self.calls) - 1}.")
        return self.calls[index]
