"""What a cache asks of the device, and what it keeps in memory."""

from __future__ import annotations

import gc
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import sgl_diffusion_accel
from invariants import CACHES, NEVER_SKIPPING, Interrupted, failing_at, families, skips_some
from invariants.families import present
from sgl_diffusion_accel import CachePatch, apply_cache_dit
from zoo import Family

PACKAGE = str(Path(sgl_diffusion_accel.__file__).parent)
TORCH = str(Path(torch.__file__).parent)

_METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "equal", "allclose", "is_nonzero")
_CONVERSIONS = ("__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__", "__repr__", "__format__")
WAITING = {getattr(torch.Tensor, name) for name in _METHODS + _CONVERSIONS} | {torch.equal, torch.allclose}
"""Calls that wait for the device."""


class Waits(TorchFunctionMode):
    """Counts the calls that wait for the device and are made by the package's own code."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in WAITING:
            frame = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename.startswith(TORCH):
                frame = frame.f_back
            if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
                self.places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return function(*args, **(kwargs or {}))


def waits(family: Family, apply: Any, **kw: Any) -> tuple[list[str], CachePatch]:
    pipe = family.make()
    patch = apply(pipe)
    with Waits() as seen:
        family.run(pipe, **kw)
    return seen.places, patch


@families()
def test_one_wait_for_each_measured_change(family: Family) -> None:
    places, patch = waits(family, CACHES["reuse"])
    changes = [c for branch in patch.stats.runs[-1].branches.values() for c in branch.changes if c is not None]
    assert changes
    assert len(places) == len(changes), set(places)


@families("wan", "wan22", "flux", "zimage", "lumina2", "sd3")
@pytest.mark.parametrize("apply", [*NEVER_SKIPPING.values(), CACHES["static"]], ids=[*NEVER_SKIPPING, "static"])
def test_no_wait_where_no_value_is_needed(family: Family, apply: Any) -> None:
    places, _ = waits(family, apply)
    assert not places


@families("wan", "flux", "zimage")
def test_noise_levels_are_read_once_a_run(family: Family) -> None:
    def by_sigma(pipe: Any) -> CachePatch:
        mask = [1, 1, 0, 0, 1, 0, 0, 1]
        return apply_cache_dit(
            pipe, taylorseer_order=1, taylorseer_spacing="sigma", steps_mask=mask, steps_policy="static"
        )

    places, _ = waits(family, by_sigma, steps=8)
    assert len(places) == 1, places


@pytest.mark.gpu
@families("wan", "flux")
def test_no_wait_on_a_gpu(family: Family) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda is not available")
    pipe = family.make().to("cuda")
    given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in family.call(pipe).items()}
    for apply in (NEVER_SKIPPING["threshold 0"], CACHES["static"], CACHES["reuse"]):
        patch = apply(pipe)
        family.run(pipe, **given)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                family.run(pipe, **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ours = [warning for warning in seen if warning.filename.startswith(PACKAGE)]
        changes = [c for b in patch.stats.runs[-1].branches.values() for c in b.changes if c is not None]
        assert len(ours) == len(changes)


# Memory


def alive() -> dict[int, int]:
    """Bytes of every storage that a tensor known to Python refers to, by address."""
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}


STEPS = 7


def at_steps(family: Family, pipe: Any, read: Any, steps: Any = range(STEPS)) -> list[Any]:
    """What `read` gives after some steps of a run."""
    seen: list[Any] = []

    def look(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step in steps:
            seen.append(read())
        return values

    family.run(pipe, steps=STEPS, callback_on_step_end=look)
    return seen


def returned_bytes(family: Family, pipe: Any) -> list[tuple[int, int]]:
    """For each branch, the bytes of the hidden states, and of all tensors that the block lists return together."""
    seen: list[list[int]] = []

    def measure(module: Any, args: Any, output: Any, first: bool) -> None:
        sizes = [part.numel() * part.element_size() for part in (output if isinstance(output, tuple) else (output,))]
        if first:
            seen.append([max(sizes), 0])
        seen[-1][1] += sum(sizes)

    hooks = [
        getattr(pipe.transformer, name)[0].register_forward_hook(lambda *call, i=i: measure(*call, first=i == 0))
        for i, name in enumerate(family.block_lists)
    ]
    family.run(pipe, steps=1)
    for hook in hooks:
        hook.remove()
    return [(hidden, every) for hidden, every in seen]


@families("wan", "qwen", "flux", "hunyuan", "zimage", "flux2")
@pytest.mark.parametrize("order", [0, 1, 2])
def test_signal_and_residuals_are_all_that_is_kept(family: Family, order: int) -> None:
    pipe = family.make()
    sizes = returned_bytes(family, pipe)
    patch = apply_cache_dit(
        pipe, residual_diff_threshold=10.0, max_warmup_steps=3, max_continuous_cached_steps=1, taylorseer_order=order
    )
    held = at_steps(family, pipe, patch.held_bytes)
    computed = [branch.computed for branch in patch.stats.runs[-1].branches.values()]
    assert len(computed) == len(family.branches)
    for step in range(STEPS - 1):
        counts = [sum(branch[: step + 1]) for branch in computed]
        # From the third on the first computed step is left out, where it would be used.
        kept = [min(count - (order >= 2 and count >= 3), order + 1) for count in counts]
        expected = sum(signal + count * span for (signal, span), count in zip(sizes, kept, strict=True))
        assert held[step] == expected, f"step {step}"
    assert held[-1] == 0, "after its last step a run needs nothing"
    assert patch.held_bytes() == 0


@families("wan", "flux", "hunyuan", "sd3", "kandinsky5")
def test_nothing_else_is_alive(family: Family) -> None:
    """Counted without the patch's help: in mid-run what it says it holds, and nothing after."""

    def total() -> int:
        return sum(alive().values())

    pipe = family.make()
    family.run(pipe)
    gc.collect()
    unpatched = at_steps(family, pipe, total, (4,))
    before = total()
    patch = CACHES["taylor"](pipe)
    seen = at_steps(family, pipe, lambda: (total(), patch.held_bytes()), (4,))
    for (bytes_alive, held), without in zip(seen, unpatched, strict=True):
        assert held > 0
        assert bytes_alive - without == held
    assert total() == before
    assert skips_some(patch)


@families("wan", "zimage")
@pytest.mark.parametrize("place", ["block", "scheduler", "callback"])
@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_nothing_is_held_after_an_error(family: Family, place: str, error: type[BaseException]) -> None:
    pipe = family.make()
    patch = CACHES["taylor"](pipe)
    failing_at(family, pipe, place, error)
    gc.collect()
    before = alive()
    failing_at(family, pipe, place, error, at=4)
    assert patch.held_bytes() == 0
    assert sum(alive().values()) == sum(before.values())


def test_nothing_is_held_after_an_interrupt() -> None:
    family = present("wan")
    pipe = family.make()
    patch = CACHES["taylor"](pipe)

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            assert patch.held_bytes() > 0
            pipe._interrupt = True
        return values

    family.run(pipe, callback_on_step_end=stop)
    assert patch.held_bytes() == 0
    assert [len(branch.computed) for branch in patch.stats.runs[-1].branches.values()] == [3, 3]


def test_nothing_is_held_while_an_error_is_looked_at() -> None:
    """A notebook keeps the last traceback, with the frames and their variables; the cache lets go all the same."""
    family = present("wan")
    pipe = family.make()
    patch = CACHES["taylor"](pipe)

    def fail(*args: Any) -> dict[str, Any]:
        if args[1] == 3:
            raise Interrupted
        return args[3]

    with pytest.raises(Interrupted) as caught:
        family.run(pipe, callback_on_step_end=fail)
    assert caught.value.__traceback__ is not None
    family.run(pipe)
    assert patch.held_bytes() == 0, "the next run has ended, and the failed one still holds tensors"
