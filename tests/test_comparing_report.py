"""The report: saved and loaded, as Markdown, text and HTML, and as pictures."""

from __future__ import annotations

import dataclasses
import json
import math

import matplotlib.image
import numpy as np
import pytest
import torch

from sgl_diffusion_accel import ComparisonReport, ConfigError, MissingPackageError
from sgl_diffusion_accel.comparing import comparison_tables, cost_plots, picture_sheet
from sgl_diffusion_accel.comparing.comparison_data import Baseline, Row, Sample
from sgl_diffusion_accel.comparing.measures.read_output import Media
from sgl_diffusion_accel.comparing.picture_gallery import Gallery
from sgl_diffusion_accel.reporting.figure_style import COMPUTED, SKIPPED
from sgl_diffusion_accel.reporting.spread import Spread

MAPS = {"cond": (True, False, True, False), "uncond": (True, False, False, False)}


def row(name, psnr, ratio=2.0, fewer=False, at_cost=None, maps=MAPS, **more):
    common = {"ssim": 0.98, "lpips": None, "sharpness": 0.97, "motion": None}
    common.update(more)
    sample = Sample(
        call=0, seconds=2.0, speedup=2.0, share=1 / ratio if ratio else None, peak_memory_mib=None, psnr=psnr,
        non_finite=0.0, maps={} if fewer else maps, **common,
    )  # fmt: skip
    return Row(
        name, fewer, 2.0, Spread(2.0, 1.9, 2.1), 2.0, ratio, None, psnr, psnr, fewer_steps_psnr=at_cost,
        samples=(sample, sample), **common,
    )  # fmt: skip


def gallery(kind="pixels", frames=1, calls=1):
    found = Gallery()
    for call in range(calls):
        reference = torch.rand(1, frames, 3, 24, 32, generator=torch.Generator().manual_seed(call))
        found.add(call, "unpatched", Media(reference, kind), Media(reference, kind))
        for name, error in (("good", 0.004), ("same", 0.0), ("2 steps", 0.02)):
            found.add(call, name, Media((reference + error).clamp(0, 1), kind), Media(reference, kind))
    return found


def report(rows=None, **more):
    rows = rows or (row("good", 45.0, at_cost=40.0), row("same", math.inf, 1.0), row("2 steps", 40.0, fewer=True))
    values = {
        "pipeline": "WanPipeline",
        "calls": ("a cat | a dog",),
        "steps": (4,),
        "repeats": 2,
        "warmup": 1,
        "measured_on": "pixels in [0, 1]; PSNR on a range of 1",
        "environment": {"date": "2026-01-01", "packages": {"torch": "2"}, "cpu": "a CPU", "threads": 1, "gpu": None},
        "unpatched": Baseline(Spread(4.0, 4.0, 4.0), None, math.inf),
        "rows": tuple(rows),
        "order": (("unpatched", "good", "same", "2 steps"),),
        "remarks": ("no LPIPS: for a reason",),
        "gallery": gallery(),
    }
    return ComparisonReport(**{**values, **more})


def test_a_row_is_found_by_its_name():
    assert report()["good"].psnr == 45.0
    with pytest.raises(KeyError, match="'good', 'same', '2 steps'"):
        report()["bad"]


def test_json_is_strict_and_comes_back_the_same(tmp_path):
    before = report((row("inf", math.inf), row("nan", 40.0, ratio=None), row("low", -math.inf)))
    before.save(tmp_path / "report.json")
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    after = ComparisonReport.load(tmp_path / "report.json")
    assert after == before
    assert after.to_markdown() == before.to_markdown()


def test_nan_comes_back_from_json(tmp_path):
    report((row("nan", math.nan),)).save(tmp_path / "report.json")
    assert math.isnan(ComparisonReport.load(tmp_path / "report.json").rows[0].psnr)


def test_a_name_like_a_number_stays_a_name(tmp_path):
    report((row("inf", 40.0), row("7", 40.0))).save(tmp_path / "report.json")
    assert [each.name for each in ComparisonReport.load(tmp_path / "report.json").rows] == ["inf", "7"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 99}', "{}"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError, match=r"report\.json"):
        ComparisonReport.load(tmp_path / "report.json")


def test_markdown_is_one_table_in_which_winners_are_bold():
    lines = report().to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "| **45.0** |" in table[3]
    assert "| equal |" in table[4]
    assert table[5].startswith("| fewer steps: 2 steps |")
    assert "| 2.00× (1.90–2.10) |" in table[3]


def test_a_name_with_a_bar_or_of_several_lines_is_one_row():
    shown = report((row("two\n lines", 45.0), row("a|b", 40.0)))
    assert "| two lines |" in shown.to_markdown()
    assert "| a\\|b |" in shown.to_markdown()
    assert any(line.startswith("two lines ") for line in str(shown).splitlines())


def test_folders_are_made(tmp_path):
    report().save(tmp_path / "a" / "b" / "r.json")
    report().plot_steps(tmp_path / "d" / "s.png")
    assert len(list(tmp_path.rglob("*.*"))) == 2


def test_names_and_prompts_are_no_formulas(tmp_path):
    names = ["$\\frac$", "_mine", "$5 and $10", "n" * 99]
    shown = report([row(name, 40.0) for name in names], calls=("a $\\frac$ bill",), gallery=Gallery())
    labels = [text.get_text().strip() for text in shown.plot(tmp_path / "p.png").legends[0].get_texts()]
    assert labels == [*names[:3], "n" * 39 + "…"]
    shown.plot_steps(tmp_path / "s.png")


def test_columns_that_nobody_has_a_value_for_are_left_out():
    text = report().to_markdown()
    assert "LPIPS |" not in text
    assert "motion" not in text
    assert "memory" not in text
    assert "| motion |" in report((row("clip", 40.0, motion=0.9),)).to_markdown()


def test_text_is_aligned_and_carries_the_remarks():
    lines = str(report()).splitlines()
    assert lines[0].startswith("WanPipeline, 4 steps, 1 call, each 2 times, torch 2, a CPU, 1 thread")
    rows = [line for line in lines if line.startswith(("unpatched", "good", "same", "fewer"))]
    position = lines[2].index("PSNR (dB)") + len("PSNR (dB)")
    assert [line[:position].split()[-1] for line in rows] == ["–", "*45.0", "equal", "40.0"]
    assert lines[-1] == "No LPIPS: for a reason."


def test_html_escapes_and_holds_the_pictures():
    found = report((row("<b>good</b>", 45.0),))._repr_html_()
    assert "&lt;b&gt;good&lt;/b&gt;" in found
    assert found.count("data:image/png;base64,") == 3


def test_html_without_pictures_is_the_table_alone(tmp_path):
    report().save(tmp_path / "r.json")
    assert ComparisonReport.load(tmp_path / "r.json")._repr_html_().count("data:image/png") == 2


def ink(path):
    """Share of the pixels that are not white, and the number of colours."""
    picture = matplotlib.image.imread(path)[..., :3]
    colours = np.unique((picture.reshape(-1, 3) * 15).round(), axis=0)
    return float((picture.min(axis=-1) < 0.95).mean()), len(colours)


def test_the_plot_of_cost_and_quality_shows_every_row(tmp_path):
    figure = report().plot(tmp_path / "p.png")
    share, colours = ink(tmp_path / "p.png")
    assert share > 0.01
    assert colours > 20
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["simply fewer steps", "good", "same"]
    axes = figure.axes[0]
    assert "compute ratio" in axes.get_xlabel()
    assert "equal" in [text.get_text() for text in axes.texts]


def test_the_plot_takes_the_speed_up_where_nothing_is_skipped():
    assert "wall time" in report((row("attention", 60.0, 1.0),)).plot().axes[0].get_xlabel()
    assert "wall time" in report((row("unknown", 60.0, None),)).plot().axes[0].get_xlabel()
    assert "wall time" in report().plot(x="speedup").axes[0].get_xlabel()
    with pytest.raises(ConfigError, match="'compute_ratio', 'speedup'"):
        report().plot(x="seconds")


@pytest.mark.parametrize("psnr", [math.nan, math.inf, -math.inf])
def test_the_plot_bears_every_psnr(tmp_path, psnr):
    figure = report((row("odd", psnr),)).plot(tmp_path / "p.png")
    label = figure.legends[0].get_texts()[0].get_text()
    assert label == {math.inf: "odd", -math.inf: "odd (not shown: -inf dB)"}.get(psnr, "odd (not shown: nan dB)")


def test_more_variants_than_colours_are_told_apart():
    rows = [row(f"v{index}", 40.0 + index) for index in range(20)]
    lines = [line for line in report(rows).plot().axes[0].lines if str(line.get_label()).startswith("v")]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


def test_step_maps_have_a_line_for_each_branch(tmp_path):
    figure = report().plot_steps(tmp_path / "s.png")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("cond") == texts.count("uncond") == 2
    assert texts.count("2 of 4") == 2
    assert len(figure.axes[0].patches) == 4 * 4
    assert ink(tmp_path / "s.png")[0] > 0.05


def test_without_a_cache_there_are_no_step_maps():
    with pytest.raises(ConfigError, match="no step maps"):
        report((row("attention", 60.0, maps={}),)).plot_steps()


@pytest.mark.parametrize(("kind", "frames"), [("pixels", 1), ("pixels", 9), ("latents", 2)])
def test_pictures_side_by_side_with_their_differences(tmp_path, kind, frames):
    shown = report(gallery=gallery(kind, frames, calls=2), calls=("a", "b"))
    figure = shown.plot_pictures(tmp_path / "p.png" if frames == 1 else None)  # drawing takes seconds
    assert len(figure.axes) == 2 * (4 + 3)
    assert frames > 1 or ink(tmp_path / "p.png")[0] > 0.3
    images = [axes.images[0].get_array() for axes in figure.axes]
    assert all(image.shape[1] == 32 * min(frames, 3) for image in images)
    note = figure.texts[-1].get_text()
    assert "magnified" in note
    assert note.startswith("Latents") == (kind == "latents")


def test_the_magnification_brings_differences_out_and_none_is_cut_off():
    assert picture_sheet.magnification(gallery()) == 50  # 0.02 at most
    assert picture_sheet.magnification(Gallery()) == 1


def test_the_gallery_keeps_little_of_large_and_long_outputs():
    found = Gallery()
    media = Media(torch.rand(2, 12, 4, 800, 400), "pixels")
    for call in range(6):
        found.add(call, "unpatched", media, media)
    assert len(found.shots) == 4
    assert found.shots[0]["unpatched"].frames.shape == (3, 3, 384, 192)


def test_a_loaded_report_has_no_pictures_and_says_so(tmp_path):
    report().save(tmp_path / "r.json")
    with pytest.raises(ConfigError, match="loaded from a file"):
        ComparisonReport.load(tmp_path / "r.json").plot_pictures()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    for draw in (report().plot, report().plot_steps, report().plot_pictures):
        with pytest.raises(MissingPackageError, match=r"sgl-diffusion-accel\[plots\]"):
            draw()


def test_without_matplotlib_a_notebook_shows_the_table(monkeypatch):
    monkeypatch.setattr(comparison_tables, "find_spec", lambda name: None)
    assert "<img" not in report()._repr_html_()
    assert "<table" in report()._repr_html_()


def test_a_report_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        report().pipeline = "x"


def test_colours_differ_in_lightness_from_the_ground_for_all_eyes():
    """Each colour of the plot is darker than the white ground by far, and computed is darker than skipped."""

    def luminance(colour):
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert max(map(luminance, cost_plots.COLOURS)) < 0.75
    assert luminance(SKIPPED) - luminance(COMPUTED) > 0.4
