"""Where the skipped blocks are given what they would have added, the output is the unpatched one.

The oracle knows the true residuals from a run without any cache, seen by plain hooks. With it a skipped step must lose
nothing, whatever the model does between its blocks; so what is tested is the wiring alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from invariants import count_blocks, cross, family_params
from sgl_diffusion_accel import apply_cache_dit
from sgl_diffusion_accel.caching.blocks.transformer_call import TransformerCall
from zoo import Family

STEPS = 4

Streams = dict[str, torch.Tensor]


class Truth:
    """The residuals of the spans at every transformer call of a run, by (transformer, call, list, stream's name)."""

    def __init__(self, family: Family, pipe: Any, fn: int, bn: int) -> None:
        self.family, self.pipe = family, pipe
        self.residuals: dict[tuple[str, int, int], list[torch.Tensor | None]] = {}
        self.calls: dict[str, int] = {}
        self.spans: dict[tuple[str, int], tuple[Any, Any]] = {}
        for component in family.transformers:
            lists = [list(getattr(getattr(pipe, component), name)) for name in family.block_lists]
            for index, blocks in enumerate(lists):
                start = fn if index == 0 else 0
                end = len(blocks) - (bn if index == len(lists) - 1 else 0)
                self.spans[component, index] = (blocks[start], blocks[end - 1])

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the calls of each transformer."""
        self.calls = dict.fromkeys(self.family.transformers, -1)

        def count(component: str) -> None:
            self.calls[component] += 1

        hooks = [
            getattr(self.pipe, component).register_forward_pre_hook(lambda *_, c=component: count(c))
            for component in self.calls
        ]
        yield
        for hook in hooks:
            hook.remove()

    def record(self, **kw: Any) -> torch.Tensor:
        """Runs the pipeline once and keeps the residuals."""
        hooks = []
        entering: dict[tuple[str, int], dict[str, Any]] = {}
        for (component, index), (first, last) in self.spans.items():

            def enters(block: Any, args: Any, kwargs: Any, key: Any = (component, index)) -> None:
                bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
                entering[key] = {name: v.clone() for name, v in bound.items() if isinstance(v, torch.Tensor)}

            def leaves(block: Any, args: Any, output: Any, key: Any = (component, index)) -> None:
                parts = output if isinstance(output, tuple) else (output,)
                residuals = _subtract(parts, entering[key])
                self.residuals[key[0], self.calls[key[0]], key[1]] = residuals

            hooks += [first.register_forward_pre_hook(enters, with_kwargs=True), last.register_forward_hook(leaves)]
        with self.counting():
            output = self.family.run(self.pipe, **kw)
        for hook in hooks:
            hook.remove()
        return output


def _subtract(parts: Any, given: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
    """Output minus the argument that it continues, known by the names that diffusers gives to the streams."""
    if len(parts) == 1:
        name = next(n for n in ("hidden_states", "x", "visual_embed") if n in given)
        return [parts[0] - given[name]]
    # two streams: told apart by their length; the text is the shorter one in every family of the zoo
    assert len(parts) == 2
    result: list[torch.Tensor | None] = []
    for part in parts:
        alike = [
            name
            for name in ("hidden_states", "encoder_hidden_states")
            if part is not None and given[name].shape == part.shape
        ]
        assert part is None or len(alike) == 1
        result.append(None if part is None else part - given[alike[0]])
    return result


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every prediction the truth."""

    def tell(truth: Truth) -> None:
        def predict(self: TransformerCall, history: Any, inputs: list[Any]) -> list[Any]:
            index = next(i for i, known in self._branch.histories.items() if known is history)
            component = self._key[0]
            residuals = truth.residuals[component, truth.calls[component], index]
            return [
                entering if residual is None else entering + residual
                for entering, residual in zip(inputs, residuals, strict=True)
            ]

        monkeypatch.setattr(TransformerCall, "_predict", predict)

    return tell


@cross("family, fn, bn", family_params(), [pytest.param(2, 1, id="F2B1"), pytest.param(1, 0, id="F1B0")])
def test_true_residuals_give_the_unpatched_output(family: Family, fn: int, bn: int, told: Any) -> None:
    pipe = family.make()
    truth = Truth(family, pipe, fn, bn)
    expected = truth.record(steps=STEPS)
    told(truth)
    # two experts: each computes its first step, as there is nothing to reuse before
    mask = [1] + [0] * (STEPS - 1)
    patch = apply_cache_dit(pipe, fn_compute_blocks=fn, bn_compute_blocks=bn, steps_mask=mask, steps_policy="static")
    with count_blocks(family, pipe) as counts, truth.counting():
        output = family.run(pipe, steps=STEPS)
    for component in family.transformers:
        calls = truth.calls[component] + 1
        branches = 1 if family.model_per_branch else len(family.branches)
        for index in range(len(family.block_lists)):
            for block in truth.spans[component, index]:
                ran = next(counts[k] for k in counts if _block(family, pipe, k) is block)
                assert ran == branches, f"{ran} of {calls} calls ran a block of the span"
    assert patch.stats.runs[-1].compute_share < 1
    assert torch.isfinite(output).all()
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def _block(family: Family, pipe: Any, key: tuple[str, str, int]) -> Any:
    return getattr(getattr(pipe, key[0]), key[1])[key[2]]
