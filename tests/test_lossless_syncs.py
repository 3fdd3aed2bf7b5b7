"""What a call asks of the device once its masks are known: each answer is waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from invariants import Snapshot, assert_same
from padded import CASES, Case, as_pipe, present, relative
from sgl_diffusion_accel import apply_lossless

torch.set_num_threads(1)

MOCHI = "MochiTransformer3DModel"
ALONE, PAIR = (9,), (9, 14)

_WAITING = ("aten._local_scalar_dense", "aten.nonzero.default", "aten.masked_select", "aten.equal")
_BY_MASK = ("aten.index.Tensor", "aten.index_put")


class Syncs:
    """Counts what would wait for the device: numbers and places of elements that are read from it."""

    def __init__(self) -> None:
        self.count = 0
        modes = (_Dispatched(self), _Called(self))
        self._modes: tuple[Any, ...] = modes

    def __enter__(self) -> Syncs:
        for each in self._modes:
            each.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for each in reversed(self._modes):
            each.__exit__(*error)


class _Dispatched(TorchDispatchMode):
    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        by_mask = name.startswith(_BY_MASK) and any(each is not None and each.dtype == torch.bool for each in args[1])
        self._syncs.count += name.startswith(_WAITING) or by_mask
        return function(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """What PyTorch answers before it dispatches anything, where the tensor is on the host."""

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._syncs.count += function in (Tensor.tolist, Tensor.cpu)
        return function(*args, **(kwargs or {}))


def syncs_of(run: Callable[[], Any]) -> int:
    with Syncs() as syncs:
        run()
    return syncs.count


ASKS = {
    "HunyuanVideoFramepackTransformer3DModel": (1, 2),  # how long a sample's text is
    "HunyuanVideo15Transformer3DModel": (13, 25),  # whether it is given a picture; 12 a sample to sort tokens
    "HunyuanImageTransformer2DModel": (8, 16),  # to sort tokens
    "NucleusMoEImageTransformer2DModel": (3, 3),  # how many tokens an expert has
    "Lumina2Transformer2DModel": (1, 1),  # how long a text is
    "BriaFibo2Transformer2DModel": (0, 1),
}
"""Classes that ask by themselves in each call: of one sample, of two. None of it lies in a block."""


@pytest.mark.parametrize("place", [0, 1], ids=["alone", "a pair"])
@pytest.mark.parametrize("name", CASES)
def test_call_asks_nothing_once_its_mask_is_known(name: str, place: int) -> None:
    case, lengths = present(name), (ALONE, PAIR)[place]
    model, given = case.make(), case.call(lengths)
    with apply_lossless(model):
        first = syncs_of(lambda: case.run(model, given))
        later = syncs_of(lambda: case.run(model, given))
    assert later == ASKS.get(name, (0, 0))[place]
    assert first > later


@pytest.mark.parametrize("lengths", [ALONE, PAIR, (24,), (24, 9)], ids=str)
def test_mochi_is_told_which_tokens_count(lengths: Sequence[int]) -> None:
    case = present(MOCHI)
    model, given = case.make(), case.call(lengths)
    expected = case.run(model, given)
    assert syncs_of(lambda: case.run(model, given)) == 2 * len(lengths), "one for each layer and sample"
    pipe = as_pipe(model)
    before = Snapshot(pipe)
    with apply_lossless(model) as patch:
        got = case.run(model, given)
        assert syncs_of(lambda: case.run(model, given)) == 0
        ((told, _),) = patch.stats.calls["transformer"].items()
        assert told.has_mask is (len(set(lengths)) > 1)
    assert relative(got, expected) < 1e-5
    assert torch.equal(got, expected) is (max(lengths) == 24), "the same tokens in the same order"
    assert_same(before, pipe)


def test_mochi_with_hidden_tokens_among_the_first_is_left_to_ask() -> None:
    case = present(MOCHI)
    model, given = case.make(), case.call(ALONE)
    given["encoder_attention_mask"][0, 4] = 0
    expected = case.run(model, given)
    with apply_lossless(model):
        assert relative(case.run(model, given), expected) < 1e-5
        assert syncs_of(lambda: case.run(model, given)) == 2


def test_mochi_with_another_processor_is_left_to_ask() -> None:
    case = present(MOCHI)
    model, given = case.make(), case.call(ALONE)
    expected = case.run(model, given)

    class Mine(type(model.transformer_blocks[0].attn1.processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    for block in model.transformer_blocks:
        block.attn1.processor = Mine()
    with apply_lossless(model) as patch:
        assert relative(case.run(model, given), expected) < 1e-5
        assert syncs_of(lambda: case.run(model, given)) == 2
        assert "others than diffusers' own" in str(patch)


def test_mochi_blocks_can_be_compiled() -> None:
    torch._dynamo.reset()
    case: Case = present(MOCHI)
    model, given = case.make(), case.call(PAIR)
    expected = case.run(model, given)
    with apply_lossless(model):
        for block in model.transformer_blocks:
            block.compile(backend="eager", fullgraph=True)
        for _ in range(2):
            assert relative(case.run(model, given), expected) < 1e-5
    torch._dynamo.reset()


def test_syncs_are_counted() -> None:
    values = torch.arange(4.0)
    for ask in (
        lambda: values[0].item(),
        lambda: values.nonzero(),
        lambda: values[values > 1],
        lambda: bool(values.any()),
        values.tolist,
        values.cpu,
    ):
        assert syncs_of(ask) == 1
    assert syncs_of(lambda: values[1:] * 2) == 0
