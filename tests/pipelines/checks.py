"""What each kind of patch does with a pipeline, found by running it. What is wrong is an AssertionError."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from invariants.caches import adaptive
from sgl_diffusion_accel import (
    CachePatch,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_lossless,
    check_pipeline,
)
from sgl_diffusion_accel.errors import AccelError

from .base import Case
from .trace import Trace, denoisers
from .weights import off_by

YES = "yes"
Place = tuple[int, int, str, str, bool] | None
"""Run, step, branch, component and whether it is computed, as the library has it; None for a call without a place."""


@contextmanager
def placing(pipe: Any, patch: CachePatch) -> Iterator[list[Place]]:
    """Where the library places each call that is computed, in the order of the calls."""
    placed: list[Place] = []
    known: Counter[tuple[int, str]] = Counter()

    def note(*_: Any) -> None:
        new = []
        for number, run in enumerate(patch.stats.runs):
            for name, branch in run.branches.items():
                later = branch.records[known[number, name] :]
                new += [(number, each.step, name, each.component, each.computed) for each in later]
                known[number, name] = len(branch.records)
        placed.append(next((each for each in reversed(new) if each[4]), None))

    hooks = [part.register_forward_pre_hook(note) for part in denoisers(pipe).values()]
    try:
        yield placed
    finally:
        for hook in hooks:
            hook.remove()


def never_skipping(case: Case, pipe: Any, trace: Trace, unpatched: Tensor) -> dict[str, Any]:
    """Equal bit by bit; and each call is placed at its step and on its branch, or not at all."""
    patch = apply_adaptive_cache(pipe, tolerance=0)
    with placing(pipe, patch) as placed:
        got = case.run(pipe)
    assert torch.equal(got, unpatched), "the adaptive cache with tolerance 0 changes the output"
    assert len(placed) == len(trace.calls), f"{len(placed)} calls, and {len(trace.calls)} without a patch"
    outside, missing = sum(each is None for each in placed), dict(patch.stats.unplaced)
    assert outside == sum(missing.values()), f"{outside} calls have no place, and of {missing} it is told"
    branches = assert_places(trace, placed, patch)
    patch.remove()
    assert torch.equal(case.run(pipe), unpatched), "when removed, it is not as before"
    if outside == len(placed):
        return {"loop": f"not placed: {'; '.join(missing)}", "branches": []}
    said = f"; {outside} of {len(placed)} calls not placed: {'; '.join(missing)}" if outside else ""
    return {"loop": f"{YES}{said}", "branches": branches}


def assert_places(trace: Trace, placed: list[Place], patch: CachePatch) -> list[str]:
    """Each call that has a place is at the step where it was seen, and its branch is that of equal conditioning."""
    pairs = [
        (call, same, place) for call, same, place in zip(trace.calls, trace.branches(), placed, strict=True) if place
    ]
    runs: dict[int, int] = {}
    names: dict[Any, Any] = {}
    for call, same, (number, step, branch, component, _) in pairs:
        assert runs.setdefault(number, call.loop) == call.loop, f"run {number} goes on in another loop"
        assert step == call.step, f"a call of step {call.step} is placed at step {step}: {places_in_words(placed)}"
        assert component == call.component
        steps = patch.stats.runs[number].steps
        assert steps == trace.lengths[call.loop], f"a loop of {trace.lengths[call.loop]} steps is said to have {steps}"
        before = names.setdefault((same, component), branch)
        assert before == branch, f"one branch is called {before} and, at step {step}, {branch}"
    assert len(set(runs.values())) == len(runs), f"{len(runs)} runs are found in {len(set(runs.values()))} loops"
    of_branch: dict[Any, Any] = {}
    for (same, component), branch in names.items():
        known = of_branch.setdefault((same[0][0], component, branch), same)
        assert known == same, f"two branches have the name {branch}"
    return sorted(set(names.values()))


def places_in_words(placed: list[Place]) -> str:
    return ", ".join("-" if each is None else f"{each[0]}:{each[1]}{each[2]}" for each in placed[:24])


def whole_calls(case: Case, pipe: Any, trace: Trace, unpatched: Tensor) -> str:
    """Some calls of each branch are skipped, and the output is near; or why none is."""
    with adaptive(pipe) as patch, placing(pipe, patch) as placed:
        got = case.run(pipe)
    return _skipping(case, trace, patch, placed, got, unpatched)


def _skipping(case: Case, trace: Trace, patch: CachePatch, placed: list[Place], got: Tensor, unpatched: Tensor) -> str:
    run = len(placed)
    assert torch.isfinite(got).all(), "the output is not finite"
    if run == len(trace.calls):
        assert torch.equal(got, unpatched), "no call is skipped, and the output is another one"
        return why_in_full(patch)
    noted = [
        record.computed for each in patch.stats.runs for branch in each.branches.values() for record in branch.records
    ]
    assert run == sum(noted) + patch.stats.outside, f"{run} calls ran, and {sum(noted)} are noted as computed"
    never = [name for each in patch.stats.runs for name, branch in each.branches.items() if all(branch.computed)]
    off = relative(got, unpatched)
    assert 0 < off < case.near, f"the output is off by {off:.2g}"
    return f"{YES}, but for {', '.join(sorted(set(never)))}" if never else YES


def weights(case: Case, pipe: Any, trace: Trace) -> str:
    """A correction goes by how much each output weighs at the end: that is so on the whole pipeline."""
    if not case.may_replay:
        return "not tried"
    off = off_by(case, pipe, trace)
    # Rescaled and normalised guidance is not linear: there a weight is one of many.
    assert off is None or off < 0.5, f"the weight of an output is off by {off:.2g}"
    return "none" if off is None else YES


def why_in_full(patch: CachePatch) -> str:
    """What the patch says of calls that it does not skip: without a word of its own that is an error."""
    said = [remark for run in patch.stats.runs for _, remark in run.remarks if "computed in full" in remark]
    said += [f"not placed: {missing}" for missing in patch.stats.unplaced]
    assert said, f"nothing was skipped, and nobody is told: {patch}"
    return said[0]


def mask_of(steps: int) -> list[int]:
    """Which steps are computed: every other one, and the last."""
    return [int(step % 2 == 0 or step == steps - 1) for step in range(steps)]


def blocks(case: Case, pipe: Any, trace: Trace, unpatched: Tensor) -> str:
    """At the steps that a mask says, and at no others, the blocks are skipped; or why they are not."""
    lengths = {trace.lengths[call.loop] for call in trace.calls}
    if len(lengths) > 1:
        return "its loops differ in length, and a mask has one"
    mask = mask_of(lengths.pop())
    parts = denoisers(pipe)
    counts: Counter[tuple[str, str, int]] = Counter()
    hooks = [
        block.register_forward_hook(lambda *_, key=(name, path, index): counts.update([key]))
        for name, part in parts.items()
        for path, each in part.named_modules()
        if isinstance(each, nn.ModuleList)
        for index, block in enumerate(each)
    ]
    try:
        with apply_cache_dit(pipe, fn_compute_blocks=0, steps_mask=mask, steps_policy="static") as patch:
            got = case.run(pipe)
    except AccelError as error:
        return str(error)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.isfinite(got).all(), "the output is not finite"
    if torch.equal(got, unpatched):
        return why_in_full(patch)
    also = _also_computed(patch, mask)
    for name in parts:
        mine = [call for call in trace.calls if call.component == name and trace.is_in_loop(call)]
        due = sum(mask[call.step] for call in mine) + sum(component == name for component, _ in also)
        ran = {count for (component, _, _), count in counts.items() if component == name}
        assert not mine or due in ran, (
            f"{name}: blocks ran {sorted(ran)} times, and {due} of {len(mine)} calls were due"
        )
    off = relative(got, unpatched)
    assert 0 < off < case.near, f"with blocks skipped the output is off by {off:.2g}"
    reasons = sorted({reason for _, reason in also})
    return f"{YES}; in full also: {', '.join(reasons)}" if reasons else YES


def _also_computed(patch: CachePatch, mask: list[int]) -> list[tuple[str, str]]:
    """Calls that are computed where the mask skips, as (component, reason)."""
    records = [each for run in patch.stats.runs for branch in run.branches.values() for each in branch.records]
    outside = [("transformer", "no place")] * patch.stats.outside
    return outside + [(each.component, each.reason) for each in records if each.computed and not mask[each.step]]


def lossless(case: Case, pipe: Any, unpatched: Tensor) -> str:
    """What is cut changes the output by rounding alone."""
    with apply_lossless(pipe) as patch:
        got = case.run(pipe)
        acts = any(patch.stats.calls.values())
        why = "; ".join(dict.fromkeys(patch.left_alone.values()))
    off = relative(got, unpatched)
    assert off <= 1e-5, f"lossless changes the output by {off:.2g}"
    assert torch.equal(case.run(pipe), unpatched), "lossless, removed, is not as before"
    return YES if acts else why or "nothing to cut in these calls"


def relative(got: Tensor, expected: Tensor) -> float:
    """How far two outputs are from each other."""
    return float((got - expected).double().norm() / expected.double().norm().clamp_min(1e-30))


def beforehand(pipe: Any, found: dict[str, Any]) -> str:
    """What `check_pipeline` says of the loop and the branches is what came out; what it does not know it says so."""
    report = check_pipeline(pipe).loop
    is_placed = found["loop"].startswith(YES)
    assert is_placed or not report.is_placed, f"check_pipeline says {report.how!r}, and the loop is {found['loop']!r}"
    if not report.is_placed:
        assert "after the first run print(patch) tells" in report.how
        return "the source does not tell"
    unsaid = {branch.partition("#")[0] for branch in found["branches"]} - {*report.branches}
    assert not unsaid, f"check_pipeline says branches {report.branches}, and there is {unsaid}"
    return ", ".join(report.branches)
