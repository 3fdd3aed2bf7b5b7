"""The measurement of calls without padding: on tiny models, what it counts, and its tables."""

from __future__ import annotations

import inspect
import json
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from benchmarks import constants, lossless, lossless_host, padding
from benchmarks.call_parts import AttentionCalls, block_seconds, tensor_peak
from benchmarks.gpu import padding as on_gpu
from benchmarks.gpu.models import Place
from benchmarks.gpu.padded import PADDED, build_padded
from benchmarks.turns import RESULTS, take_turns
from sgl_diffusion_accel import apply_lossless
from sgl_diffusion_accel.lossless.constants import worth
from sgl_diffusion_accel.lossless.constants.constant_table import ONCE_A_RUN
from sgl_diffusion_accel.lossless.padding.table import ROWS
from sgl_diffusion_accel.slots import slot_of

torch.set_num_threads(1)

TINY = Place(torch.device("cpu"), torch.float32, tiny=True)


def present(name: str) -> Any:
    missing = not hasattr(diffusers, PADDED[name].transformer)
    why = f"diffusers {diffusers.__version__} has no {PADDED[name].transformer}"
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=why))


models = pytest.mark.parametrize("name", [present(name) for name in PADDED])


@models
def test_both_sides_of_a_model_are_measured_in_pairs(name: str) -> None:
    row = padding.measure(PADDED[name], TINY, pairs=2)
    before, after = row["text_tokens"]
    assert before == 24 * len(PADDED[name].texts)
    assert after == 9
    assert row["attention_calls"] == row["masked_attention_calls"][padding.WITH] > 0
    assert row["masked_attention_calls"][padding.WITHOUT] == 0
    assert row["peak_mib"][padding.WITHOUT] < row["peak_mib"][padding.WITH]
    assert row["relative_difference"] < 1e-5
    assert set(row["times"]) == {"wall", "cpu", "released"}
    for side in padding.SIDES:
        assert row["released_s"][side]["median"] > row["cpu_s"][side]["median"]


@models
def test_depths_are_those_of_the_released_models_and_only_they_are_cut(name: str) -> None:
    model = PADDED[name]
    assert model.transformer in ROWS
    defaults = inspect.signature(getattr(diffusers, model.transformer).__init__).parameters
    for each in model.lists:
        assert defaults[each.key].default == each.released
        assert each.measured <= each.released
    assert not set(model.config) & {each.key for each in model.lists}


@models
def test_row_on_a_device(name: str) -> None:
    row = on_gpu.measured(PADDED[name], TINY)
    assert row["finite"]
    assert row["relative_difference"] < 1e-5
    assert row["masked_calls"] == [sum(each.measured for each in PADDED[name].lists if each.sees_picture), 0]
    assert min(row["padded_ms"], row["cut_ms"], row["times_as_fast"]) > 0


def test_peak_is_the_most_that_tensors_hold_at_one_time() -> None:
    given = torch.ones(1000)

    def call() -> torch.Tensor:
        first = given * 2
        second = first * 2
        del first
        return second * 2

    output, peak = tensor_peak(call)
    assert torch.equal(output, given * 8)
    assert 8000 <= peak < 9000


def test_blocks_are_timed_by_list_and_hooks_are_gone_afterwards() -> None:
    built = build_padded(PADDED["hunyuanvideo"], TINY, depth=lambda _: 2)
    with block_seconds(built.transformer, built.depths) as spent:
        built.run()
    assert set(spent) == set(built.depths)
    assert min(spent.values()) > 0
    before = dict(spent)
    with AttentionCalls(built.transformer, ["transformer_blocks"]) as calls:
        built.run()
    assert (calls.all, calls.masked) == (2, 2)
    assert spent == before
    assert not any(module._forward_hooks for module in built.transformer.modules())
    with pytest.raises(TypeError, match="no list of blocks"), block_seconds(built.transformer, ["norm_out"]):
        pass


def test_without_warm_up_every_round_counts() -> None:
    assert take_turns({"one": lambda: 1}, 2, warm_up=0) == {"one": [1, 1]}


@pytest.mark.parametrize("name", list(lossless_host.CASES))
def test_host_time_of_each_case_is_that_of_the_same_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless_host, "CALLS", 3)
    monkeypatch.setattr(lossless_host, "STEPS", 8)
    models = [*PADDED.values(), *(row.model for row in constants.ROWS.values())]
    of = next((model.transformer for model in models if name.startswith(model.title.partition(",")[0])), None)
    if of is not None and not hasattr(diffusers, of):
        pytest.skip(f"diffusers {diffusers.__version__} has no {of}")
    case = lossless_host.CASES[name]()
    with apply_lossless(case.target) as patch:
        case.run()
        stats = patch.stats
    transformer = case.target if isinstance(case.target, nn.Module) else case.target.transformer
    if "without a row" in name:
        with apply_lossless(case.target):
            assert slot_of(transformer) is None, "no handler"
        assert stats.calls == {}
    if name.endswith("cut"):
        ((told, calls),) = stats.calls["transformer"].items()
        assert calls == 4
        assert not told.has_mask
        assert all(after < before for _, before, after in told.tokens)
    if "taken away" in name:
        (told,) = stats.calls["transformer"]
        assert (told.has_mask, told.tokens[0][1] - told.tokens[0][2]) == (False, 0)
    if name.startswith("Ideogram 4, a"):
        assert stats.spared == {"transformer": 7, "unconditional_transformer": 7}, "not placed in the run"
    if "second expert" in name:
        assert stats.idle == {"transformer_2": 0}
    if "of the text not called" in name:
        layers = {"LTX-2.0": 192 + 2, "Sana": 40 + 2}[name.partition(",")[0]]
        assert stats.spared == {"transformer": 7 * layers}
    found = lossless_host.measure(case, 1)
    assert found["plain_us"]["median"] > 0


def test_patch_stays_below_a_fifth_of_a_millisecond_a_call_as_committed() -> None:
    result = json.loads((RESULTS / "padding.json").read_text())
    assert set(result["host"]) == set(lossless_host.CASES)
    for name, found in result["host"].items():
        assert found["us"]["median"] < 200, name
    assert abs(result["host"]["FLUX.1, a class without a row"]["us"]["median"]) < 5


def test_tables_hold_every_model() -> None:
    result = json.loads((RESULTS / "padding.json").read_text())
    assert list(result["rows"]) == list(PADDED)
    for table in (lossless.saved(result), lossless.padding(result)):
        for row in result["rows"].values():
            before, after = row["text_tokens"]
            (line,) = (each for each in table.splitlines() if each.startswith(f"| {row['title']}, "))
            assert f"{before:,} → {after:,}" in line
            assert f"{row['times']['released']['median']:.2f}" in line
            assert row["relative_difference"] < 1e-5


@pytest.mark.parametrize("name", list(constants.ROWS))
def test_both_sides_of_a_run_are_measured_in_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worth, "MOST_BYTES", 10.0)  # a tiny model's weights are few beside what it makes of a text
    row = constants.ROWS[name]
    if not hasattr(diffusers, row.model.transformer):
        pytest.skip(f"diffusers {diffusers.__version__} has no {row.model.transformer}")
    (blocks,) = row.model.lists
    defaults = inspect.signature(getattr(diffusers, row.model.transformer).__init__).parameters
    assert row.model.config.get(blocks.key, defaults[blocks.key].default) == blocks.released
    found = constants.measure(row, TINY, pairs=1)
    told = ONCE_A_RUN[row.model.transformer].parts
    assert found["spared"] == len(told) + blocks.measured * sum(len(part.layers) for part in told)
    assert found["held_mib"] > 0
    assert found["relative_difference"] == 0
    assert 0.002 < found["at_usual_size"]["share"] < 0.1
    assert found["at_usual_size"]["held_mib"] < worth.MOST_BYTES * found["at_usual_size"]["weights_mib"]


def test_table_of_constants_holds_every_row() -> None:
    result = json.loads((RESULTS / "constants.json").read_text())
    assert list(result["rows"]) == list(constants.ROWS)
    for table in (lossless.constants(result), lossless.constants_in_full(result)):
        for row in result["rows"].values():
            assert f"{row['times']['released']['median']:.3f}" in table
            assert row["relative_difference"] == 0
            assert row["times"]["cpu"]["median"] > 1
