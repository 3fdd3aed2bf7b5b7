"""What a cache did, as numbers, as text and as a picture."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from sgl_diffusion_accel.caching import patch_summary as report
from sgl_diffusion_accel.caching.parts.policies import Decision
from sgl_diffusion_accel.caching.parts.stats import BranchStats, Stats

COMPUTE, SKIP = Decision(True, "warm-up"), Decision(False, "change below threshold", 0.125)


def one_run(pattern="1100", branches=("cond",), component="transformer"):
    """Stats of a run of 10 blocks, 9 of them in the span: 1 is a computed step, 0 a skipped one."""
    stats = Stats()
    run = stats.start(len(pattern))
    for step, mark in enumerate(pattern):
        for branch in branches:
            decision = COMPUTE if mark == "1" else SKIP
            run.add(branch, step, component, decision, 10 if mark == "1" else 1, 10)
    return stats


def test_branches_tell_step_by_step_what_was_done_and_why():
    branch = one_run("110").runs[-1].branches["cond"]
    assert branch.computed == (True, True, False)
    assert branch.reasons == ("warm-up", "warm-up", "change below threshold")
    assert branch.changes == (None, None, 0.125)
    assert branch.components == ("transformer",) * 3
    assert [record.step for record in branch.records] == [0, 1, 2]


def test_branches_are_kept_apart():
    run = one_run("10", branches=("cond", "uncond")).runs[-1]
    assert list(run.branches) == ["cond", "uncond"]
    assert run.branches["uncond"].computed == (True, False)


@pytest.mark.parametrize(("pattern", "share"), [("1111", 1.0), ("1100", 0.55), ("1000", 0.325)])
def test_compute_share_counts_the_blocks_that_ran(pattern, share):
    assert one_run(pattern).runs[-1].compute_share == pytest.approx(share)


def test_compute_share_of_nothing_is_all():
    assert Stats().start(4).compute_share == 1.0


@pytest.mark.parametrize("shown", [report.text, report.html])
def test_a_run_that_skipped_nothing_says_why_if_nothing_else_does(shown):
    why = "nothing was skipped, in 3 of 3 calls because of: warm-up"
    stats = one_run("111")
    assert why in shown("cache", "", stats)
    stats.runs[-1].remark("transformer", "the model changed")
    assert "nothing was skipped" not in shown("cache", "", stats)
    assert "nothing was skipped" not in shown("cache", "", one_run("110"))


def test_last_64_runs_are_kept():
    stats = Stats()
    for steps in range(100):
        stats.start(steps)
    assert [run.steps for run in stats.runs] == list(range(36, 100))


def test_new_stats_are_empty():
    assert Stats().runs == ()
    assert Stats().outside == 0
    assert BranchStats().computed == ()


def test_text_before_the_first_run():
    assert report.text("Cache-DiT (F1B0)", "", Stats()).splitlines() == ["Cache-DiT (F1B0)", "  no run yet"]


def test_text_shows_the_title_the_share_and_each_branch():
    text = report.text("Cache-DiT (F1B0)", "", one_run("110010", branches=("cond", "uncond")))
    lines = text.splitlines()
    assert lines[0] == "Cache-DiT (F1B0)"
    assert "6 steps" in lines[1]
    assert "55%" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["cond", "uncond"]
    assert all("██··█·" in line and "3 of 6 computed" in line for line in lines[2:])


def test_text_says_when_the_patch_was_removed():
    assert "removed" in report.text("Cache-DiT", "removed", one_run())
    assert "removed" not in report.text("Cache-DiT", "", one_run())


def test_text_is_of_the_last_run():
    stats = one_run("1100")
    stats.start(7).add("cond", 0, "transformer", COMPUTE, 10, 10)
    text = report.text("Cache-DiT", "", stats)
    assert "run 2" in text
    assert "7 steps" in text


def test_calls_that_were_not_placed_are_told_with_what_was_missing():
    stats = one_run()
    shown = [report.text("Cache-DiT", "", stats), report.html("Cache-DiT", "", stats)]
    assert all("not placed" not in each for each in shown)
    assert [stats.add_unplaced("it comes from <nowhere>") for _ in range(3)] == [True, False, False]
    assert stats.add_unplaced("its loop is over")
    assert stats.outside == 4
    text = report.text("Cache-DiT", "", stats)
    assert "3 calls not placed, computed in full: it comes from <nowhere>" in text
    assert "1 call not placed, computed in full: its loop is over" in text
    assert "denoising_steps(" in text
    assert "3 calls not placed, computed in full: it comes from &lt;nowhere&gt;" in report.html("x", "", stats)
    assert "not placed" in report.html("x", "", Stats(unplaced={"its loop is over": 1}))


def test_line_says_where_whether_and_how_much():
    stats = Stats()
    assert report.line("Cache-DiT", ["transformer"], "", stats) == "<Cache-DiT on transformer; active>"
    stats = one_run("1100")
    stats.add_unplaced("its loop is over")
    line = report.line("Cache-DiT", ["transformer", "transformer_2"], "removed", stats)
    assert line.startswith(
        "<Cache-DiT on transformer and transformer_2; removed; 1 run, the last with 55% of the blocks"
    )
    assert line.endswith("1 call not placed in a loop and computed in full: see print(patch)>")


class Cells(HTMLParser):
    """Checks that every tag is closed, and collects the cells."""

    def __init__(self, html):
        super().__init__()
        self.open, self.cells, self.rows, self.text = [], [], 0, []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag != "br":
            self.open.append(tag)
        self.rows += tag == "tr"
        attributes = dict(attributes)
        if "title" in attributes:
            self.cells.append((attributes["title"], attributes["style"]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_picture_has_a_row_a_branch_and_a_cell_a_step():
    shown = Cells(report.html("Cache-DiT", "", one_run("110", branches=("cond", "uncond"))))
    assert shown.rows == 2
    assert [title for title, _ in shown.cells] == [
        "step 0: warm-up", "step 1: warm-up", "step 2: change below threshold",
    ] * 2  # fmt: skip
    colours = [report.COMPUTED in style for _, style in shown.cells]
    assert colours == [True, True, False] * 2
    assert all((report.SKIPPED in style) != computed for (_, style), computed in zip(shown.cells, colours, strict=True))


def test_picture_shows_titles_names_and_reasons_as_they_are():
    stats, nasty = Stats(), "<b>'x' & \"y\"</b>"
    stats.start(1).add(nasty, 0, "transformer", Decision(True, nasty), 10, 10)
    shown = Cells(report.html(nasty, "", stats))
    assert shown.cells[0][0] == f"step 0: {nasty}"
    assert shown.text.count(nasty) == 2


def test_picture_before_the_first_run_and_after_removal():
    assert "no run yet" in "".join(Cells(report.html("Cache-DiT", "", Stats())).text)
    assert "(removed)" in "".join(Cells(report.html("Cache-DiT", "removed", one_run())).text)


def test_colours_differ_in_lightness_for_those_who_see_no_hue():
    def lightness(colour):
        return sum(int(colour[i : i + 2], 16) * w for i, w in ((1, 0.299), (3, 0.587), (5, 0.114)))

    assert abs(lightness(report.COMPUTED) - lightness(report.SKIPPED)) > 100
