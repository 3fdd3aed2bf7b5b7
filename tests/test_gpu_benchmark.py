"""The benchmark of large models, on tiny ones: every part, resuming, errors, tables, and the committed page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from benchmarks.gpu import docs
from benchmarks.gpu.__main__ import main, measure
from benchmarks.gpu.caches import NEVER, SKIPPING
from benchmarks.gpu.models import MODELS, Place, build, release
from benchmarks.gpu.padded import PADDED
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.store import PartLog, Store
from benchmarks.gpu.timing import per_step
from benchmarks.peers import cache_dit

TINY = ("--device", "cpu", "--tiny")
MODEL_PARTS = ("flux", "qwen", "wan", "hunyuanvideo", "wan_14b")


def parts_of(path: Path) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads(path.read_text())["parts"]
    return parts


@pytest.mark.matrix
def test_whole_measurement_runs_on_tiny_models_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One test, so that the measurement is run once, however many processes share the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # what `auto` chooses is kept apart from the user's
    path = tmp_path / "all.json"
    main((*TINY, "--output", str(path)))
    printed, parts = capsys.readouterr().out, parts_of(path)
    assert list(parts) == list(PARTS)
    for name, part in parts.items():
        assert part["finished"], name
        assert "error" not in part, name
        assert part["environment"]["packages"]["torch"] == torch.__version__
    for name in MODEL_PARTS:
        check_caches(parts[name]["rows"], name)
    for name in ("compile", "graphs", "graphs_whole"):
        check_compiled(dict(parts[name]["rows"]))
    check_tables(printed)
    check_resuming(path, capsys)


def check_caches(rows: dict[str, Any], name: str) -> None:
    """Never skipping is bitwise equal to unpatched; skipping has the time of the device and that of the host."""
    failed = {row: found["error"] for row, found in rows.items() if "error" in found}
    assert failed == {}, name
    for cache in NEVER:
        assert rows[f"never skipping: {cache}"]["bitwise"], (name, cache)
        assert set(rows[f"never skipping: {cache}"]["steps"]) == {"x"}
    for cache in [*SKIPPING, *(["plan at 2x"] if name in ("flux", "qwen") else [])]:
        assert set(rows[cache]["steps"]) == {"x", "."}, (name, cache)
        assert rows[cache]["skipped_device_ms"] > 0
        assert rows[cache]["skipped_host_ms"] > 0
        assert rows[cache]["finite"]
    assert rows["unpatched again"]["bitwise"]
    assert rows["DBCache F1"]["steps"] == "xxx...x...x."
    if cache_dit.installed():
        assert rows["cache-dit DBCache F1"]["steps"] == rows["DBCache F1"]["steps"]


def check_compiled(rows: dict[str, Any]) -> None:
    """Compiled caches give what eager ones give, and later runs compile nothing."""
    assert rows.pop("unpatched, eager")["computed_device_ms"] > 0
    assert rows["unpatched"]["graphs"] > 0
    for row in rows.values():
        assert row["relative_difference"] < 1e-4
        assert row["graphs_later"] == 0


def check_tables(printed: str) -> None:
    """A heading for each part and a line for each row, with as many cells as its table has columns."""
    assert printed.count("| adaptive |") == len(MODEL_PARTS) + 3
    assert printed.count("| never skipping: DBCache F1 |") == len(MODEL_PARTS)
    assert "| tiny | sdpa |" in printed
    for name in MODEL_PARTS:
        assert f"### {MODELS[name].title}, tiny\n" in printed
    for chapter in printed.split("### ")[1:]:
        cells = {line.count("|") for line in chapter.splitlines() if line.startswith("|")}
        assert len(cells) == 1, chapter


def check_resuming(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second call measures what is missing or was cut off, and nothing else."""
    before = json.loads(path.read_text())
    partly = json.loads(path.read_text())
    del partly["parts"]["attention"]
    del partly["parts"]["wan_14b"]["finished"]
    path.write_text(json.dumps(partly))
    main((*TINY, "--output", str(path), "--parts", "flux,wan_14b,attention"))
    printed, after = capsys.readouterr().out, parts_of(path)
    assert "flux: in the file already" in printed
    assert f"wan_14b: {PARTS['wan_14b'].about}" in printed
    assert after["flux"] == before["parts"]["flux"]
    assert after["wan_14b"]["finished"]
    assert after["wan_14b"] != before["parts"]["wan_14b"]
    assert after["attention"]["rows"]


def test_padding_is_cut_and_its_table_tells_tokens_masks_and_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "padding.json"
    main((*TINY, "--output", str(path), "--parts", "padding"))
    printed, rows = capsys.readouterr().out, parts_of(path)["padding"]["rows"]
    there = [model for model in PADDED.values() if hasattr(diffusers, model.transformer)]
    assert len(rows) == len(PADDED)
    for model in there:
        (found,) = (row for name, row in rows.items() if name.startswith(f"{model.title}, tiny"))
        assert found["masked_calls"][0] > found["masked_calls"][1] == 0
        assert found["text_tokens"][0] > found["text_tokens"][1]
        assert found["relative_difference"] < 1e-5
        assert found["finite"]
    assert printed.count(" → 9 |") == len(there)
    assert "| times as fast |" in printed
    for name, row in rows.items():
        assert ("error" in row) == (f"- {name} did not run" in printed)


def failing(log: PartLog, place: Place) -> None:
    log.row("measured before", lambda: {"computed_device_ms": 1.5})
    torch.empty(2, 3) @ torch.empty(2, 3)


def failing_row(log: PartLog, place: Place) -> None:
    log.row("wrong", lambda: {"sum": torch.empty(2, 3) @ torch.empty(2, 3)})
    log.row("right", lambda: {"computed_device_ms": 250.0})


def test_an_error_is_the_result_of_its_part_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    parts = {"first": Part("fails", 1, failing), "second": Part("goes on", 1, failing_row)}
    main((*TINY, "--output", str(path)), parts)
    found = parts_of(path)
    assert found["first"]["error"].startswith("RuntimeError: ")
    assert found["first"]["rows"]["measured before"] == {"computed_device_ms": 1.5}
    assert found["second"]["rows"]["wrong"]["error"].startswith("RuntimeError: ")
    assert "error" not in found["second"]
    printed = capsys.readouterr().out
    assert "Failed: RuntimeError: " in printed
    assert "- wrong did not run: RuntimeError: " in printed
    assert "| right | 250 |" in printed
    main((*TINY, "--output", str(path)), parts)
    assert "first: in the file already" in capsys.readouterr().out


def test_again_measures_anew(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    taken: list[int] = []

    def count(log: PartLog, place: Place) -> None:
        taken.append(len(taken))

    for more in ((), (), ("--again",)):
        main((*TINY, "--output", str(path), *more), {"one": Part("counts", 1, count)})
    assert taken == [0, 1]


def test_each_row_is_in_the_file_as_soon_as_it_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    def cut_off(log: PartLog, place: Place) -> None:
        log.row("first", lambda: {"computed_device_ms": 1.0})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        main((*TINY, "--output", str(path)), {"one": Part("is cut off", 1, cut_off)})
    assert parts_of(path)["one"]["rows"] == {"first": {"computed_device_ms": 1.0}}
    assert "finished" not in parts_of(path)["one"]


def test_a_part_that_would_not_fit_is_left_for_the_next_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "results.json")
    place = Place(torch.device("cpu"), torch.float32)
    parts = {name: Part("fits alone", 100, lambda log, place: None) for name in ("first", "second")}
    for done in (["first"], ["first", "second"]):
        measure(store, parts, place, seconds=90)
        assert list(parts_of(store.path)) == done
    assert "second: not begun, " in capsys.readouterr().out


def test_unknown_part_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such part: fluxx; there are flux, qwen"):
        main((*TINY, "--output", str(tmp_path / "none.json"), "--parts", "fluxx"))


def test_true_configurations_are_those_of_the_released_models() -> None:
    cut = {"wan_14b": [3], "hunyuanvideo": [2, 4]}
    for name, model in MODELS.items():
        depths = [model.config[key] for key in ("num_layers", "num_single_layers") if key in model.config]
        assert depths == cut.get(name, list(model.released)), name


def test_weights_keep_the_precision_that_their_class_asks_for_and_are_given_back() -> None:
    built = build(MODELS["wan"], Place(torch.device("cpu"), torch.bfloat16, tiny=True))
    weights = dict(built.pipe.transformer.named_parameters())
    assert weights["blocks.0.scale_shift_table"].dtype == torch.float32
    assert weights["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert 0.01 < weights["blocks.0.attn1.to_q.weight"].float().std() < 0.03
    release(built)
    assert all(weight.device.type == "meta" for weight in built.pipe.transformer.parameters())


def test_steps_are_computed_where_one_of_their_calls_is() -> None:
    assert per_step([True, True, False, False, False, True], 3) == [True, False, True]
    assert per_step([True, False], 2) == [True, False]


def test_the_committed_page_is_what_the_committed_files_make() -> None:
    page = docs.PAGE.read_text()
    assert page == docs.renewed(page), "run python -m benchmarks.table"
    assert "NVIDIA H200" in page
