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
from invariants import CACHES, NEVER_SKIPPING, Interrupted, cross, failing_at, families, family_params, skips_some
from invariants.caches import BY_TIME, NEEDS_NO_VALUE
from invariants.families import present
from sgl_diffusion_accel import CachePatch, apply_cache_dit, apply_teacache
from zoo import Family

PACKAGE = str(Path(sgl_diffusion_accel.__file__).parent)
TORCH = str(Path(torch.__file__).parent)

_METHODS = ("item", "tolist", "cpu", "nonzero", "equal", "allclose", "is_nonzero")
_CONVERSIONS = ("__bool__", "__float__", "__int__", "__index__", "__contains__", "__repr__", "__format__")
WAITING = {getattr(torch.Tensor, name) for name in _METHODS + _CONVERSIONS} | {torch.equal, torch.allclose}
"""Calls that wait for the device. `numpy` is not among them: it refuses tensors that are not on the host."""


class Waits(TorchFunctionMode):
    """Counts the calls that wait for the device and are made by the package's own code.

    Args:
        device: Kind of device that is waited for; None for any, so that a CPU stands for a GPU.
    """

    def __init__(self, device: str | None = None) -> None:
        self.places: list[str] = []
        self._device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in WAITING and self._device in (None, args[0].device.type):
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


def measured(patch: CachePatch) -> list[float]:
    """The changes that were measured in the last run."""
    return [c for branch in patch.stats.runs[-1].branches.values() for c in branch.changes if c is not None]


@cross("family, cache", family_params(), ["teacache", "reuse"])
def test_one_wait_for_each_measured_change(family: Family, cache: str) -> None:
    """None for the time embedding, whose changes are on their way before the first step."""
    places, patch = waits(family, CACHES[cache])
    assert measured(patch)
    expected = 0 if cache == "teacache" and family.name in BY_TIME else len(measured(patch))
    assert len(places) == expected, set(places)


@cross(
    "family, cache",
    family_params("wan", "flux", "cogvideox", "sd3", "zimage"),
    ["gap control", "adaptive", "plan", "plan, all steps"],
)
def test_error_is_asked_for_at_most_once_a_computed_step(family: Family, cache: str) -> None:
    """Of all branches together. What stands as a step's change is an estimate, which is made on the host."""
    places, patch = waits(family, {**CACHES, **NEVER_SKIPPING}[cache])
    (computed,) = {branch.computed for branch in patch.stats.runs[-1].branches.values()}
    of_errors = [place for place in places if "prediction_error" in place]
    assert len(of_errors) <= sum(computed)
    assert len(places) - len(of_errors) <= 1, "the timesteps that a plan is made for, once a run"
    assert len(places) < len(measured(patch)) or not places


@cross("family, cache", family_params("wan", "wan22", "flux", "zimage", "lumina2", "sd3"), NEEDS_NO_VALUE)
def test_no_wait_where_no_value_is_needed(family: Family, cache: str) -> None:
    places, patch = waits(family, {**CACHES, **NEVER_SKIPPING}[cache])
    assert not places
    assert not measured(patch)


@pytest.mark.parametrize(
    ("name", "retains"), [("wan", False), ("wan", True), ("wan22", False), ("wan22", True), ("cogvideox", False)]
)
def test_time_embedding_needs_no_wait_in_a_whole_run(name: str, retains: bool) -> None:
    family = present(name)

    def by_time(pipe: Any) -> CachePatch:
        return apply_teacache(pipe, 0.025, coefficients=[0, 0, 0, 1, 0], start_skipping=1, use_ret_steps=retains)

    places, patch = waits(family, by_time, steps=20)
    (computed,) = {branch.computed[1:-1] for branch in patch.stats.runs[-1].branches.values()}
    assert {*computed} == {True, False}
    assert len(measured(patch)) >= 17
    assert not places


FIRST_NORM = {
    "flux": "transformer_blocks.0.norm1",
    "hunyuan15": "transformer_blocks.0.norm1",
    "qwen": "transformer_blocks.0.img_norm1",
    "zimage": "layers.0.attention_norm1",
}


@families(*FIRST_NORM)
def test_modulated_input_is_taken_only_where_it_is_compared(family: Family) -> None:
    """At the steps that may be skipped, and at the one before them; a step after them costs nothing."""
    pipe = family.make()
    patch = apply_teacache(pipe, 0.5, coefficients=[0, 0, 0, 0, 1], start_skipping=4, end_skipping=6)
    norms: list[int] = []
    pipe.transformer.get_submodule(FIRST_NORM[family.name]).register_forward_hook(lambda *_: norms.append(1))
    family.run(pipe, steps=9)
    assert len(norms) == len(family.branches) * (9 + 3)
    for branch in patch.stats.runs[-1].branches.values():
        assert [change is not None for change in branch.changes] == [step in (4, 5) for step in range(9)]


@families("wan", "flux", "zimage")
def test_noise_levels_are_read_once_a_run(family: Family) -> None:
    def by_sigma(pipe: Any) -> CachePatch:
        mask = [1, 1, 0, 0, 1, 0, 0, 1]
        return apply_cache_dit(
            pipe, taylorseer_order=1, taylorseer_spacing="sigma", steps_mask=mask, steps_policy="static"
        )

    places, _ = waits(family, by_sigma, steps=8)
    assert len(places) == 1, places


def warned_of(family: Family, pipe: Any, given: dict[str, Any]) -> list[str]:
    """Where the package's own code made PyTorch wait for a GPU, by its own warnings."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            family.run(pipe, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{each.filename}:{each.lineno}" for each in seen if "synchronizing CUDA operation" in str(each.message)]
    return [place for place in places if place.startswith(PACKAGE)]


@pytest.mark.gpu
@families("wan", "wan22", "flux", "cogvideox")
def test_no_wait_on_a_gpu(family: Family) -> None:
    """The device is waited for where the code asks it for a value, and nowhere else: no copy that waits unseen.

    How many values are asked for is not the number of changes in the log: those of gap control and of plans are
    estimates, made on the host, and shared by the branches of a step. So what the calls ask for is counted in one run,
    and PyTorch's warnings in another that takes the same decisions; each such call on a CUDA tensor (`item`, `tolist`,
    `equal`) copies once and warns once. The first run is for what is made once.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda is not available")
    pipe = family.make().to("cuda")
    given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in family.call(pipe).items()}
    differing = {}
    for name, apply in {**CACHES, **NEVER_SKIPPING}.items():
        patch = apply(pipe)
        family.run(pipe, **given)
        with Waits("cuda") as asked:
            family.run(pipe, **given)
        warned = warned_of(family, pipe, given)
        if sorted(warned) != sorted(asked.places):
            differing[name] = (warned, asked.places)
        if name in NEEDS_NO_VALUE:
            assert not warned, name
        if name == "reuse":
            assert len(warned) == len(measured(patch)) > 0
    assert not differing


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


@cross("family, order", family_params("wan", "qwen", "flux", "hunyuan", "zimage", "flux2"), [1, 0, 2])
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
        # The first three steps make no slope: the newest of them is kept alone.
        kept = [min(1 + sum(branch[3 : step + 1]), order + 1) for branch in computed]
        expected = sum(signal + count * span for (signal, span), count in zip(sizes, kept, strict=True))
        assert held[step] == expected, f"step {step}"
    assert held[-1] == 0, "after its last step a run needs nothing"
    assert patch.held_bytes() == 0


@cross(
    "family, order",
    family_params("wan", "wan22", "cogvideox", "qwen", "flux", "hunyuan", matrix=["zimage", "flux2"]),
    [1, 0],
)
def test_teacache_keeps_no_time_embedding_and_one_modulated_input(family: Family, order: int) -> None:
    """Until the step after which nothing may be skipped, where everything goes."""
    pipe = family.make()
    sizes = returned_bytes(family, pipe)
    signal = 0 if family.name in BY_TIME else 1
    patch = apply_teacache(pipe, 0.15, coefficients=[0, 0, 0, 0, 0.1], start_skipping=2, taylorseer_order=order)
    held = at_steps(family, pipe, patch.held_bytes)
    records = next(iter(patch.stats.runs[-1].branches.values())).records
    for step in range(STEPS - 2):
        computed = [record.component for record in records[: step + 1] if record.computed]
        residuals = sum(min(computed.count(name), order + 1) for name in family.transformers)
        expected = sum(signal * (step >= 1) * hidden + residuals * span for hidden, span in sizes)
        assert held[step] == expected, f"step {step}"
    if len(family.transformers) == 1:  # what the first of two experts has kept goes with the run
        assert held[-2:] == [0, 0]
    assert patch.held_bytes() == 0
    assert skips_some(patch)


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *((name, "taylor") for name in ("wan", "flux", "hunyuan", "sd3", "kandinsky5")),
        *((name, "teacache") for name in ("wan", "flux", "kandinsky5")),
        ("flux", "magcache"),
        *((name, "gap control") for name in ("wan", "flux")),
    ],
)
def test_nothing_else_is_alive(name: str, cache: str) -> None:
    """Counted without the patch's help: in mid-run what it says it holds, and nothing after."""

    def total() -> int:
        return sum(alive().values())

    family = present(name)
    # The changes of the time embedding are one number for each step, and in the host's memory.
    table = 4 * STEPS if cache == "teacache" and family.name in BY_TIME else 0
    if cache == "gap control":  # two sums for each block list, until the next step asks for them
        table = 2 * 4 * len(family.block_lists)
    pipe = family.make()
    family.run(pipe)
    gc.collect()
    unpatched = at_steps(family, pipe, total, (4,))
    before = total()
    patch = CACHES[cache](pipe)
    seen = at_steps(family, pipe, lambda: (total(), patch.held_bytes()), (4,))
    for (bytes_alive, held), without in zip(seen, unpatched, strict=True):
        assert held > 0
        assert bytes_alive - without == held + table
    assert total() == before
    assert skips_some(patch)


@cross(
    "family, place, cache, error",
    family_params("wan", "zimage"),
    ["block", "scheduler", "callback"],
    [
        pytest.param("taylor", Interrupted, id="taylor"),
        pytest.param("taylor", KeyboardInterrupt, id="taylor, Ctrl-C"),
        pytest.param("teacache, Taylor", KeyboardInterrupt, id="teacache, Taylor"),
        pytest.param("magcache, Taylor", Interrupted, id="magcache, Taylor"),
        pytest.param("gap control", KeyboardInterrupt, id="gap control"),
    ],
)
def test_nothing_is_held_after_an_error(family: Family, place: str, cache: str, error: type[BaseException]) -> None:
    pipe = family.make()
    patch = CACHES[cache](pipe)
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
