"""Every transformer class of diffusers: what the library does with it is what `classes/verdicts.json` says.

Some classes by default, the newest and the oddest among them; all of them in the long matrix.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks import models
from classes import ROWS, Row, checks, found
from classes.loop import arguments, run
from classes.verdict import FILE, kept, verdict_of
from invariants.matrix import chosen
from sgl_diffusion_accel.caching.blocks import layout
from sgl_diffusion_accel.caching.blocks.transformer_call import TransformerCall
from sgl_diffusion_accel.caching.outputs import output_run
from sgl_diffusion_accel.errors import UnsupportedModelError

torch.set_num_threads(1)

STORE = "with its store of keys and values"
USUAL = (
    f"QwenImage21Transformer2DModel, {STORE}",
    f"Flux2Transformer2DModel, {STORE}",
    f"GlmImageTransformer2DModel, {STORE}",
    f"SanaWMLTX2RefinerTransformer3DModel, {STORE}",
    "QwenImage21Transformer2DModel",
    "Krea2Transformer2DModel",
    "Ideogram4Transformer2DModel",
    "Cosmos3OmniTransformer",
    "MiniMaxH3Transformer3DModel",
    "Flux3Transformer2DModel",
    "LTX2VideoTransformer3DModel",
    "WanAnimateTransformer3DModel",
    "HunyuanImageTransformer2DModel",
    "BriaFibo2Transformer2DModel",
    "Kandinsky6Transformer3DModel",
    "JoyImageEditTransformer3DModel",
    "NucleusMoEImageTransformer2DModel",
    "OmniGenTransformer2DModel",
    "HunyuanDiT2DModel",  # its last blocks take what its first ones return
    "WanVACETransformer3DModel",  # something is added between its blocks
    "ConsisIDTransformer3DModel",
    "LatteTransformer3DModel",
    "MotifVideoTransformer3DModel",
    "SanaTransformer2DModel",
    "RFD4ProteinaTransformer",
    "T5FilmDecoder",
)


@pytest.mark.parametrize("row", chosen(ROWS, *USUAL))
def test_verdict_is_what_comes_out(row: Row) -> None:
    if row.missing:
        pytest.skip(row.missing)
    assert verdict_of(row) == kept()[row.key]


@pytest.mark.parametrize("name", sorted(found()))
def test_class_of_diffusers_has_a_row(name: str) -> None:
    """One that fails here is new. Give it a row in `tests/classes`, and run `make models`."""
    assert name in ROWS, f"{name} of diffusers is in no row of tests/classes: nobody has looked at it"


def test_every_row_has_a_verdict() -> None:
    """None is unknown."""
    assert sorted(kept()) == sorted(ROWS)
    assert {each["verdict"] for each in kept().values()} <= {"works", "works as whole calls only", "computed in full"}


def test_search_finds_transformers_and_neither_unets_nor_autoencoders() -> None:
    assert {"FluxTransformer2DModel", "WanTransformer3DModel", "T5FilmDecoder"} <= set(found())
    assert not {"UNet2DConditionModel", "AutoencoderKL", "FluxControlNetModel"} & set(found())


def test_page_counts_the_classes() -> None:
    """Only the class itself counts where there is a row with a store as well; of Wan-Animate 2 there is no other."""
    read = json.loads(FILE.read_text(encoding="utf-8"))
    counts = Counter(each["verdict"] for key, each in read["classes"].items() if ", " not in key)
    assert sum(counts.values()) == len({row.name for row in ROWS.values()})
    assert f"{sum(counts.values())} classes" in models.in_short(read)
    assert f"{counts['works']} work" in models.in_short(read)


# That the checks can fail

KREA = "Krea2Transformer2DModel"


def prepared() -> tuple[Any, Any, Any, Any]:
    if ROWS[KREA].missing:
        pytest.skip(ROWS[KREA].missing)
    row, model = ROWS[KREA], ROWS[KREA].make()
    given = arguments(row, model)
    return row, model, given, run(row, model, given)


def test_blocks_that_add_nothing_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    row, model, given, unpatched = prepared()
    monkeypatch.setattr(TransformerCall, "_predict", lambda *arguments: list(arguments[-1]))
    with pytest.raises(AssertionError, match=r"step 1 is off by"):
        checks.blocks(row, model, given, unpatched)


def test_blocks_that_are_not_skipped_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    row, model, given, unpatched = prepared()
    monkeypatch.setattr(TransformerCall, "_decide", lambda *_: output_run.Decision(True, "test"))
    with pytest.raises(AssertionError, match="nobody is told"):
        checks.blocks(row, model, given, unpatched)


def test_wrong_prediction_of_a_call_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    row, model, _, unpatched = prepared()
    monkeypatch.setattr(output_run, "combine", lambda weighted: weighted[0][1])
    with pytest.raises(AssertionError, match=r"skipped call \d is off by"):
        checks.whole_calls(row, model, unpatched)


def test_run_that_differs_is_noticed() -> None:
    row, model, given, unpatched = prepared()
    unpatched.outputs[3][0] += 1e-6
    with pytest.raises(AssertionError, match=r"adaptive cache, tolerance 0: steps \[3\]"):
        checks.never_skipping(row, model, given, unpatched)


def test_reason_of_a_refusal_is_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    row, model, given, unpatched = prepared()
    refused = layout.OddModel(refuse="it is odd")
    monkeypatch.setitem(layout.ODD_MODELS, KREA, refused)
    assert checks.blocks(row, model, given, unpatched) == f"{KREA} cannot be cached: it is odd."
    with pytest.raises(UnsupportedModelError):
        layout.find_block_lists(model)
