"""Stands in front of what a pipeline calls, and tells the recorder when it begins and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion_accel.caching.cache_patch import CachePatch
from sgl_diffusion_accel.caching.parts.stats import StepRecord
from sgl_diffusion_accel.loop.session import Session, Where
from sgl_diffusion_accel.patch import patches_of
from sgl_diffusion_accel.profiling.recording import stages
from sgl_diffusion_accel.profiling.recording.block_marks import BlockMarks
from sgl_diffusion_accel.profiling.recording.recorder import Range, Recorder
from sgl_diffusion_accel.targets import model_class, unwrap


class Probe:
    """A handler that changes nothing, and sees what all others do: a range from the beginning to the end of each call.

    Args:
        recorder: Is told.
    """

    is_watching = True

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begins a call."""

    def leave(self, module: Any, token: Any, output: Any) -> Any:
        """Ends it."""
        self.end(module, token)
        return output

    def fail(self, module: Any, token: Any) -> None:
        """Ends a call that raised."""
        self.end(module, token)

    def end(self, module: Any, token: Any) -> None:  # noqa: ARG002
        """Ends a call, however it went."""
        self._recorder.pop(token)


class PipelineProbe(Probe):
    """In front of a pipeline: the beginning and the end of its calls.

    Args:
        recorder: Is told.
        prepare: Called before each call, since components may have been exchanged since the last one.
    """

    def __init__(self, recorder: Recorder, prepare: Callable[[], None]) -> None:
        super().__init__(recorder)
        self._prepare = prepare

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:  # noqa: ARG002
        """Begins a call, but for one inside another."""
        call = self._recorder.call
        if call is not None and call.is_whole:
            return False
        self._prepare()
        device = getattr(module, "_execution_device", None)
        self._recorder.begin_call(type(module).__name__, device if device is not None else torch.device("cpu"))
        return True

    def end(self, module: Any, token: Any) -> None:  # noqa: ARG002
        """Ends it."""
        if token:
            error = sys.exc_info()[1]
            self._recorder.end_call(None if error is None else f"{type(error).__name__}: {error}"[:200])

    def leave(self, module: Any, token: Any, output: Any) -> Any:  # noqa: ARG002
        """Ends it; an error that its caller is handling meanwhile is not the call's."""
        if token:
            self._recorder.end_call()
        return output


class StageProbe(Probe):
    """In front of what makes a stage of its own: an encoder, a VAE's method, a processor's.

    Args:
        recorder: Is told.
        pipe: The pipeline.
        stage: The stage.
        label: What is called.
    """

    def __init__(self, recorder: Recorder, pipe: Any, stage: str, label: str) -> None:
        super().__init__(recorder)
        self._pipe = pipe
        self._stage = stage
        self._label = label

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Range | None:  # noqa: ARG002
        """Begins a stage, or inside one only a range with its label."""
        recorder = self._recorder
        if self._stage == stages.DECODE and (recorder.is_last_step() or getattr(self._pipe, "_interrupt", False)):
            recorder.end_loop()  # the pipeline has left its loop without a scheduler's last step
        name = self._label if recorder.is_inside else f"stage_{stages.sglang_name(self._stage)}"
        return recorder.push("stage", name, stage=self._stage, label=self._label)


class SchedulerProbe(Probe):
    """In front of a scheduler's `step`; after the last one the denoising loop is over."""

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Range | None:  # noqa: ARG002
        """Begins a step of the scheduler, inside a denoising loop alone."""
        return self._recorder.push("scheduler", "scheduler") if self._recorder.loop is not None else None

    def leave(self, module: Any, token: Any, output: Any) -> Any:
        """Ends it, and with the last one the loop."""
        self.end(module, token)
        if token is not None and self._recorder.is_last_step():
            self._recorder.end_loop()
        return output


class LoopProbe(Probe):
    """In front of what is called in a denoising loop: knows the run and the step of a call.

    Args:
        recorder: Is told.
        session: The runs that are under way, shared by the probes of a profile.
        component: What is called, such as `"transformer_2"`.
        watch: Called with the scheduler of a new run.
    """

    def __init__(self, recorder: Recorder, session: Session, component: str, watch: Callable[[Any], None]) -> None:
        super().__init__(recorder)
        self._session = session
        self._component = component
        self._watch = watch

    def locate(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Where | None:
        """Tells the run, step and branch of a call, and begins the step; None outside of any loop."""
        where = self._session.enter(self._component, module, args, kwargs)
        if where is None:
            return None
        if where.is_new:
            self._watch(where.run.scheduler)
        if self._recorder.call is None:
            self._recorder.begin_call(model_class(unwrap(module)).__name__, _device_of(args, kwargs), is_whole=False)
        self._recorder.enter_step(where.run, where.step)
        return where


class ControlProbe(LoopProbe):
    """In front of a ControlNet, which runs in a denoising step before the transformer."""

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Range | None:
        """Begins a call, and with it the step."""
        self.locate(module, args, kwargs)
        return self._recorder.push("control", "controlnet")


class TransformerProbe(LoopProbe):
    """In front of a transformer: which branch of which step, and what a cache did in it.

    Args:
        recorder: Is told.
        session: The runs that are under way.
        component: Which transformer, such as `"transformer_2"`.
        watch: Called with the scheduler of a new run.
        marks: Of its blocks.
    """

    def __init__(
        self, recorder: Recorder, session: Session, component: str, watch: Callable[[Any], None], marks: BlockMarks
    ) -> None:
        super().__init__(recorder, session, component, watch)
        self._marks = marks

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Range | None:
        """Begins a call."""
        where = self.locate(module, args, kwargs)
        if where is None:
            return self._recorder.push("transformer", self._component, component=self._component, branch=None)
        name, branch = f"{self._component} ({where.branch})", where.branch
        return self._recorder.push("transformer", name, component=self._component, branch=branch, step=where.step)

    def leave(self, module: Any, token: Range | None, output: Any) -> Any:
        """Ends it, with what the cache did."""
        if token is not None and token.facts["branch"] is not None:
            decision = decision_of(module, token.facts["step"], token.facts["branch"])
            token.facts["decision"] = decision
            self._marks.close()
            if decision is not None:
                self._recorder.mark(f"cache: {'compute' if decision.computed else 'skip'} ({decision.reason})")
                self._recorder.unmark()
        self.end(module, token)
        return output

    def end(self, module: Any, token: Range | None) -> None:  # noqa: ARG002
        """Ends it."""
        self._marks.close()
        self._recorder.pop(token)


class BlockProbe(Probe):
    """In front of one block.

    Args:
        recorder: Is told.
        marks: Of its transformer.
        list_name: Name of its list.
        index: Its index there.
        is_last: Whether the list ends with it.
    """

    def __init__(self, recorder: Recorder, marks: BlockMarks, list_name: str, index: int, is_last: bool) -> None:
        super().__init__(recorder)
        self._marks = marks
        self._list_name = list_name
        self._index = index
        self._is_last = is_last

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:  # noqa: ARG002
        """Begins a block."""
        return self._marks.open(self._list_name, self._index)

    def end(self, module: Any, token: Any) -> None:  # noqa: ARG002
        """Ends it."""
        if token:
            self._marks.shut(self._is_last)


def decision_of(module: nn.Module, step: int, branch: str) -> StepRecord | None:
    """What the cache on a transformer did at the call that has just ended, None without a cache."""
    for patch in patches_of(unwrap(module)):
        run = patch.run_here if isinstance(patch, CachePatch) else None
        known = run.branches.get(branch) if run is not None else None
        if known is not None and known.records and known.records[-1].step == step:
            record: StepRecord = known.records[-1]
            return record
    return None


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
