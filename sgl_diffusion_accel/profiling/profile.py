"""`profile`: the front door of timings, traces and ranges."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from sgl_diffusion_accel.caching.blocks.layout import find_block_lists
from sgl_diffusion_accel.environment import package_versions
from sgl_diffusion_accel.errors import AccelError, ConfigError, UnsupportedModelError
from sgl_diffusion_accel.loop.session import Session
from sgl_diffusion_accel.profiling.profile_settings import ProfileSettings
from sgl_diffusion_accel.profiling.recording import stages
from sgl_diffusion_accel.profiling.recording.attachments import Attachments, is_compiled, is_profiled
from sgl_diffusion_accel.profiling.recording.block_marks import BlockMarks
from sgl_diffusion_accel.profiling.recording.memory import reset_peak
from sgl_diffusion_accel.profiling.recording.nvtx import NvtxEmitter
from sgl_diffusion_accel.profiling.recording.probes import (
    BlockProbe,
    ControlProbe,
    PipelineProbe,
    SchedulerProbe,
    StageProbe,
    TransformerProbe,
)
from sgl_diffusion_accel.profiling.recording.recorder import NOT_SEEN, Call, Recorder
from sgl_diffusion_accel.profiling.recording.torch_trace import TorchEmitter, is_recording
from sgl_diffusion_accel.profiling.recording.trace_window import Emitter, Window
from sgl_diffusion_accel.profiling.results.build_timings import build
from sgl_diffusion_accel.profiling.results.perf_json import write_perf
from sgl_diffusion_accel.profiling.results.profile_report import ProfileReport
from sgl_diffusion_accel.profiling.results.timings import CallReport
from sgl_diffusion_accel.slots import CALL
from sgl_diffusion_accel.targets import Pipe, Target, find_targets, is_in_compiled_wrapper
from sgl_diffusion_accel.validate import names_checked

logger = logging.getLogger(__name__)


@names_checked
def profile(
    pipe: Pipe,
    *,
    steps: int = 5,
    all_stages: bool = False,
    output_dir: str | Path | None = None,
    nvtx: bool = False,
    trace: bool | None = None,
    record_shapes: bool = False,
    with_stack: bool = False,
    profile_memory: bool = False,
) -> Profile:
    """Measures the pipeline calls inside a `with` block: timings of all stages and steps, and a trace of some.

    The timings are the device's own: on a GPU they are events in its queue, read at the end, so that nothing waits
    while the pipeline runs. The trace is what the torch profiler records of `steps` denoising steps, after one step of
    warm-up; it slows these steps down, which the report says. Outputs stay bitwise the same, and at the end of the
    block nothing is left on the pipeline, also on an error.

    Args:
        pipe: A diffusers pipeline, or a transformer by itself (then only denoising loops are seen).
        steps: Denoising steps to trace, after one of warm-up; -1 for all of them, without warm-up.
        all_stages: Trace whole pipeline calls instead. Such traces are large.
        output_dir: Folder for traces, made if needed; None for `SGLANG_DIFFUSION_TORCH_PROFILER_DIR`, else
            `SGLANG_TORCH_PROFILER_DIR`, else `logs`.
        nvtx: Emit NVTX ranges and switch the capture of Nsight Systems; see `nsys_command`. Needs CUDA.
        trace: Run the torch profiler; False for timings alone, None for "unless `nvtx`", since both at once get into
            each other's way.
        record_shapes: Record the shapes of the operators' inputs in the trace.
        with_stack: Record the lines of code in the trace.
        profile_memory: Record allocations in the trace, and count peaks of memory from the beginning of each call, for
            which the device's process-wide peaks are reset.

    Returns:
        The profile, to be used once, as a context manager.

    Raises:
        ConfigError: A setting has a value that is not allowed, the folder cannot be written, or there is no CUDA for
            NVTX. On entering: the pipeline is being profiled already, another torch profiler is running, or the profile
            has been used.
        ConfigTypeError: A setting, or `pipe`, has a wrong type.
        UnsupportedModelError: The pipeline has no diffusion transformer.

    Example:
        >>> with profile(pipe, steps=3) as prof:
        ...     image = pipe(**call)
        >>> print(prof.report)
        >>> prof.save_perf("perf.json")
        >>> prof.trace_path
    """
    settings = ProfileSettings(steps, all_stages, output_dir, nvtx, trace, record_shapes, with_stack, profile_memory)
    find_targets(pipe)  # refuses what is no pipeline
    return Profile(pipe, settings)


class Profile:
    """What `profile` returns: a context manager, and afterwards the measurements.

    Args:
        pipe: What is profiled.
        settings: How.
    """

    def __init__(self, pipe: object, settings: ProfileSettings) -> None:
        self.settings = settings
        self._pipe: Any = pipe
        self._torch = TorchEmitter(settings.record_shapes, settings.with_stack, settings.profile_memory)
        emitters: list[Emitter] = ([self._torch] if settings.trace else []) + ([NvtxEmitter()] if settings.nvtx else [])
        self._windows = [Window(each, settings.steps, settings.all_stages) for each in emitters]
        self._recorder = Recorder(self._windows)
        self._session = Session(otherwise=None)
        self._attachments = Attachments()
        self._watched: set[tuple[int, str]] = set()
        self._built: dict[int, CallReport] = {}
        self._remarks: list[str] = []
        self._traces: tuple[Path, ...] = ()
        self._was_used = False

    @property
    def report(self) -> ProfileReport:
        """What has been measured so far. Reading it waits for the device, if there is something new."""
        calls = self._recorder.calls
        for index, call in enumerate(calls):
            if call.end is not None and index not in self._built:
                self._built[index] = build(call, self._window_remarks(call))
        built = tuple(self._built[index] for index in sorted(self._built))
        failures = tuple(f"the profiler failed: {each.failure}" for each in self._windows if each.failure)
        return ProfileReport(built, package_versions(), self._traces, (*self._remarks, *failures))

    @property
    def trace_paths(self) -> tuple[Path, ...]:
        """The Chrome traces, one for each traced denoising loop or call; written at the end of the block."""
        return self._traces

    @property
    def trace_path(self) -> Path | None:
        """The last of the traces, None where there is none. https://ui.perfetto.dev opens it."""
        return self._traces[-1] if self._traces else None

    def save_perf(self, path: str | Path, call: int = -1, tag: str = "sgl_diffusion_accel") -> Path:
        """Writes the timings of a call as JSON, with the fields of SGLang-Diffusion's `--perf-dump-path`.

        Args:
            path: The file; its folder is made if needed.
            call: Which pipeline call of the block.
            tag: A word to know the file by.

        Returns:
            The path.

        Raises:
            ConfigError: Nothing was measured, or there is no such call.
            OSError: The file cannot be written.
        """
        report = self.report
        return write_perf(report, report.call(call), Path(path), tag)

    def __enter__(self) -> Profile:
        if self._was_used:
            raise ConfigError("this profile has been used, and is entered once. Type: with profile(pipe) as prof:")
        if is_profiled(self._pipe):
            raise ConfigError(
                f"this {type(self._pipe).__name__} is being profiled already: leave the block of the other profile "
                "first, or take out the inner one."
            )
        if self.settings.trace and is_recording():
            raise ConfigError(
                "a torch profiler is running already, and there is one at a time. For timings beside it type: "
                "trace=False."
            )
        self._was_used = True
        try:
            self._attach()
        except BaseException:
            self._attachments.remove()
            raise
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._recorder.end_call(NOT_SEEN)
        finally:
            self._attachments.remove()
            self._session.runs.clear()
            self._pipe = None  # measurements must not keep a model's memory
        try:
            self._traces = tuple(self._torch.write(self.settings.folder))
        except OSError:
            if error is None:
                raise
            logger.exception("the trace could not be written")

    def __repr__(self) -> str:
        calls = len(self.report.calls)
        return f"<profile of {type(self._pipe).__name__}: {calls} {'call' if calls == 1 else 'calls'} measured>"

    def __str__(self) -> str:
        return str(self.report) if self.report.calls else "profile: nothing has been measured yet"

    # Attaching

    def _attach(self) -> None:
        """Puts the probes in front of the pipeline and its parts, as they are now."""
        keys: set[tuple[int, str]] = set()
        for target in find_targets(self._pipe):
            keys |= self._attach_transformer(target)
        if not isinstance(self._pipe, nn.Module):
            keys.add(self._attachments.put(self._pipe, CALL, PipelineProbe(self._recorder, self._prepare)))
            for place in stages.find_places(self._pipe):
                keys.add(self._attachments.put(place.owner, place.method, self._place_probe(place)))
        self._attachments.keep(keys | self._watched)

    def _prepare(self) -> None:
        """Before each pipeline call: components may have been exchanged, and patches put in front of the probes."""
        try:
            self._attach()
        except AccelError:  # the pipeline has lost its transformer, and will say so itself
            logger.debug("nothing to attach to", exc_info=True)
        if self.settings.profile_memory:
            device = getattr(self._pipe, "_execution_device", None)
            if device is not None:
                reset_peak(device)

    def _attach_transformer(self, target: Target) -> set[tuple[int, str]]:
        lists = self._block_lists(target)
        marks = BlockMarks(self._recorder)
        probe = TransformerProbe(self._recorder, self._session, target.name, self._watch, marks)
        keys = {self._attachments.put(target.wrapper, CALL, probe)}
        for name, blocks in lists.items():
            for index, block in enumerate(blocks):
                is_last = index == len(blocks) - 1
                keys.add(self._attachments.put(block, CALL, BlockProbe(self._recorder, marks, name, index, is_last)))
        return keys

    def _block_lists(self, target: Target) -> dict[str, tuple[nn.Module, ...]]:
        """The blocks to be marked: none where nothing is traced, or where a compiled graph has swallowed them."""
        if not self._windows:
            return {}
        if is_in_compiled_wrapper(target.wrapper) or is_compiled(target.module):
            self._remark(f"{target.name} is compiled as a whole: its blocks are not marked in traces")
            return {}
        try:
            return find_block_lists(target.module)
        except UnsupportedModelError as error:
            self._remark(f"the blocks of {target.name} are not marked in traces: {error}")
            return {}

    def _place_probe(self, place: stages.Place) -> Any:
        if place.stage == stages.CONTROL:
            return ControlProbe(self._recorder, self._session, place.label, self._watch)
        return StageProbe(self._recorder, self._pipe, place.stage, place.label)

    def _watch(self, scheduler: Any) -> None:
        """Puts a probe in front of the scheduler of a new run."""
        if scheduler is not None and callable(getattr(scheduler, "step", None)):
            self._watched.add(self._attachments.put(scheduler, "step", SchedulerProbe(self._recorder)))

    def _remark(self, remark: str) -> None:
        if remark not in self._remarks:
            self._remarks.append(remark)

    def _window_remarks(self, call: Call) -> list[str]:
        """Says where fewer steps were traced than asked for."""
        totals = [each.facts["steps"] for each in call.ranges if each.kind == "loop"]
        found = []
        for total in totals if self._windows and not self.settings.all_stages else []:
            first, behind = self._windows[0].bounds(total)
            if behind - first < self.settings.steps:
                found.append(f"traced {behind - first} steps, not {self.settings.steps}: the run has {total}")
        return found
