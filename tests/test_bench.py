"""`benchmarks.bench`, and the committed benchmark found again by `compare`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import diffusers
import pytest

import miniatures
from benchmarks import bench
from sgl_diffusion_accel import ComparisonReport, apply_cache_dit

pytestmark = pytest.mark.usefixtures("one_thread")

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


STATIC = "SCM late-fast static, TS2"
VARIANTS = {
    "F1 W4 MC3 R.24, reuse": apply_cache_dit,
    STATIC: partial(
        apply_cache_dit, fn_compute_blocks=0, steps_mask="late-fast", steps_policy="static", taylorseer_order=2
    ),
}


@pytest.mark.parametrize(
    ("model", "names"),
    [("wan", list(VARIANTS)), *(pytest.param(name, [STATIC], marks=pytest.mark.matrix) for name in ("qwen", "flux"))],
)
def test_compare_finds_the_figures_of_the_committed_benchmark(model, names):
    committed = json.loads((RESULTS / f"{model}.json").read_text())
    if committed["environment"]["packages"]["diffusers"] != diffusers.__version__:
        pytest.skip("the committed benchmark is of another diffusers")
    variants = {name: VARIANTS[name] for name in names}
    fewer = [20] if model == "wan" else False
    report = bench.compare_miniature(model, 50, 1, variants, fewer_steps=fewer, warmup=0)
    assert list(report.calls) == committed["captions"][:1]
    rows = {row["name"]: row["samples"][0] for row in committed["rows"] if row["family"] != "cache-dit"}
    for row in report.rows:
        theirs = rows[row.name]
        assert row.psnr == pytest.approx(theirs["psnr"], abs=0.05), row.name
        assert row.ssim == pytest.approx(theirs["ssim"], abs=1e-4), row.name
        # The benchmark weighs blocks by their work; on FLUX those of the two lists differ a little.
        assert row.compute_ratio == pytest.approx(1 / theirs["share"], rel=0.02 if model == "flux" else 1e-9), row.name
    assert report[STATIC].sharpness == pytest.approx(1.0, abs=0.1)


def test_bench_shows_a_table_and_writes_numbers_and_pictures(tmp_path, capsys):
    numbers, folder = tmp_path / "deep" / "qwen.json", tmp_path / "pictures"
    given = ("--model", "qwen", "--steps", "8", "--captions", "1", "--json", str(numbers), "--plot", str(folder))
    bench.main(given)
    printed = capsys.readouterr().out
    assert printed.startswith("QwenImagePipeline, 8 steps, 1 call")
    assert all(name in printed for name in bench.VARIANTS)
    report = ComparisonReport.load(numbers)
    assert [row.name for row in report.rows if not row.is_fewer_steps] == list(bench.VARIANTS)
    assert sorted(path.name for path in folder.iterdir()) == [
        "qwen_pareto.png", "qwen_pictures.png", "qwen_steps.png",
    ]  # fmt: skip


def test_the_example_compares_its_variants():
    from examples import compare as example

    report = example.compare_settings("qwen", count=1, steps=4)
    assert [row.name for row in report.rows if not row.is_fewer_steps] == list(example.VARIANTS)
    assert report.calls == tuple(miniatures.captions("qwen", 1, 5))
