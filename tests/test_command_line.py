"""`python -m sgl_diffusion_accel`: info, perf-diff, and what it says of what it cannot take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sgl_diffusion_accel
from sgl_diffusion_accel.__main__ import COMMANDS, main
from sgl_diffusion_accel.attention.backends.registry import all_backends
from sgl_diffusion_accel.environment import package_versions
from sgl_diffusion_accel.profiling.machine import describe

SGLANG = {
    "timestamp": "2026-01-01T00:00:00+00:00",
    "request_id": "r",
    "commit_hash": "0123456789abcdef",
    "tag": "benchmark_dump",
    "total_duration_ms": 1000.0,
    "steps": [
        {"name": "TextEncodingStage", "duration_ms": 100.0},
        {"name": "DenoisingStage", "duration_ms": 800.0},
        {"name": "DecodingStage", "duration_ms": 100.0},
    ],
    "denoise_steps_ms": [{"step": 0, "duration_ms": 500.0}, {"step": 1, "duration_ms": 300.0}],
    "memory_checkpoints": {
        "after_DenoisingStage": {"allocated_mb": 10.0, "peak_reserved_mb": 2000.0},
        "mem_analysis": {"allocated_mb": 10.0, "peak_reserved_mb": 2048.5},
    },
    "meta": {},
}
"""As SGLang-Diffusion writes it, in a version without the host's memory."""


def saved(path: Path, **changes: Any) -> str:
    path.write_text(json.dumps(SGLANG | changes))
    return str(path)


def test_info_runs_and_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    done = capsys.readouterr()
    assert done.err == ""
    assert [line for line in done.out.splitlines() if line.startswith("#")] == [
        "### Versions",
        "### Machine",
        "### Attention backends",
        "### Environment",
    ]
    assert f"| torch | {torch.__version__} |" in done.out
    assert f"| sgl-diffusion-accel | {sgl_diffusion_accel.__version__} |" in done.out
    assert "| sdpa | yes |  |" in done.out


def test_info_gives_a_reason_for_each_backend_that_is_not_usable() -> None:
    rows = [line.strip("| ").split(" | ") for line in describe().splitlines() if line.startswith("| ")]
    found = {row[0]: row[1:] for row in rows if row[0] in all_backends() and len(row) > 1 and row[1] in ("yes", "no")}
    assert set(found) == set(all_backends())
    assert all(len(row) == 2 and row[1] for row in found.values() if row[0] == "no")


def test_info_tells_settings_and_hides_secrets(monkeypatch: Any) -> None:
    monkeypatch.setenv("SGLANG_CACHE_DIT_FN", "3")
    monkeypatch.setenv("SGLANG_API_KEY", "hush")
    monkeypatch.setenv("HF_TOKEN", "hush")
    monkeypatch.setenv("SGLANG_LINES", "one\ntwo")
    shown = describe()
    assert "| SGLANG_LINES | one two |" in shown
    assert "| SGLANG_CACHE_DIT_FN | 3 |" in shown
    assert "hush" not in shown


def test_versions_are_of_what_is_installed() -> None:
    assert set(package_versions(("torch", "no-such-package"))) == {"sgl-diffusion-accel", "torch"}


def test_diff_of_two_files(tmp_path: Path, capsys: Any) -> None:
    before = saved(tmp_path / "before.json")
    steps = [{"name": "DenoisingStage", "duration_ms": 300.0}, {"name": "Other", "duration_ms": 200.0}]
    after = saved(tmp_path / "after.json", total_duration_ms=500.0, steps=steps, denoise_steps_ms=[])
    assert main(["perf-diff", before, after]) == 0
    shown = capsys.readouterr().out
    for line in (
        "**2.00× faster**.",
        "| **total**, ms | 1,000 | 500 | -500.00 | -50.0% |",
        "| DenoisingStage, ms | 800 | 300 | -500.00 | -62.5% |",
        "| TextEncodingStage, ms | 100 | – | – | – |",
        "| Other, ms | – | 200 | – | – |",
        "| denoising steps | 2 | 0 | -2.00 | -100.0% |",
        "| mean step, ms | 400 | – | – | – |",
        "| peak memory reserved, MiB | 2,048.50 | 2,048.50 | +0.00 | +0.0% |",
    ):
        assert line in shown
    assert "commit 0123456789" in shown
    assert "host memory" not in shown


@pytest.mark.parametrize(
    ("after", "verdict"),
    [(1010.0, "About the same"), (2000.0, "2.00× slower"), (0.0, "there is no ratio"), (250.0, "4.00× faster")],
)
def test_verdict(after: float, verdict: str, tmp_path: Path, capsys: Any) -> None:
    files = saved(tmp_path / "a.json"), saved(tmp_path / "b.json", total_duration_ms=after)
    assert main(["perf-diff", *files]) == 0
    assert verdict in capsys.readouterr().out


def test_stages_that_ran_twice_are_summed_up(tmp_path: Path, capsys: Any) -> None:
    twice = [{"name": "DecodingStage", "duration_ms": 2.0}] * 2
    main(["perf-diff", saved(tmp_path / "a.json", steps=twice), saved(tmp_path / "b.json", steps=twice)])
    assert "| DecodingStage, ms | 4 | 4 |" in capsys.readouterr().out


def test_stage_with_a_bar_does_not_break_the_table(tmp_path: Path, capsys: Any) -> None:
    steps = [{"name": "A|B", "duration_ms": 2.0}]
    main(["perf-diff", saved(tmp_path / "a.json", steps=steps), saved(tmp_path / "b.json", steps=steps)])
    assert "| A\\|B, ms | 2 | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"total_duration_ms": 1}',
        '{"total_duration_ms": "x", "steps": []}',
        '{"total_duration_ms": NaN, "steps": []}',
        '{"total_duration_ms": 1, "steps": [{"name": "a", "duration_ms": 1e999}]}',
        "[" * 100_000,
        '{"total_duration_ms": 1, "steps": [{"name": "a"}]}',
        '{"total_duration_ms": 1, "steps": 3}',
        '{"total_duration_ms": 1, "steps": [], "memory_checkpoints": [1]}',
        '{"total_duration_ms": 1, "steps": [], "denoise_steps_ms": [5]}',
    ],
)
def test_damaged_file_is_told_on_stderr(content: str, tmp_path: Path, capsys: Any) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text(content)
    assert main(["perf-diff", saved(tmp_path / "a.json"), str(damaged)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "damaged.json" in told.err
    assert "Traceback" not in told.err


def test_missing_file_is_told_on_stderr(tmp_path: Path, capsys: Any) -> None:
    assert main(["perf-diff", saved(tmp_path / "a.json"), str(tmp_path / "none.json")]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "none.json cannot be read" in told.err


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["perf-diff", "one.json"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m sgl_diffusion_accel" in capsys.readouterr().err


def test_unknown_command_is_told_with_the_nearest_one(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["perfdiff", "one.json"])
    assert (
        "unknown command 'perfdiff'. Did you mean 'perf-diff'? Known: check, info, perf-diff."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert COMMANDS[name].about.split(",")[0] in capsys.readouterr().out


def test_version(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == sgl_diffusion_accel.__version__
