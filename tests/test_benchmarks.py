"""The measuring tools: metrics, the count of work, and the table."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import page, pareto, summary, table
from benchmarks.costs import profiling
from benchmarks.markers import insert
from benchmarks.metrics import computed_steps, psnr, ssim
from benchmarks.pareto import STYLES
from benchmarks.rows import chapter, fewer_steps_psnr
from benchmarks.settings import (
    Setting,
    dbcache_settings,
    gap_settings,
    late_settings,
    magcache_settings,
    preset_settings,
    sigma_settings,
)
from sgl_diffusion_accel.comparing.measures.block_work import BlockWork


def frames(value: float) -> np.ndarray:
    return np.full((1, 2, 16, 16, 3), value, dtype=np.float32)


def test_psnr_on_unit_range() -> None:
    assert psnr(frames(0.5), frames(0.6)) == pytest.approx(20.0, abs=1e-4)
    assert math.isinf(psnr(frames(0.5), frames(0.5)))


def test_ssim_is_one_for_equal_frames_and_less_for_others() -> None:
    noise = np.random.default_rng(0).random((1, 2, 16, 16, 3), dtype=np.float32)
    assert ssim(noise, noise) == pytest.approx(1.0)
    assert ssim(noise, 1 - noise) < 0.1


class Stack(nn.Module):
    """Two blocks, of which the second can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2)])

    def forward(self, hidden: torch.Tensor, count: int = 2) -> torch.Tensor:
        hidden = self.inlet(hidden)
        for block in self.blocks[:count]:
            hidden = block(hidden)
        return hidden


def test_block_work_counts_linear_layers_of_blocks_alone() -> None:
    model, hidden = Stack(), torch.ones(3, 4)
    with BlockWork(model) as work:
        model(hidden)
        model(hidden, count=1)
    assert work.calls == [2 * 3 * (4 * 8 + 8 * 4), 3 * (4 * 8 + 8 * 4)]
    model(hidden)
    assert len(work.calls) == 2
    assert not model._forward_pre_hooks
    assert not model.blocks[0][0]._forward_hooks


def test_computed_steps_is_a_mean_over_branches() -> None:
    assert computed_steps([10, 10, 1, 1, 10, 1], [10] * 6, steps=3) == 1.5


def test_names_of_settings_are_unique() -> None:
    settings = dbcache_settings() + preset_settings() + late_settings() + sigma_settings() + gap_settings()
    assert len({setting.name for setting in settings}) == len(settings)
    magcache = [setting.name for setting in magcache_settings()]
    assert len(set(magcache)) == len(magcache) == 15
    assert "MagCache .12 MS2 RR.06, calibrated, TS1" in magcache
    assert "MagCache .06 MS3, calibrated, TS1" in magcache
    assert Setting(order=1).name == "F1 W4 MC3 R.24, TS1"
    assert Setting(fn=0, order=2, tolerance=0.008).name == "gap control .008, F0, TS2"


def result() -> dict:
    def row(family: str, name: str, share: float, quality: float | None) -> dict:
        numbers = {"share": share, "compute_ratio": 1 / share, "psnr": quality, "ssim": 0.9, "speedup": 2.0}
        return {"family": family, "name": name, "exact": quality is None, **numbers}

    rows = [row("unpatched", "50 steps", 1.0, None), row("fewer steps", "20 steps", 0.4, 40.0)]
    rows += [row("fewer steps", "10 steps", 0.2, 30.0), row("sgl-diffusion-accel", "good", 0.3, 36.0)]
    rows += [row("cache-dit", "bad", 0.3, 34.0)]
    environment = {"packages": {"torch": "2"}, "cpu": "a CPU", "threads": 1, "date": "2026-01-01"}
    about = {"pipeline": "WanPipeline", "model": "wan", "steps": 50, "guidance": 4.0, "dtype": "float32"}
    return {**about, "captions": ["a"], "environment": environment, "rows": rows}


def test_fewer_steps_is_interpolated_and_never_extrapolated() -> None:
    assert fewer_steps_psnr(result(), 0.3) == pytest.approx(35.0)
    assert fewer_steps_psnr(result(), 0.1) is None


def test_bold_is_what_beats_fewer_steps() -> None:
    text = chapter(result())
    assert "| **36.0** | 0.9000 | 35.0 |" in text
    assert "| 34.0 | 0.9000 | 35.0 |" in text
    assert "| equal |" in text


def test_cost_of_the_profiler_is_told_with_what_its_parts_add_up_to() -> None:
    spread = {"median": 1.001, "lower_quartile": 0.99, "upper_quartile": 1.01}
    made = {"model": "wan", "pairs": 3, "environment": result()["environment"], "rows": {"a step": {}}}
    made["rows"]["a step"] = {"cpu": spread, "wall": spread}
    text = profiling(made | {"sums": {"stages / wall time": 0.998}})
    assert "| a step | 1.001 (0.990 to 1.010) | 1.001 (0.990 to 1.010) |" in text
    assert "stages / wall time: 99.8%" in text


def test_table_goes_between_its_markers() -> None:
    text = "before\n<!-- table:start -->\nold\n<!-- table:end -->\nafter\n"
    assert insert(text, "new") == "before\n<!-- table:start -->\n\nnew\n\n<!-- table:end -->\nafter\n"
    assert insert(text.replace("table", "other"), "new", "other").count("new") == 1
    with pytest.raises(ValueError, match="no place"):
        insert("nothing", "new")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("MagCache .06 MS3, calibrated, TS1", "MagCache"),
        ("MagCache .06 MS3, calibrated, reuse", "MagCache, reuse"),
        ("TeaCache 2x, fitted, TS1", "TeaCache"),
        ("F1 W4 MC3 R.24, TS1", "DBCache"),
        ("F1 W4 MC3 R.24, reuse", "DBCache, SGLang's defaults"),
        ("SCM late-fast static, TS2", "late masks"),
        ("plan, 2x", "plan"),
        ("tuned plan, 2x", "tuned plan"),
        ("plan of one caption and 50 Euler steps, 2x", "carried plan"),
        ("plan of 50 Euler steps, 2x", "plan of 50 Euler steps"),
    ],
)
def test_each_of_our_caches_is_a_kind_of_its_own(name: str, kind: str) -> None:
    assert summary.kind_of({"family": "sgl-diffusion-accel", "name": name}) == kind


def test_every_committed_row_is_of_a_kind_that_is_drawn_and_every_kind_of_the_tables_exists() -> None:
    kinds = {summary.kind_of(row) for each in page.load() for row in each["rows"]}
    assert kinds <= set(STYLES) | {"unpatched"}
    assert {kind for kinds_of in summary.METHODS.values() for kind in kinds_of} <= kinds | {summary.PEERS}


def test_any_other_family_is_a_peer_that_is_counted_shown_and_drawn(tmp_path: Path) -> None:
    shown = result()
    shown["rows"] += [shown["rows"][-1] | {"family": "NewCache", "psnr": 37.0}]
    assert "| best peer setting found | *37.0* | *37.0* | 37.0 | 37.0 | – | – |" in summary.at_costs(shown)
    assert chapter(shown).splitlines()[-1].startswith("| NewCache: bad |")
    text = page.text([shown])
    assert "2 of them peers'" in text
    assert "written from their papers: NewCache" in text
    pareto.draw(shown, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_summary_shows_the_best_that_is_at_least_as_cheap() -> None:
    shown = result()
    assert summary.best(shown, ("cache-dit", "diffusers"), 3.3) == 34.0
    assert summary.best(shown, ("DBCache",), 3.3) == 36.0
    assert summary.best(shown, ("fewer steps",), 3.3) == 30.0
    assert summary.best(shown, ("fewer steps",), 2.5) == 40.0
    assert summary.best(shown, ("DBCache",), 5.0) is None
    lines = summary.at_costs(shown).splitlines()
    assert lines[0].count("×") == len(lines[1].split("--:")) - 1
    assert "| best peer setting found | *34.0* | *34.0* | 34.0 | 34.0 | – | – |" in lines
    assert not any("TeaCache" in line for line in lines)


def test_several_costs_share_a_line_and_results_without_fewer_steps_have_none() -> None:
    lines = summary.at_some_costs([result()], (2.4, 3.3)).splitlines()
    assert lines[2].startswith(
        "| [Wan, 50 Euler steps; 1 caption](results/pareto_wan.png) | 40.0 / 30.0 | *34.0* / 34.0 |"
    )
    assert len(summary.at_some_costs([result()], (6.25,)).splitlines()) == 2


def test_all_rows_are_printed_on_demand(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["table", "--all"])
    table.main()
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == sum(len(each["rows"]) + 1 for each in page.load())
