"""Records what happens in pipeline calls: nested ranges with their moments, as they come in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sgl_diffusion_accel.clocks import Clock, clock_for, synchronise
from sgl_diffusion_accel.loop.host_copy import HostCopy
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.profiling.recording import stages
from sgl_diffusion_accel.profiling.recording.memory import MemoryCheckpoint, take_checkpoint
from sgl_diffusion_accel.profiling.recording.trace_window import Window

NOT_SEEN = "its end was not seen"

Kind = Literal["stage", "loop", "step", "transformer", "control", "scheduler", "profiler"]


@dataclass(slots=True, eq=False)
class Range:
    """A stretch of time.

    Attributes:
        kind: What it is a range of.
        name: Which one.
        begin: Its first moment, of the call's clock.
        parent: The range around it.
        is_marked: Whether traces show it.
        end: Its last moment; None while it lasts.
        facts: What else is known of it.
    """

    kind: Kind
    name: str
    begin: Any
    parent: Range | None
    is_marked: bool
    end: Any = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Call:
    """One pipeline call, as recorded.

    Attributes:
        pipeline: The pipeline's class; the transformer's for a run that some other pipeline has begun.
        device: Where it runs.
        clock: Takes its moments.
        is_whole: Whether its begin and end were seen, and not its denoising loop alone.
        begin: Its first moment.
        end: Its last moment; None while it lasts.
        error: What ended it, if anything was raised.
        ranges: In the order in which they began.
        memory: Checkpoints.
    """

    pipeline: str
    device: torch.device
    clock: Clock
    is_whole: bool
    begin: Any
    end: Any = None
    error: str | None = None
    ranges: list[Range] = field(default_factory=list)
    memory: list[MemoryCheckpoint] = field(default_factory=list)


class _Thread(threading.local):
    """What is under way in one thread."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.stack: list[Range] = []
        self.run: Run | None = None
        self.total = 0
        self.step: int | None = None  # index of the denoising step that is under way
        self.seen = 0  # steps of the loop so far
        self.timesteps: HostCopy | None = None


class Recorder:
    """Takes the ranges of pipeline calls, and passes them on to the windows of profilers.

    Args:
        windows: What is to be traced.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        self.calls: list[Call] = []
        self._windows = windows
        self._thread = _Thread()

    @property
    def call(self) -> Call | None:
        """The call that is under way in this thread."""
        return self._thread.call

    @property
    def is_inside(self) -> bool:
        """Whether some range is open in this thread."""
        return bool(self._thread.stack)

    @property
    def is_tracing(self) -> bool:
        """Whether some profiler is recording this thread."""
        return any(window.is_recording_here for window in self._windows)

    @property
    def loop(self) -> Run | None:
        """The denoising run that is under way in this thread."""
        return self._thread.run

    # Pipeline calls

    def begin_call(self, pipeline: str, device: torch.device, is_whole: bool = True) -> None:
        """A pipeline call begins; one of which only the loop was seen ends."""
        self.end_call(NOT_SEEN)
        for window in self._windows:
            window.begin_call(pipeline)
            window.push(pipeline)
        clock = clock_for(device)
        self._thread.call = call = Call(pipeline, device, clock, is_whole, clock.now())
        self.calls.append(call)
        self._checkpoint("before_forward")

    def end_call(self, error: str | None = None) -> None:
        """A pipeline call ends, or is given up. Harmless when none is under way."""
        call = self._thread.call
        if call is None:
            return
        call.error = error
        self.end_loop()
        while self._thread.stack:
            self.pop(self._thread.stack[-1])
        if self._thread.call is None:
            return  # only its loop was seen, and has ended
        call.end = call.clock.now()
        self._checkpoint("mem_analysis")
        self._thread.call = None
        for window in self._windows:
            window.pop()
            window.end_call()

    # Denoising loops

    def enter_step(self, run: Run, step: int) -> None:
        """Something of a denoising step is called: the step begins, unless it is under way."""
        thread = self._thread
        if thread.run is run and thread.step == step:
            return
        if thread.run is run:
            self._end_step()
        else:
            self.end_loop()
            thread.run, thread.seen, thread.total = run, 0, run.total
            thread.timesteps = HostCopy(run.timesteps.detach().float()) if run.has_timesteps else None
            self.push("loop", "denoising_loop", steps=run.total)
        self._move_windows()
        thread.step = step
        self.push("step", self._step_name(step), index=step, traced=self.is_tracing, timesteps=thread.timesteps)
        thread.seen += 1

    def end_loop(self) -> None:
        """The denoising loop is over. Harmless when none is under way."""
        thread = self._thread
        if thread.run is None or thread.call is None:
            return
        self._end_step()
        if any(window.is_loop_open for window in self._windows):
            taken = self._begin_moving()
            for window in self._windows:
                window.leave_loop()
            self.pop(taken)
        self._end_last("loop")
        thread.run, thread.step, thread.timesteps = None, None, None
        self._checkpoint(f"after_{stages.sglang_name(stages.DENOISING)}")
        if not thread.call.is_whole:
            self.end_call(thread.call.error)

    def is_last_step(self) -> bool:
        """Whether the step that is under way is the last one of its loop."""
        return self._thread.step is not None and self._thread.step >= self._thread.total - 1

    def _end_step(self) -> None:
        self._end_last("step")

    def _end_last(self, kind: Kind) -> None:
        self.pop(next((each for each in reversed(self._thread.stack) if each.kind == kind), None))

    def _step_name(self, step: int) -> str:
        """With the timestep where it can be read without waiting: on the host, or when tracing has waited already."""
        copy, call = self._thread.timesteps, self._thread.call
        if copy is None or call is None or not (call.device.type == "cpu" or self.is_tracing):
            return f"denoising_step_{step}"
        return f"denoising_step_{step}_t{copy[step]:g}"

    def _move_windows(self) -> None:
        """Between two steps: begins and ends what is traced. The time that it takes belongs to no step."""
        thread = self._thread
        due = [window for window in self._windows if window.is_due(thread.seen, thread.total)]
        if due and thread.call is not None:
            taken = self._begin_moving()
            for window in due:
                window.before_step(thread.seen, thread.total, thread.call.pipeline)
            self.pop(taken)

    def _begin_moving(self) -> Range | None:
        taken = self.push("profiler", "profiler", is_marked=False)
        if self._thread.call is not None:
            synchronise(self._thread.call.device)  # else what was queued before runs on in the trace
        return taken

    # Ranges

    def push(self, kind: Kind, name: str, is_marked: bool = True, **facts: Any) -> Range | None:
        """A range begins; nothing does outside of a call."""
        thread = self._thread
        if thread.call is None:
            return None
        if is_marked:
            self.mark(name)
        parent = thread.stack[-1] if thread.stack else None
        made = Range(kind, name, thread.call.clock.now(), parent, is_marked, facts=facts)
        thread.stack.append(made)
        thread.call.ranges.append(made)
        return made

    def pop(self, ended: Range | None) -> None:
        """A range ends, and with it what is open inside it. Harmless when it has ended, or never began."""
        thread = self._thread
        if thread.call is None or ended is None or ended not in thread.stack:
            return
        while ended in thread.stack:
            inner = thread.stack.pop()
            inner.end = thread.call.clock.now()
            if inner.is_marked:
                self.unmark()
        if ended.kind == "stage" and ended.parent is None:
            self._checkpoint(f"after_{stages.sglang_name(ended.facts['stage'])}")

    def mark(self, name: str) -> None:
        """A range begins that is for traces alone, and not timed."""
        for window in self._windows:
            window.push(name)

    def unmark(self) -> None:
        """It ends."""
        for window in self._windows:
            window.pop()

    def _checkpoint(self, name: str) -> None:
        call = self._thread.call
        if call is not None:
            peak = call.memory[-1].peak_host_anon_mb if call.memory else 0.0
            call.memory.append(take_checkpoint(name, call.device, peak))
