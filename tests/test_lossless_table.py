"""The table of padding: rows are exact, classes of diffusers with a mask are known, the page says the same."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from padded import CASES, Case, present, relative
from padded.base import LENGTH
from sgl_diffusion_accel import apply_lossless
from sgl_diffusion_accel.lossless.padding.left_alone import LEFT_ALONE, marks_of, why_left_alone
from sgl_diffusion_accel.lossless.padding.table import ROWS

torch.set_num_threads(1)

LENGTHS = {"alone": (9,), "a pair of equal lengths": (9, 9), "a pair of unequal lengths": (9, 14)}
FLOAT32 = 1e-5
"""Largest relative difference of a call."""


def case(name: str) -> Any:
    missing = CASES[name].missing()
    return pytest.param(CASES[name], id=name, marks=[pytest.mark.skip(reason=missing)] if missing else [])


cases = pytest.mark.parametrize("case", [case(name) for name in CASES])
lengths = pytest.mark.parametrize("lengths", list(LENGTHS.values()), ids=list(LENGTHS))


class AttentionCalls(TorchFunctionMode):
    """Counts the attention calls in some blocks."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.all = self.masked = self._inside = 0
        self._hooks = [block.register_forward_pre_hook(lambda *_: self._step(1)) for block in blocks]
        self._hooks += [block.register_forward_hook(lambda *_: self._step(-1)) for block in blocks]

    def _step(self, by: int) -> None:
        self._inside += by

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention and self._inside:
            self.all += 1
            self.masked += ((kwargs or {}).get("attn_mask") if len(args) < 4 else args[3]) is not None
        return function(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()


@contextmanager
def lossless(model: nn.Module, **settings: Any) -> Iterator[Any]:
    with apply_lossless(model, **settings) as patch:
        yield patch


def with_loud_pads(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The same call with its padding ten times as large, found without the library's own reading."""
    changed = dict(given)
    for stream in ROWS[name].streams:
        mark = given[stream.mark]
        if stream.mark == "text_lens":
            counts = torch.arange(given["text_bth"].shape[1])[None] < mark[:, None]
        elif stream.mark == "image_embeds":
            continue  # its padding is zero
        else:
            counts = mark >= 0 if stream.mark == "segment_ids" else mark.bool()
        for tokens in stream.tokens:
            if given[tokens].is_floating_point():
                places = counts.view(len(counts), *[1] * (stream.axis - 1), -1)
                places = places.view(*places.shape, *[1] * (given[tokens].ndim - places.ndim))
                changed[tokens] = torch.where(places, given[tokens], 10 * given[tokens])
                assert not torch.equal(changed[tokens], given[tokens])
    return changed


@cases
@lengths
def test_call_without_padding_gives_the_same(case: Case, lengths: Sequence[int]) -> None:
    model, given = case.make(), case.call(lengths)
    whole = case.run(model, given)
    with lossless(model) as patch:
        trimmed = case.run(model, given)
        ((told, calls),) = patch.stats.calls["transformer"].items()
    assert calls == 1
    assert all(after < before for _, before, after in told.tokens), told
    assert relative(trimmed, whole) < (FLOAT32 if case.dtype == torch.float32 else 1e-12)
    assert not torch.equal(trimmed, whole), "nothing was cut"
    assert torch.equal(case.run(model, given), whole)


@cases
def test_one_token_is_enough(case: Case) -> None:
    """An empty prompt has one: the start of the sequence."""
    model, given = case.make(), case.call((9,))
    for mark in {stream.mark for stream in ROWS[case.name].streams}:
        if mark == "text_lens":
            given[mark] = torch.tensor([1])
        elif mark == "segment_ids":
            given[mark][:, :LENGTH] = torch.where(torch.arange(LENGTH) < LENGTH - 1, -1, 1)
        elif mark != "image_embeds":
            given[mark] = torch.zeros_like(given[mark])
            given[mark][:, 0] = 1
    whole = case.run(model, given)
    with lossless(model) as patch:
        assert relative(case.run(model, given), whole) < (FLOAT32 if case.dtype == torch.float32 else 1e-12)
        ((told, _),) = patch.stats.calls["transformer"].items()
    assert told.tokens, told


@cases
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32, torch.bfloat16], ids=str)
def test_mask_of_any_type_is_taken_as_the_model_takes_it(case: Case, dtype: torch.dtype) -> None:
    """Attention adds a mask of numbers to its scores, where a model hands it on as it is."""
    model, given = case.make(), case.call((9,))
    for stream in ROWS[case.name].streams:
        if stream.mark not in ("segment_ids", "text_lens", "image_embeds"):
            given[stream.mark] = given[stream.mark].to(dtype)
    try:
        whole = case.run(model, given)
    except (RuntimeError, TypeError) as error:  # of attention, or of Lumina 2, which counts tokens by the mask
        with lossless(model), pytest.raises(type(error)):
            case.run(model, given)
        return
    with lossless(model):
        assert relative(case.run(model, given), whole) < (FLOAT32 if case.dtype == torch.float32 else 1e-12)


@cases
@lengths
def test_padding_changes_nothing(case: Case, lengths: Sequence[int]) -> None:
    model, given = case.make(), case.call(lengths)
    loud = with_loud_pads(case.name, given)
    whole = case.run(model, given)
    assert relative(case.run(model, loud), whole) < 1e-6
    if len(set(lengths)) == 1:  # else the shorter prompt keeps padding, which is there and hidden
        with lossless(model):
            assert torch.equal(case.run(model, loud), case.run(model, given))


@cases
@lengths
def test_no_attention_in_the_blocks_is_masked_where_all_tokens_count(case: Case, lengths: Sequence[int]) -> None:
    model, given = case.make(), case.call(lengths)
    row = ROWS[case.name]
    with lossless(model) as patch, AttentionCalls(case.main_blocks(model)) as calls:
        case.run(model, given)
        (told,) = patch.stats.calls["transformer"]
    may_go = not row.keeps_mask and len(set(lengths)) == 1 and not (row.only_alone and len(lengths) > 1)
    assert calls.all > 0
    assert told.has_mask is not may_go
    assert calls.masked == 0 if may_go else calls.masked > 0 or case.name == "MochiTransformer3DModel"


def test_masks_are_counted() -> None:
    """Without the patch there are some: the count can fail."""
    case = present("HunyuanVideoTransformer3DModel")
    model = case.make()
    with AttentionCalls(case.main_blocks(model)) as calls:
        case.run(model, case.call())
    assert calls.masked == calls.all == 4


def test_rows_are_those_that_are_run() -> None:
    assert set(CASES) == set(ROWS)
    assert not set(ROWS) & set(LEFT_ALONE)


def classes() -> dict[str, type]:
    """The transformers of diffusers."""
    names = [f"{transformers.__name__}.{module.name}" for module in pkgutil.iter_modules(transformers.__path__)]
    found = [cls for name in names for cls in vars(importlib.import_module(name)).values() if inspect.isclass(cls)]
    return {cls.__name__: cls for cls in found if issubclass(cls, diffusers.ModelMixin) and cls.__module__ in names}


CLASSES = classes()


@pytest.mark.parametrize("name", sorted(name for name, cls in CLASSES.items() if marks_of(cls)))
def test_class_of_diffusers_with_a_mask_is_known(name: str) -> None:
    """One that fails here is new. Give it a row in `table.py` and a case in `tests/padded`, or a reason why not."""
    assert name in ROWS or name in LEFT_ALONE, f"{name} has {', '.join(marks_of(CLASSES[name]))}"


@pytest.mark.parametrize("name", sorted(set(ROWS) & set(CLASSES)))
def test_parameters_of_a_row_are_those_of_the_class(name: str) -> None:
    known = inspect.signature(CLASSES[name].forward).parameters
    assert sorted(ROWS[name].parameters - set(known)) == []


def test_classes_that_are_found_have_marks() -> None:
    """The search would find what it is for: it does find what is known."""
    assert {name for name in ROWS if name in CLASSES} <= {name for name, cls in CLASSES.items() if marks_of(cls)}
    assert {"FluxTransformer2DModel", "WanTransformer3DModel", "SD3Transformer2DModel"} <= set(CLASSES)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "SD3Transformer2DModel"])
def test_class_without_a_mask_is_left_alone(name: str) -> None:
    assert "attended" in why_left_alone(CLASSES[name])


def test_norm_over_padding_is_a_reason() -> None:
    """LongCat's audio model hides padding from attention, and counts it in a norm: a row would be wrong."""
    missing = "LongCatAudioDiTTransformer" not in CLASSES
    if missing:
        pytest.skip("not in this diffusers")
    from zoo.base import randomise

    model: Any = CLASSES["LongCatAudioDiTTransformer"](
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=16, latent_dim=4, use_latent_condition=False
    )
    randomise(model, 0)
    text, counts = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0)), torch.arange(24)[None] < 9

    def run(length: int) -> Tensor:
        with torch.no_grad():
            output: Tensor = model(
                torch.ones(1, 8, 4), text[:, :length], counts[:, :length], torch.tensor([0.5]), return_dict=False
            )[0]
        return output

    assert relative(run(9), run(24)) > FLOAT32


def test_page_has_the_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "lossless.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted([*ROWS, *LEFT_ALONE])
    for name, why in LEFT_ALONE.items():
        assert f"| `{name}` | {why} |" in page
