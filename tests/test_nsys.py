"""The command line of Nsight Systems."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion_accel import ConfigError, ConfigTypeError, nsys_command


def words(*args: Any, **kwargs: Any) -> list[str]:
    return shlex.split(nsys_command(*args, **kwargs))


def test_capture_is_what_the_profile_chooses() -> None:
    found = words("python run.py")
    assert found[:2] == ["nsys", "profile"]
    assert {"--capture-range=cudaProfilerApi", "--capture-range-end=stop"} <= set(found)
    assert {"--cuda-graph-trace=node", "--trace-fork-before-exec=true"} <= set(found)
    assert found[-2:] == ["python", "run.py"]
    assert not any("overwrite" in word for word in found)


def test_several_calls_are_several_reports() -> None:
    assert "--capture-range-end=repeat:3" in words("python run.py", calls=3)


def test_words_are_quoted_for_the_shell() -> None:
    found = words(["run.py", "--prompt", "a 'red' circle; rm"], output="my profile_%p")
    assert found[-4:] == [sys.executable, "run.py", "--prompt", "a 'red' circle; rm"]
    assert "--output=my profile_%p" in found


def test_command_that_is_running_now(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--steps", "5"])
    assert words()[-4:] == [sys.executable, "run.py", "--steps", "5"]


def test_documentation_shows_what_is_printed() -> None:
    page = Path(__file__).parent.parent / "docs" / "profiling.md"
    assert f"\n{nsys_command('python run.py')}\n" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"command": ""}, ConfigError),
        ({"command": []}, ConfigError),
        ({"command": 3}, ConfigTypeError),
        ({"command": [1]}, ConfigTypeError),
        ({"command": "run", "calls": 0}, ConfigError),
        ({"command": "run", "calls": "2"}, ConfigTypeError),
        ({"command": "run", "output": None}, ConfigTypeError),
    ],
)
def test_what_is_no_command_is_refused(given: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        nsys_command(**given)
