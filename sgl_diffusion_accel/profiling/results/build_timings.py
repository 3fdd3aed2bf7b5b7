"""Makes a report of what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sgl_diffusion_accel.profiling.recording import stages
from sgl_diffusion_accel.profiling.recording.recorder import Call, Range
from sgl_diffusion_accel.profiling.results.timings import BranchTiming, CallReport, StageTiming, StepTiming

Within = Callable[[Range], tuple[float, float]]


def build(call: Call, remarks: Sequence[str] = ()) -> CallReport:
    """Turns a call that has ended into its report.

    Args:
        call: The call; its clock is settled here, which waits for the device.
        remarks: What else is to be said of it.
    """
    call.clock.settle()

    def within(found: Range) -> tuple[float, float]:
        """Beginning and end of a range, from the beginning of the call."""
        begin = call.clock.milliseconds(call.begin, found.begin)
        return begin, begin + call.clock.milliseconds(found.begin, found.end)

    ranges = [each for each in call.ranges if each.end is not None]
    loops = [each for each in ranges if each.kind == "loop"]
    steps = tuple(_step(each, ranges, within) for each in ranges if each.kind == "step")
    profiler_ms = sum(_length(within(each)) for each in ranges if each.kind == "profiler")
    expected = sum(loop.facts["steps"] for loop in loops)
    return CallReport(
        pipeline=call.pipeline,
        device=str(call.device),
        clock=call.clock.name,
        total_ms=call.clock.milliseconds(call.begin, call.end) - profiler_ms,
        stages=_stages(ranges, within),
        steps=steps,
        profiler_ms=profiler_ms,
        memory=tuple(call.memory),
        is_whole=call.is_whole,
        is_complete=call.error is None and len(steps) == expected,
        error=call.error,
        remarks=tuple(remarks) + _remarks(call, len(steps), expected),
    )


def _length(span: tuple[float, float]) -> float:
    return span[1] - span[0]


def _stages(ranges: list[Range], within: Within) -> tuple[StageTiming, ...]:
    """The outermost stages and the loops, by name; what a profiler took in a loop is taken out of it."""
    spans: dict[str, list[tuple[float, float]]] = {}
    spent: dict[str, float] = {}
    for each in ranges:
        if each.kind == "loop" or (each.kind == "stage" and each.parent is None):
            name = stages.DENOISING if each.kind == "loop" else str(each.facts["stage"])
            spans.setdefault(name, []).append(within(each))
            inside = (inner for inner in ranges if inner.kind == "profiler" and inner.parent is each)
            spent[name] = spent.get(name, 0.0) + sum(_length(within(inner)) for inner in inside)
    return tuple(
        StageTiming(name, sum(map(_length, found)) - spent[name], tuple(found)) for name, found in spans.items()
    )


def _step(step: Range, ranges: list[Range], within: Within) -> StepTiming:
    inside = [each for each in ranges if each.parent is step]
    begin, end = within(step)
    index = int(step.facts["index"])

    def spent(kind: str) -> float:
        return sum(_length(within(each)) for each in inside if each.kind == kind)

    return StepTiming(
        index=index,
        timestep=step.facts["timesteps"][index],
        begin_ms=begin,
        duration_ms=end - begin,
        branches=tuple(_branch(each, within) for each in inside if each.kind == "transformer" and each.facts["branch"]),
        scheduler_ms=spent("scheduler"),
        control_ms=spent("control"),
        traced=bool(step.facts["traced"]),
    )


def _branch(call: Range, within: Within) -> BranchTiming:
    begin, end = within(call)
    decision: Any = call.facts.get("decision")
    return BranchTiming(
        name=str(call.facts["branch"]),
        component=str(call.facts["component"]),
        begin_ms=begin,
        duration_ms=end - begin,
        computed=None if decision is None else decision.computed,
        reason=None if decision is None else decision.reason,
        change=None if decision is None else decision.change,
    )


def _remarks(call: Call, steps: int, expected: int) -> tuple[str, ...]:
    found = []
    if call.error is not None:
        found.append(f"incomplete: {call.error}")
    elif steps < expected:
        found.append(f"incomplete: {steps} of {expected} denoising steps ran")
    if not call.is_whole:
        found.append("only the denoising loop was seen: the call was not that of the profiled pipeline")
    if not steps:
        found.append("no denoising loop was seen: no method of a diffusers pipeline called the transformer in one")
    return tuple(found)
