"""What each kind of patch does with a class, found by running it. What is wrong is an AssertionError that says so."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from invariants.caches import adaptive
from invariants.snapshot import Snapshot
from sgl_diffusion_accel import (
    CachePatch,
    apply_adaptive_cache,
    apply_cache_dit,
    apply_lossless,
    set_attention_backend,
)
from sgl_diffusion_accel.errors import AccelError
from sgl_diffusion_accel.lossless.constants.constant_table import ONCE_A_RUN, may_have_equal_timesteps
from sgl_diffusion_accel.lossless.padding.table import ROWS as CUT

from .base import Row
from .by_blocks import ByBlocks
from .loop import STEPS, Trace, arguments, run, tensors_of

YES = "yes"
MASK = [1, 0, 1, 0, 0, 1, 0, 0, 0, 1]
"""Steps that are computed where blocks are skipped."""


def never_skipping(row: Row, model: nn.Module, given: dict[str, Any], unpatched: Trace) -> str:
    """Caches that are told never to skip: equal bit by bit, and gone without a trace when removed."""
    before = Snapshot(_Alone(model))
    run(row, model, given)
    by_itself = _changed(before, model)  # a model may move its tables to the device anew at each call
    before, said = Snapshot(_Alone(model)), YES
    for apply in (_adaptive_0, _dbcache_0):
        try:
            with apply(model):
                assert_equal(run(row, model, given), unpatched, apply.__doc__)
        except AccelError as error:
            if apply is not _dbcache_0:
                raise
            said = str(error)
        left = [each for name, each in _changed(before, model).items() if name not in by_itself]
        assert not left, f"{apply.__doc__} leaves {left[:3]}"
        assert_equal(run(row, model, given), unpatched, f"{apply.__doc__}, removed")
    return said


def _adaptive_0(model: nn.Module) -> Any:
    """adaptive cache, tolerance 0"""
    return apply_adaptive_cache(model, tolerance=0)


def _dbcache_0(model: nn.Module) -> Any:
    """DBCache, threshold 0"""
    return apply_cache_dit(model, residual_diff_threshold=0.0, max_warmup_steps=1, fn_compute_blocks=1)


def whole_calls(row: Row, model: nn.Module, unpatched: Trace) -> str:
    """A skipped call is what follows from the last two computed outputs, by three quarters of their slope.

    Or why none is skipped. Its form is that of the class's own output.
    """
    given = arguments(row, model, as_tuple=False)
    with adaptive(model) as patch:
        trace = run(row, model, given)
    skipped = [step for step in range(STEPS) if step not in trace.computed]
    if not skipped:
        assert_equal(trace, unpatched, "a run of which nothing was skipped")
        return _why_in_full(patch)
    for step in skipped:
        last, earlier = sorted((done for done in trace.computed if done < step), reverse=True)[:2]
        ahead = 0.75 * (step - last) / (last - earlier)
        expected = [
            one + ahead * (one - two) for one, two in zip(trace.computed[last], trace.computed[earlier], strict=True)
        ]
        _assert_close(trace.outputs[step], expected, f"skipped call {step}")
    first = skipped[0]  # until there the run is the unpatched one
    assert not _is_equal(trace.outputs[first], unpatched.outputs[first]), "a prediction is what would have come anyway"
    return YES


def blocks(row: Row, model: nn.Module, given: dict[str, Any], unpatched: Trace) -> str:
    """A step whose blocks are skipped is what `ByBlocks` works out; or why blocks are not cached."""
    counts: Counter[nn.Module] = Counter()
    watched = [block for name in row.lists for block in getattr(model, name)]
    hooks = [block.register_forward_hook(lambda block, *_: counts.update([block])) for block in watched]
    try:
        with apply_cache_dit(model, fn_compute_blocks=0, steps_mask=MASK, steps_policy="static") as patch:
            trace = run(row, model, given)
    except AccelError as error:
        return str(error)
    finally:
        for hook in hooks:
            hook.remove()
    ran = {counts[block] for block in watched}
    if ran == {STEPS}:
        return _why_in_full(patch)
    assert ran == {sum(MASK)}, f"blocks ran {sorted(ran)} times of {STEPS}, and {sum(MASK)} steps were computed"
    oracle = ByBlocks(row, model)
    for step, (call, is_computed) in enumerate(zip(trace.calls, MASK, strict=True)):
        expected = oracle.computed(call) if is_computed else oracle.skipped(call)
        _assert_close(trace.outputs[step], expected, f"step {step}")
    first = MASK.index(0)
    assert not _is_equal(trace.outputs[first], unpatched.outputs[first]), "a skipped step is what it would be anyway"
    return YES


def _why_in_full(patch: CachePatch) -> str:
    """What the patch says of calls that it does not skip: without a word of its own that is an error."""
    said = [remark for _, remark in patch.stats.runs[-1].remarks if "is computed in full" in remark]
    assert said, f"nothing was skipped, and nobody is told: {patch}"
    return said[0]


def lossless(row: Row, model: nn.Module, given: dict[str, Any]) -> str:
    """What is cut changes a call by rounding; a class of which nothing is cut keeps every bit."""
    with torch.no_grad():
        expected = _read(row, model(**given))
        with apply_lossless(model) as patch:
            got = _read(row, model(**given))
            shown, why = str(patch), patch.left_alone.get("transformer")
    is_double = next(model.parameters()).dtype == torch.float64
    _assert_close(got, expected, "a call with its padding cut", 1e-12 if is_double else 1e-5)
    assert (row.name in CUT) is (why is None), shown
    assert why is not None or not _is_equal(got, expected), f"nothing was cut: {shown}"
    return "; ".join(filter(None, [YES if why is None else "", _constants(row, model), why]))


def _constants(row: Row, model: nn.Module) -> str:
    constants = ONCE_A_RUN.get(row.name)
    said = []
    if constants is not None and not constants.why_not(model):
        said = ["keys and values of the text once" if constants.blocks else "a part that is constant in a run, once"]
    return "; ".join(said + ["one timestep for equal ones"] * may_have_equal_timesteps(row.name))


def attention(row: Row, model: nn.Module, given: dict[str, Any]) -> str:
    """Another backend gives the same to rounding."""
    with torch.no_grad():
        expected = _read(row, model(**given))
        try:
            with set_attention_backend(model, "math") as patch:
                _assert_close(_read(row, model(**given)), expected, "attention by `math`", 1e-4)
                assert sum(patch.calls["transformer"].values()), f"it did not act: {patch}"
                assert not patch.fallbacks
        except AccelError as error:
            return str(error)
        assert _is_equal(_read(row, model(**given)), expected), "the backend is not gone when removed"
    return YES


def _read(row: Row, output: Any) -> list[Tensor]:
    """What is read of an output."""
    return [tensor[:, row.unread :] if row.unread else tensor for tensor in tensors_of(output)]


class _Alone:
    """A model where a snapshot takes a pipeline."""

    scheduler = None

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def components(self) -> dict[str, nn.Module]:
        return {"transformer": self._model}


def _changed(before: Snapshot, model: nn.Module) -> dict[str, str]:
    """What has changed of a model, by name."""
    differences = before.differences(Snapshot(_Alone(model)))
    return {each.partition("]:")[0].partition(" is ")[0]: each for each in differences}


def _is_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def assert_equal(trace: Trace, expected: Trace, what: str | None) -> None:
    pairs = zip(trace.outputs, expected.outputs, strict=True)
    unequal = [step for step, (got, wanted) in enumerate(pairs) if not _is_equal(got, wanted)]
    assert not unequal, f"{what}: steps {unequal} differ from the unpatched ones"


def _assert_close(got: list[Tensor], expected: list[Tensor], what: str, tolerance: float = 2e-5) -> None:
    assert [each.shape for each in got] == [each.shape for each in expected], f"{what}: other shapes"
    for one, two in zip(got, expected, strict=True):
        off = float((one - two).double().norm() / two.double().norm().clamp_min(1e-30))
        assert off <= tolerance, f"{what} is off by {off:.1e}"
