"""`benchmarks.cache`: a run that was stopped goes on, other guidance scales, a limit of time."""

from __future__ import annotations

import contextlib
import json
from functools import partial

import pytest
import torch

from benchmarks import cache, calibrated, contenders, summary
from benchmarks.calibrated import CAPTIONS, Of
from benchmarks.contenders import FEWER, OURS, UNPATCHED, Contender
from benchmarks.peers import easycache
from benchmarks.runs import Setting, about, key_of, run
from benchmarks.unfinished import Unfinished
from miniatures import NAMES, captions
from sgl_diffusion_accel import apply_adaptive_cache

STEPS = 5
SETTING = Setting("qwen", STEPS)
OWN = {"wan": 4.0, "qwen": 4.0, "emoji": 4.0, "flux": 1.0}
TIMES = ("seconds", "speedup", "cpu_speedup", "cpu_time_in_calls")


def captions_of(count):
    return captions("qwen", count, cache.CAPTION_SEED)


class Stopped(Exception):
    pass


class Few:
    """A few contenders in the place of all; one of them stops the whole on request, before its run of that number."""

    def __init__(self):
        self.stop_at, self.turns, self.with_plan = None, 0, False

    @contextlib.contextmanager
    def stopping(self, pipe):
        if self.turns == self.stop_at:
            raise Stopped
        self.turns += 1
        yield

    def __call__(self, made, full=True):
        plan = Contender(OURS, "plan, 2x", partial(contenders.planned, made, made.of, CAPTIONS, 2.0))
        easy = partial(easycache.apply, setting=easycache.Setting(0.5, 2), steps=STEPS)
        return [
            Contender(UNPATCHED, f"{STEPS} steps"),
            Contender(FEWER, "4 steps", steps=4),
            *([plan] if self.with_plan else []),
            Contender(OURS, "adaptive, stopped on request", self.stopping),
            Contender(OURS, "adaptive", partial(apply_adaptive_cache, tolerance=0.01)),
            Contender("EasyCache", "threshold .5, after 2", easy),
        ]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(cache, "contenders", made := Few())
    monkeypatch.setattr(cache, "be_quiet", lambda: None)  # it is so for the whole process
    return made


@pytest.fixture
def runs(monkeypatch):
    """The contenders that are run, in turn."""
    seen = []

    def counted(setting, contender, call):
        seen.append(contender.name)
        return run(setting, contender, call)

    monkeypatch.setattr(cache, "run", counted)
    return seen


def without_times(found):
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items() if key not in TIMES}
    return [without_times(each) for each in found] if isinstance(found, list) else found


def test_a_run_that_was_stopped_goes_on_and_gives_what_one_gives_that_was_not(few, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrated, "planned_speedups", lambda steps: (2.0,))
    few.with_plan = True
    whole = cache.measure(SETTING, captions_of(3))
    names = [each.name for each in few(calibrated.Calibrated(SETTING.of))]
    assert runs == ["reference", *names] * 3
    runs.clear()

    few.turns, few.stop_at = 0, 1
    with pytest.raises(Stopped):
        cache.measure(SETTING, captions_of(3), unfinished=Unfinished(tmp_path / "qwen", key_of(SETTING)))
    assert runs == ["reference", *names, "reference", *names[:4]]
    runs.clear()

    few.stop_at = None
    monkeypatch.setattr(calibrated, "_plan", lambda *given: pytest.fail("calibrated again"))
    kept = Unfinished(tmp_path / "qwen", key_of(SETTING))
    assert kept.count == 9
    resumed = cache.measure(SETTING, captions_of(3), unfinished=kept)
    assert runs == ["reference", *names[3:], "reference", *names]
    assert without_times(resumed) == without_times(whole)
    assert all(len(row["samples"]) == 3 for row in resumed["rows"])


def test_the_command_goes_on_and_leaves_nothing_but_its_result(few, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "RESULTS", tmp_path)
    given = ("--models", "qwen", "--steps", str(STEPS), "--captions", "1", "--guidance", "2.5")
    few.stop_at = 0
    with pytest.raises(Stopped):
        cache.main(given)
    assert [path.name for path in tmp_path.iterdir()] == [".unfinished"]

    runs.clear()
    few.stop_at = None
    cache.main(given)
    assert "adaptive" in runs
    assert "4 steps" not in runs
    assert "goes on from 2 samples" in capsys.readouterr().out
    name = f"qwen_euler_{STEPS}_guidance_2.5"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".unfinished", f"pareto_{name}.png", f"{name}.json"]
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["guidance"] == 2.5
    assert summary.short_title(written) == f"Qwen-Image, {STEPS} Euler steps, guidance 2.5; 1 caption"

    few.turns, few.stop_at = 0, 0
    with pytest.raises(Stopped):
        cache.main(given)
    runs.clear()
    few.stop_at = None
    cache.main((*given, "--only", "EasyCache"))
    cache.main((*given, "--fresh"))
    assert runs == ["reference", "5 steps", "threshold .5, after 2", "reference", "5 steps", "4 steps", *runs[6:]]


def test_a_part_is_measured_on_the_captions_of_the_file(few, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "RESULTS", tmp_path)
    given = ("--models", "qwen", "--steps", str(STEPS), "--captions")
    cache.main((*given, "3", "--minutes", "0"))
    path = tmp_path / f"qwen_euler_{STEPS}.json"
    before = json.loads(path.read_text())
    assert before["captions"] == captions_of(3)[:1] != captions_of(1)
    for count in ("1", "3"):
        runs.clear()
        cache.main((*given, count, "--only", "EasyCache"))
        assert runs == ["reference", f"{STEPS} steps", "threshold .5, after 2"]
        assert without_times(json.loads(path.read_text())["rows"]) == without_times(before["rows"])


def test_each_picture_of_a_batch_is_held_against_its_own(few, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "RESULTS", tmp_path)
    given = ("--models", "qwen", "--steps", str(STEPS), "--captions", "4", "--batch", "2")
    few.stop_at = 1
    with pytest.raises(Stopped):
        cache.main(given)
    few.stop_at = None
    cache.main(given)
    written = json.loads((tmp_path / f"qwen_euler_{STEPS}_batch_2.json").read_text())
    assert written["captions"] == captions_of(4)
    assert written["latents"][0] == 2
    assert summary.short_title(written) == f"Qwen-Image, {STEPS} Euler steps, batches of 2; 4 captions"
    alone = cache.measure(SETTING, captions_of(4))
    for one, other in zip(written["rows"], alone["rows"], strict=True):
        assert one["name"] == other["name"]
        assert len(one["samples"]) == 4
        if one["family"] == FEWER:  # what has no cache treats each picture as if it were alone
            expected = [each["psnr"] for each in other["samples"]]
            assert [each["psnr"] for each in one["samples"]] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("batch", "such_as"), [("0", "batches from 1"), ("2", "type --captions 4"), ("-1", "batches from 1")]
)
def test_captions_that_are_no_whole_batches_are_refused(batch, such_as, capsys):
    with pytest.raises(SystemExit):
        cache.main(("--models", "qwen", "--captions", "3", "--batch", batch))
    told = capsys.readouterr().err
    assert f"--captions 3 are no batches of {batch}" in told
    assert such_as in told


def test_of_several_settings_those_that_were_finished_are_not_measured_again(few, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "RESULTS", tmp_path)
    given = ("--models", "qwen", "flux", "--steps", "5", "6", "--captions", "1")
    few.stop_at = 2
    with pytest.raises(Stopped):
        cache.main(given)
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["flux_euler_5", "qwen_euler_5"]
    runs.clear()
    few.stop_at = None
    cache.main(given)
    assert runs.count("4 steps") == 1
    assert len(list(tmp_path.glob("*.json"))) == 4
    assert not list((tmp_path / ".unfinished").iterdir())


def test_what_other_code_has_measured_does_not_count(tmp_path, monkeypatch):
    Unfinished(tmp_path / "wan", key_of(Setting("wan", 50))).add(("a",), {})
    assert Unfinished(tmp_path / "wan", key_of(Setting("wan", 50))).count == 1
    monkeypatch.setattr("benchmarks.runs._code", lambda: "other")
    assert Unfinished(tmp_path / "wan", key_of(Setting("wan", 50))).count == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_only_one_number_of_threads_and_one_setting_go_on(threads, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        Unfinished(tmp_path / "wan", key_of(Setting("wan", 50))).add(("a", "b"), {"psnr": float("inf")})
        torch.set_num_threads(threads)
        found = Unfinished(tmp_path / "wan", key_of(Setting("wan", 50)))
        assert found.sample(("a", "b")) == ({"psnr": float("inf")} if threads == 1 else None)
        assert Unfinished(tmp_path / "wan", key_of(Setting("wan", 50, guidance=3.0))).count == 0
        assert not (tmp_path / "wan").exists()
    finally:
        torch.set_num_threads(before)


def test_a_line_that_was_not_written_to_its_end_is_left_out(tmp_path):
    Unfinished(tmp_path / "wan", {}).add(("a",), {"psnr": 1.0})
    with (tmp_path / "wan" / "samples.jsonl").open("a") as file:
        file.write('[["b"], {"psn')
    Unfinished(tmp_path / "wan", {}).add(("c",), {"psnr": 3.0})
    found = Unfinished(tmp_path / "wan", {})
    assert (found.count, found.sample(("b",)), found.sample(("c",))) == (2, None, {"psnr": 3.0})


def test_no_caption_is_begun_that_would_end_too_late(few, runs, monkeypatch, tmp_path):
    found = cache.measure(SETTING, captions_of(4), seconds=0.0)
    assert found["captions"] == captions_of(4)[:1]
    assert all(len(row["samples"]) == 1 for row in found["rows"])
    with pytest.raises(SystemExit):
        cache.main(("--minutes", "1", "--only", "plan"))


@pytest.mark.parametrize("model", [name for name in NAMES if name != "flux"])
def test_another_guidance_reaches_the_runs_and_what_is_calibrated(model):
    other = Setting(model, 2, guidance=7.0)
    call = {"caption": captions(model, 1, 0)[0], "seed": 0}
    frames = [run(each, Contender(UNPATCHED, ""), call).frames for each in (Setting(model, 2), other)]
    assert abs(frames[0] - frames[1]).max() > 0.01
    for each, scale in ((Of(model, 2), OWN[model]), (other.of, 7.0)):
        for given in (*each.calls(2), each.call(55, 55)):
            assert given.get("guidance_scale", given.get("true_cfg_scale")) == scale


def test_names_have_the_guidance_where_it_is_not_the_miniatures_own():
    names = [
        summary.name_of(about(Setting(*given, **more)))
        for given, more in (
            (("emoji", 50), {"guidance": 7.0}),
            (("emoji", 50), {"guidance": 4.0}),
            (("wan", 20, "unipc"), {"guidance": 1.5, "size": (24, 16)}),
            (("flux", 50), {"guidance": 1.0}),
        )
    ]
    assert names == ["emoji_guidance_7", "emoji", "wan_unipc_20_guidance_1.5_24x16", "flux"]
    with pytest.raises(ValueError, match="flux knows no guidance but 1, not 7: leave it out"):
        Setting("flux", 50, guidance=7.0)
