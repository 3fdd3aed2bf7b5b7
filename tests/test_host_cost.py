"""The measurement of the host's part: what it runs is what it says, and its table."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.costs import host_cost, host_line
from benchmarks.gpu.models import MODELS, Place, build
from benchmarks.host_cost import LAYOUTS, Side, measure
from benchmarks.peers import cache_dit
from benchmarks.turns import RESULTS


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_one_block_runs_in_a_skipped_call_on_every_side(name: str) -> None:
    row = measure(name, 1, pairs=2)
    assert row["predictor"] == "TaylorSeer 1"
    assert row["calls_a_step"] == {"flux": 1, "qwen": 2}[name]
    assert row["blocks_passed"] == {"flux": 56, "qwen": 118}[name]
    assert list(row["sides"]) == ["sgl-diffusion-accel"] + ["cache-dit"] * cache_dit.installed()
    for side in row["sides"].values():
        assert side["blocks_run"] == row["calls_a_step"]
        assert side["cpu_ms"]["median"] > 0


def test_all_blocks_run_where_nothing_is_skipped() -> None:
    side = Side(build(MODELS["flux"], Place(torch.device("cpu"), torch.float32, tiny=True)))
    _, _, blocks = side.run()
    assert blocks == 5


def test_table_and_sentence_hold_both_sides() -> None:
    result = json.loads((RESULTS / "host_cost.json").read_text())
    text, line = host_cost(result), host_line(result)
    for row in result["rows"]:
        for name, side in row["sides"].items():
            (shown,) = (
                each for each in text.splitlines() if each.startswith(f"| {row['layout']}, {row['predictor']} |")
            )
            assert f"| {side['cpu_ms']['median']:.2f} (" in shown
            assert f"{name}, ms a step" in text
            if row["predictor"] == "reuse":
                assert f"{name} {side['us_a_block']['median']:.0f} µs" in line
