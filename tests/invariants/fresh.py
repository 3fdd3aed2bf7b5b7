"""Whether a run is what it would be on a pipeline that never ran before."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from zoo import FAMILIES, Family

from .caches import Apply, skips_some


class Interrupted(Exception):
    """Raised on purpose in the middle of a run."""


def fresh_output(family: Family, apply: Apply, **kw: Any) -> torch.Tensor:
    """The output of a first run on a new, patched pipeline; its cache must have skipped something."""
    return _fresh_output(family.name, apply, tuple(sorted(kw.items()))).clone()


@functools.cache
def _fresh_output(name: str, apply: Apply, kw: tuple[tuple[str, Any], ...]) -> torch.Tensor:
    family = FAMILIES[name]
    pipe = family.make()
    patch = apply(pipe)
    output = family.run(pipe, **dict(kw))
    assert skips_some(patch), f"the cache skips nothing on {family.name}, so there is nothing to see"
    return output


def check_unaffected(family: Family, apply: Apply, disturb: Callable[[Any], None], **kw: Any) -> None:
    """Asserts that what happened before a run does not change it, nor keeps memory.

    Args:
        family: The pipeline's family.
        apply: Applies the cache.
        disturb: Does something to the patched pipeline, such as a run that fails.
        **kw: The run to be compared, as for `Family.call`.
    """
    expected = fresh_output(family, apply, **kw)
    pipe = family.make()
    patch = apply(pipe)
    disturb(pipe)
    gc.collect()
    assert patch.held_bytes() == 0, "tensors of a run that is over are still held"
    assert torch.equal(family.run(pipe, **kw), expected)


def failing_at(family: Family, pipe: Any, place: str, error: type[BaseException], at: int = 2) -> None:
    """Runs the pipeline, with an error at one of its steps.

    Args:
        family: The pipeline's family.
        pipe: The pipeline, left as it was but for the run.
        place: `"block"`, `"scheduler"` or `"callback"`.
        error: What is raised.
        at: At which step; for a block that a cache skips there, at the next step that is computed.
    """
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def raises(*args: Any, **kwargs: Any) -> Any:
        if place != "block":
            count()
        if calls > at:
            raise error("on purpose")
        return args[3] if place == "callback" else None

    given: dict[str, Any] = {"callback_on_step_end": raises} if place == "callback" else {}
    with contextlib.ExitStack() as stack:
        if place == "block":
            block = pipe.transformer.get_submodule(f"{family.block_lists[0]}.0")
            stack.enter_context(pipe.transformer.register_forward_pre_hook(count))
            stack.enter_context(block.register_forward_hook(raises))
        elif place == "scheduler":
            stack.enter_context(_BeforeEachStep(pipe.scheduler, raises))
        with pytest.raises(error, match="on purpose"):
            family.run(pipe, seed=5, **given)


class _BeforeEachStep:
    """Runs something before each step of one scheduler instance."""

    def __init__(self, scheduler: Any, before: Callable[[], Any]) -> None:
        self._scheduler, self._before = scheduler, before

    def __enter__(self) -> None:
        original = self._scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            self._before()
            return original(*args, **kwargs)

        self._scheduler.step = step

    def __exit__(self, *_: object) -> None:
        del self._scheduler.step
